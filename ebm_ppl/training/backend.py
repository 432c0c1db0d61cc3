"""The base class of backends: initial state, pure update and the training run."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ebm_ppl.model.program import Estimate, Model, Params, constrain, params_of
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.programs.keys import require_key
from ebm_ppl.training.averaging import Averaging
from ebm_ppl.training.chunk import MAX_CHUNK
from ebm_ppl.training.data import Batches, Data, SameData
from ebm_ppl.training.diagnostics import GRAD_NORM, LOSS, Diagnostic
from ebm_ppl.training.findings import Finding, told
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.loop import run
from ebm_ppl.training.state import OnlyParameters
from ebm_ppl.training.watch import Watchable


class Finite(NamedTuple):
    """Where a step was finite.

    Attributes:
        sites: By energy site.
        parts: By part of the algorithm, the keys of :attr:`Backend.parts`.
    """

    sites: dict[str, Array]
    parts: dict[str, Array]

    def everywhere(self) -> Array:
        """Whether all of the step was finite."""
        return jnp.all(jnp.stack([*self.sites.values(), *self.parts.values()]))

    def new_or_old(self, new: Any, old: Any) -> Any:
        """The new state, or the whole old one where anything was not finite."""
        return jax.tree.map(partial(jnp.where, self.everywhere()), new, old)


def finite_parts(loss: Array, grad_norm: Array, params: Params) -> dict[str, Array]:
    """Of a step's loss, gradient and new parameters; the keys of :attr:`Backend.parts`."""
    return {
        "loss": jnp.isfinite(loss),
        "gradient": jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(params)),
    }


class Backend(ABC):
    """A training algorithm: subclasses write :meth:`_start` and :meth:`update`.

    States are frozen dataclasses, subclasses of :class:`State` and registered as
    pytrees, with fields ``params`` (unconstrained), ``transforms`` and ``rng_key``.
    """

    model: Model

    parts: ClassVar[dict[str, str]] = {
        "loss": "the loss over the data",
        "gradient": "the gradient",
    }
    """Parts of a step that may fail to be finite, in words."""

    diagnostics: ClassVar[tuple[Diagnostic, ...]] = (LOSS, GRAD_NORM)
    """The keys of ``Fit.history``."""

    @abstractmethod
    def _start(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> Any:
        """The first state, checked on the data."""

    @abstractmethod
    def update(
        self, state: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """One training step; pure, so it can be jitted and scanned over batches.

        Args:
            state: From :meth:`init` or the last update.
            args: The model's positional arguments, such as a batch.
            kwargs: The model's keyword arguments.

        Returns:
            The next state and a dict of diagnostics, the keys of ``Fit.history``.  If
            anything in the step is not finite, the old state is kept whole and
            ``info["finite"]`` says where.
        """

    def _template(
        self, rng_key: Array, arguments: Arguments, init_params: Params | None
    ) -> Any:
        """A state of the first one's shapes, made without what takes time."""
        return self._start(rng_key, arguments, init_params)

    def _resume(self, state: Any) -> Any:
        """A given state with this backend's own settings in it."""
        return state

    def updates_until_upkeep(self, state: Any) -> int:
        """How many updates :meth:`run` may make before it calls :meth:`upkeep`."""
        return MAX_CHUNK

    def upkeep(self, state: Any, arguments: Arguments) -> Any:
        """A state with what is done now and then, outside the compiled loop."""
        return state

    def with_params(self, state: Any, params: Params, arguments: Arguments) -> Any:
        """A state with other unconstrained parameters, such as averages."""
        return replace(state, params=params)

    def finish(self, state: Any, arguments: Arguments) -> tuple[Params, Any]:
        """What a run that ends in this state returns: constrained parameters, and it."""
        return self.get_params(state), state

    @property
    def callables(self) -> dict[str, Any]:
        """Options that are callable, such as the model."""
        return {name: value for name, value in vars(self).items() if callable(value)}

    def _findings(
        self, fit: Fit, init_state: Any, arguments: Arguments, has_every_row: bool
    ) -> Iterator[Finding]:
        """What a finished run shows.

        Whether it ended at a maximum can be asked where all rows are at hand.
        """
        return iter(())

    def init(
        self,
        rng_key: Array,
        *args: Any,
        init_params: Estimate | Params | None = None,
        **kwargs: Any,
    ) -> Any:
        """Check the model on its data and make the first state.

        Args:
            rng_key: A JAX PRNG key.
            args: The model's positional arguments.
            init_params: A :class:`Fit` to begin from, or constrained values for any
                parameter, instead of the model's own initial value.
            kwargs: The model's keyword arguments.

        Raises:
            ValueError: A model, a generator or data that cannot be fitted; the message
                names the site and the remedy.
        """
        require_key(rng_key)
        given = None if init_params is None else params_of(init_params)
        state = self._start(rng_key, Arguments(args, kwargs), given)
        return jax.tree.map(_as_strong_array, state)

    def template(
        self,
        rng_key: Array,
        *args: Any,
        init_params: Estimate | Params | None = None,
        **kwargs: Any,
    ) -> Any:
        """Shapes and types of :meth:`init`'s state, without annealing or fitting.

        A saved state is read into it: its leaves are ``jax.ShapeDtypeStruct``, what
        Orbax calls an abstract state.  Arguments are those of :meth:`init`.
        """
        require_key(rng_key)
        given = None if init_params is None else params_of(init_params)
        state = self._template(rng_key, Arguments(args, kwargs), given)
        return jax.tree.map(_shape_of, state)

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        init_state: Any | None = None,
        init_params: Estimate | Params | None = None,
        averaging: float | None = None,
        validation: Watchable | None = None,
        batches: Iterable | None = None,
        **kwargs: Any,
    ) -> Fit:
        """Train for ``num_steps`` updates; Ctrl-C returns what was reached.

        Args:
            rng_key: A JAX PRNG key; unused with ``init_state``, which carries its own.
            num_steps: Number of updates.
            args: The model's positional arguments.
            progress_bar: Show the loss and diagnostics, once per chunk of steps.
            init_state: Continue from here exactly as if the run had not stopped; it
                stays usable.
            init_params: A :class:`Fit` to begin from, or constrained initial values,
                instead of the model's own.
            averaging: Decay, such as 0.99, of an exponential average of the
                unconstrained parameters over the updates: ``fit.params`` are then the
                averages, and a run that goes on begins from them.
            validation: A :class:`Validation` with rows that are not trained on: the fit
                is the one that had the highest certified density there, and the history
                tells all of it.  Or a :class:`Monitor`, of a number of one's own.
            batches: An iterable with the data of every update, such as a generator or a
                data loader: tuples of positional arguments (before ``args``), single
                arrays, or dicts of keyword arguments.  A few dozen are read ahead, no
                more than ``num_steps`` in all, and the run ends with them if they are
                fewer.  Declare plates at their full size,
                ``plate("rows", num_rows, subsample_size=len(batch))``, so that a batch
                stands for all rows.  The maximum is not judged at the end, for which
                all rows would be needed.
            kwargs: The model's keyword arguments.

        Raises:
            NonFiniteError: A step gave a NaN or an infinity; its ``fit`` holds the last
                good state.
        """
        data: Data = SameData(Arguments(args, kwargs))
        if batches is not None:
            data = Batches(batches, Arguments(args, kwargs), num_steps)
        if init_state is None:
            init_state = self.init(
                rng_key,
                *data.arguments.args,
                init_params=init_params,
                **data.arguments.kwargs,
            )
        _require_state(init_state)
        init_state = self._resume(init_state)

        # Train
        averaged = None if averaging is None else Averaging(self, _decay(averaging))
        watch = None
        if validation is not None:
            params = self.get_params(init_state)
            watch = validation.bound_to(self.model, params, data.arguments)
        fit = run(
            self if averaged is None else averaged,
            init_state if averaged is None else averaged.begin(init_state),
            num_steps,
            data,
            progress_bar=progress_bar,
            watch=watch,
        )

        # Judge
        found = [] if watch is None else list(watch.findings(fit.history))
        try:
            found += self._findings(fit, init_state, data.arguments, batches is None)
        except Warning:
            raise
        except Exception as error:  # a check that fails must not cost the run
            reason = f"{type(error).__name__}: {error}"
            found.append(Finding(f"The run ended, but could not be checked: {reason}"))
        return told(fit, found)

    def get_params(self, state: Any) -> Params:
        """Constrained values at the model's ``param`` and unobserved sample sites."""
        return constrain(state.transforms, state.params)


def _require_state(init_state: Any) -> None:
    if isinstance(init_state, OnlyParameters):
        raise ValueError(
            "The fit was read for its model alone, without the state of its "
            f"{init_state.backend} run. Read it for the backend, ebm_ppl.load(path, "
            "backend, *args), or begin at its parameters: init_params=fit."
        )
    if isinstance(init_state, Estimate):
        raise TypeError(
            "init_state is a Fit; expected its state: init_state=fit.state."
        )


def _decay(averaging: float) -> float:
    if not 0.0 < averaging < 1.0:
        raise ValueError(
            f"averaging = {averaging}; expected a decay between 0 and 1, such as 0.99."
        )
    return float(averaging)


def _as_strong_array(leaf: Any) -> Array:
    """Arrays of fixed type, so that the second update finds the first one's program."""
    if isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return lax.convert_element_type(leaf, jnp.result_type(leaf))


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
