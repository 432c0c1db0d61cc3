"""Settings that must be in place before the first import."""

import os

os.environ["MPLBACKEND"] = "Agg"
