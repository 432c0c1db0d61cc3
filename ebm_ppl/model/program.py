"""Types of models and their parameters."""

from collections.abc import Callable
from typing import Any

Model = Callable[..., Any]

Params = dict[str, Any]
