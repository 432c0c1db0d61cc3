"""Matrix products at the full precision of their operands.

GPUs and TPUs multiply matrices of float32 in fewer bits unless they are told not to,
which is right for a net, whose own choice stands, and wrong for sums of weights.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
