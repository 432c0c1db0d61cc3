"""Transforms that hold functions among their arrays, as other libraries' do."""

from typing import Any

import jax
import numpy as np
from jax import Array
from numpyro.distributions.transforms import Transform

from ebm_ppl.programs.content import Same

_NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


class OpaqueTransform(Transform):
    """A transform without leaves: its arrays are constants of what is compiled.

    JAX refuses to trace a tree that has functions among its leaves.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    @property
    def domain(self) -> Any:
        """That of the transform."""
        return self.transform.domain

    @property
    def codomain(self) -> Any:
        """That of the transform."""
        return self.transform.codomain

    def __call__(self, x: Array) -> Array:
        """The transform's value."""
        return self.transform(x)

    def _inverse(self, y: Array) -> Array:
        return self.transform.inv(y)

    def log_abs_det_jacobian(
        self, x: Array, y: Array, intermediates: Any = None
    ) -> Array:
        """The transform's."""
        return self.transform.log_abs_det_jacobian(x, y, intermediates)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The transform's."""
        return self.transform.forward_shape(shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The transform's."""
        return self.transform.inverse_shape(shape)

    def tree_flatten(self) -> tuple:
        """No leaves; the transform is structure, compared by identity."""
        return (), Same(self.transform)

    @classmethod
    def tree_unflatten(cls, aux: Same, leaves: tuple) -> "OpaqueTransform":
        """Inverse of :meth:`tree_flatten`."""
        return cls(aux.value)

    def eq(self, other: object, static: bool = False) -> bool:
        """Two maps are equal only if they are the same object."""
        return self is other


def traceable(transform: Transform) -> Transform:
    """The transform, without leaves where it holds what JAX cannot trace.

    One that depends on traced parameters stays as it is, and JAX refuses it.
    """
    leaves = jax.tree.leaves(transform)
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if is_traced or all(isinstance(leaf, _NUMBERS) for leaf in leaves):
        return transform
    return OpaqueTransform(transform)
