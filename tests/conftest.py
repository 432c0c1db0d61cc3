"""Settings that must be in place before the first import."""

import importlib
import importlib.metadata
import os
import pathlib
import time
import warnings

os.environ["MPLBACKEND"] = "Agg"
# Models here are tiny and compiled once: without optimisation the suite takes a third
# less time.  Tests that run for longer than they compile are marked `runs_long`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
)
# The older of two ways to compile fused loops takes half the time, as long as it lasts.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)
# Compiling is most of the time: workers, and Pythons with the same jaxlib, share what
# they compiled.
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
# Also the smallest programs: the clearing below makes every module want them again.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Threads of JAX processes side by side wait for one another: workers of pytest-xdist
# keep to one core each.
worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1 and hasattr(
    os, "sched_setaffinity"
):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import jax  # noqa: E402
import pytest  # noqa: E402

# Programs that are lowered one after another in one context; JAX 0.12 has the same ten.
MAX_LOWERED = 10

# Tests that are whole programs, in minutes where others take seconds.
PROGRAMS = {"test_battery.py", "test_docs.py", "test_gallery.py"}

# Each executable maps memory, of which Linux allows a process 65,530 pieces.
MAX_MAPS = 25_000
# Tests that take longer may have made many, in seconds; counting takes milliseconds.
LONG = 5.0
BEGAN = pytest.StashKey[float]()


def reuse_contexts():
    """Lower programs in contexts that there are, as newer versions of JAX do.

    JAX 0.10 makes one, with all its dialects, for every program: a sixth of the suite's
    time.  A program that is lowered inside another one's lowering has its own all the
    same.
    """
    from jax._src.interpreters import mlir

    create, held = mlir.make_ir_context, []

    def make():
        try:
            is_inside = mlir.ir.Context.current is not None
        except ValueError:
            is_inside = False
        if is_inside:
            return create()
        if len(held) == MAX_LOWERED:
            held.clear()
        held.append(held[-1] if held else create())
        return held[-1]

    mlir.make_ir_context = make


if importlib.metadata.version("jaxlib").startswith("0.10."):
    reuse_contexts()


def pytest_configure(config):
    """Import ArviZ before there are workers, in the process that runs no tests.

    ArviZ 0.23 stamps a file on the first import of a day, and two processes that do so
    at once move it from under each other.
    """
    is_worker = hasattr(config, "workerinput")
    if config.getoption("numprocesses", None) and not is_worker:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("arviz")


def pytest_collection_modifyitems(items):
    """Whole programs first: no worker begins one where the others are at their end.

    Groups of tests still come before them, the largest first.
    """
    items.sort(key=lambda item: item.path.name not in PROGRAMS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Optimise the programs of a test that runs long, its fixtures' too.

    Also notes when a test began.
    """
    item.stash[BEGAN] = time.perf_counter()
    if item.get_closest_marker("runs_long") is None:
        return (yield)

    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    jax.config.update(flag, False)
    try:
        return (yield)
    finally:
        jax.config.update(flag, before)


def pytest_runtest_teardown(item, nextitem):
    """Drop executables where there are many, after a module or a long test."""
    is_last = nextitem is None or nextitem.module is not item.module
    is_long = time.perf_counter() - item.stash[BEGAN] > LONG
    if (is_last or is_long) and num_maps() > MAX_MAPS:
        jax.clear_caches()


def num_maps():
    """Pieces of memory that this process maps; where that is unknown, too many."""
    try:
        return pathlib.Path("/proc/self/maps").read_text().count("\n")
    except OSError:
        return MAX_MAPS + 1
