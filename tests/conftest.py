"""Settings that must be in place before the first import."""

import os

os.environ["MPLBACKEND"] = "Agg"
# Models here are tiny and compiled once: without optimisation the suite takes a third less time.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)
