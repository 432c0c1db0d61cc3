"""Smooth functions of one or two variables by Chebyshev polynomials."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.polynomial.chebyshev import chebvander

# Of fits by least squares on evenly spaced points, higher ones wave between them.
MAX_DEGREE = 16
# Standard errors by which a value may stand off a smooth function.
MAX_NOISE = 4.0


class Polynomial(NamedTuple):
    """A sum of products of Chebyshev polynomials on [−1, 1] in every variable.

    Attributes:
        coefficients: ``(num_terms, *shape)``, for values of that shape.
        degrees: Of each term in each variable, ``(num_terms, num_variables)``.
    """

    coefficients: np.ndarray
    degrees: np.ndarray

    def __call__(self, point: Array) -> Array:
        """The values at one point, ``(num_variables,)``."""
        highest = int(self.degrees.max())
        powers = [jnp.ones_like(point), point]
        for _ in range(highest - 1):
            powers.append(2.0 * point * powers[-1] - powers[-2])

        table = jnp.stack(powers)  # (degree, variable)
        terms = jnp.ones(len(self.degrees), table.dtype)
        for variable in range(self.degrees.shape[1]):
            terms = terms * table[self.degrees[:, variable], variable]
        return jnp.tensordot(
            terms, jnp.asarray(self.coefficients), 1, precision="highest"
        )


def terms_of(points: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Every term at every point, ``(num_points, num_terms)``."""
    table = chebvander(points, int(degrees.max()))
    variables = np.arange(degrees.shape[1])
    return np.prod(table[:, variables, degrees], axis=-1)


def degrees_up_to(degree: int, num_variables: int) -> np.ndarray:
    """Exponents of all terms of a total degree, ``(num_terms, num_variables)``."""
    grid = np.indices((degree + 1,) * num_variables).reshape(num_variables, -1).T
    return grid[grid.sum(1) <= degree]


def fit(points: np.ndarray, values: np.ndarray, degree: int) -> Polynomial:
    """The polynomial of a total degree nearest to values, by least squares.

    Args:
        points: ``(num_points, num_variables)``, in [−1, 1].
        values: ``(num_points, *shape)``.
        degree: Total degree.
    """
    degrees = degrees_up_to(degree, points.shape[1])
    flat = values.reshape(len(values), -1)
    found = np.linalg.lstsq(terms_of(points, degrees), flat, rcond=None)[0]
    return Polynomial(found.reshape(-1, *values.shape[1:]), degrees)


def values_of(polynomial: Polynomial, points: np.ndarray) -> np.ndarray:
    """In double precision, ``(num_points, *shape)``."""
    terms = terms_of(points, polynomial.degrees)
    return np.tensordot(terms, polynomial.coefficients, 1)


class Smooth(NamedTuple):
    """A polynomial through noisy values, and how far its shape may be off.

    Attributes:
        polynomial: Fitted to all points.
        error: How the difference varies of two polynomials that are fitted to one half
            of the points each, and how far values stand off by more than their noise.
        halves: Those two.
        points: To which all were fitted, ``(num_points, num_variables)``.
        noise: Standard errors of the values there.
    """

    polynomial: Polynomial
    error: float
    halves: tuple[Polynomial, Polynomial]
    points: np.ndarray
    noise: np.ndarray

    def error_among(self, points: np.ndarray) -> float:
        """How far the shape may be off among other points: by the halves, and by noise.

        The halves may agree by chance; the values' noise, carried through the least
        squares, does not.
        """
        first, second = (values_of(half, points) for half in self.halves)
        apart = first - second
        weights = terms_of(points, self.polynomial.degrees) @ np.linalg.pinv(
            terms_of(self.points, self.polynomial.degrees)
        )
        weights = weights - weights.mean(0)
        noise = np.sqrt(np.tensordot(weights**2, self.noise**2, 1))
        return float(max(np.max(np.abs(apart - apart.mean(0))), np.max(noise)))


def smooth(
    points: tuple[np.ndarray, np.ndarray],
    values: tuple[np.ndarray, np.ndarray],
    noise: tuple[np.ndarray, np.ndarray],
    counts: tuple[np.ndarray, np.ndarray],
) -> Smooth:
    """A polynomial of the lowest degree that, fitted to one half, does well at the other.

    Args:
        points: Of either half, ``(num_points, num_variables)`` in [−1, 1]; the second
            half lies between the first.
        values: ``(num_points, *shape)`` each.
        noise: Standard errors of the values.
        counts: Points at which the error counts.
    """
    # Of the first half those that the second reaches, without extrapolation
    is_inside = np.all(np.abs(points[0]) <= np.abs(points[1]).max(0), axis=1)
    others = points[1], points[0][is_inside]
    there = values[1], values[0][is_inside]

    off, fits = {}, {}
    for degree in range(1, MAX_DEGREE + 1):
        if len(degrees_up_to(degree, points[0].shape[1])) > min(map(len, points)):
            break
        fits[degree] = [fit(p, v, degree) for p, v in zip(points, values, strict=True)]
        off[degree] = max(
            np.sqrt(np.mean((values_of(half, p) - v) ** 2))
            for half, p, v in zip(fits[degree], others, there, strict=True)
        )
    # The lowest that is as good as noise lets any be seen to be.
    enough = max(1.25 * min(off.values()), np.sqrt(np.mean(noise[1] ** 2)))
    degree = min(degree for degree, error in off.items() if error <= enough)

    # Two halves apart
    matters = np.concatenate([counts[1], counts[0][is_inside]])
    where = np.concatenate(others)
    first, second = (values_of(half, where) for half in fits[degree])
    apart = (first - second)[matters if matters.any() else slice(None)]
    error = np.max(np.abs(apart - apart.mean(0)))

    # What no noise explains
    whole = fit(np.concatenate(points), np.concatenate(values), degree)
    for p, v, e, does in zip(points, values, noise, counts, strict=True):
        beyond = np.abs(values_of(whole, p) - v) - MAX_NOISE * e
        error += max(0.0, np.max(beyond[does], initial=0.0))
    return Smooth(
        whole,
        float(error),
        (fits[degree][0], fits[degree][1]),
        np.concatenate(points),
        np.concatenate(noise),
    )
