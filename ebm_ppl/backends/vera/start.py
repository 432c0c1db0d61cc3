"""The first state of a VERA run."""

from collections.abc import Callable
from typing import Any

from jax import Array, random
from numpyro.distributions.transforms import Transform

from ebm_ppl.backends.vera.defensive import (
    MAX_ROWS,
    Defence,
    RowKernels,
    kernels_of,
)
from ebm_ppl.backends.vera.first_score import fit_first_score
from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.energy.start import starting_coordinates
from ebm_ppl.generators.inspection import inspect_generator
from ebm_ppl.generators.program import Generator
from ebm_ppl.model.bound import BoundModel
from ebm_ppl.model.inspection import inspect_model
from ebm_ppl.model.program import Params
from ebm_ppl.normalizer.rows import data_rows
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.optimizers import check_on_params


def first_state(
    backend: Any,
    rng_key: Array,
    arguments: Arguments,
    init_params: Params | None,
    run: Callable[[Callable[[], Any]], Any],
) -> VERAState:
    """Check model and generator on the data, and make the first state.

    Args:
        backend: A :class:`VERA`.
        rng_key: A JAX PRNG key.
        arguments: The model's arguments.
        init_params: Constrained initial values.
        run: Calls what takes time, or asks for its shapes alone.

    Raises:
        ValueError: A model or a generator that cannot be fitted.

    One body: what is found on the way makes the state.
    """
    key_model, key_generator, key_score, key_next = random.split(rng_key, 4)
    found = inspect_model(key_model, backend.model, arguments, init_params=init_params)
    if len(found.energies) != 1:
        raise ValueError(
            "VERA has one generator, and the model has energy sites "
            f"{sorted(found.energies)}. Fit them one by one, or together with "
            "Jarzynski."
        )

    ((name, distribution),) = found.energies.items()
    if distribution.batch_shape:
        raise ValueError(
            f"Energy site '{name}' has batch shape {distribution.batch_shape}, one "
            "normaliser per element, but the generator draws for one. Move it "
            "into the event (.to_event), or fit with Jarzynski."
        )

    generator, generator_params = inspect_generator(
        key_generator, backend.generator, name, distribution
    )
    check_on_params("optim", backend.optim, found.params)
    check_on_params("generator_optim", backend.generator_optim, generator_params)
    bound_model = BoundModel(backend.model, found.transforms, key_model, arguments)
    score_state, elbo = run(
        lambda: fit_first_score(
            backend.score_of(generator),
            backend.num_particles,
            key_score,
            bound_model,
            generator,
            found.params,
            generator_params,
        )
    )

    coordinates = starting_coordinates(distribution, name)
    defence = None
    if backend.defensive:
        kernels = _kernels(bound_model, found.params, generator, coordinates)
        defence = Defence(kernels, elbo)

    return VERAState(
        params=found.params,
        transforms=found.transforms,
        optim_state=backend.optim.init(found.params),
        generator=generator,
        generator_params=generator_params,
        generator_optim_state=backend.generator_optim.init(generator_params),
        score_state=score_state,
        coordinates=coordinates,
        log_normalizer_bound=elbo,
        defence=defence,
        rng_key=key_next,
        entropy_weight=backend.entropy_weight,
        gradient_penalty=backend.gradient_penalty,
    )


def _kernels(
    bound: BoundModel, params: Params, generator: Generator, coordinates: Transform
) -> RowKernels:
    """Where defensive draws come from.

    Raises:
        ValueError: A generator whose density at other values is not known, or no data.
    """
    if generator.latents and not generator.is_normal:
        raise ValueError(
            "defensive=True needs the generator's density at draws around data rows, "
            "whose latents are found where the generator is normal given them. Use "
            "ebm_ppl.standardized_normal for x, or a flow without latents."
        )
    rows = data_rows(bound, bound.constrain(params), MAX_ROWS)
    if generator.name not in rows:
        raise ValueError(
            f"defensive=True draws around the data rows of energy site "
            f"'{generator.name}', which has none that are finite and in the support."
        )
    return kernels_of(rows[generator.name], coordinates)
