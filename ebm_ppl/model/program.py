"""What models and their parameters are."""

from collections.abc import Callable
from typing import Any

Model = Callable[..., Any]

Params = dict[str, Any]
