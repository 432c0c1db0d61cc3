"""Fits as ArviZ data: ``InferenceData`` on ArviZ 0.23, ``DataTree`` on 1.x.

The only module that knows ArviZ.  ArviZ and xarray are imported inside functions: they
cost seconds.
"""

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.export.attributes import warn_of_flags
from ebm_ppl.export.contents import contents_of
from ebm_ppl.export.fit import fit_groups
from ebm_ppl.export.groups import Group, sizes_of, without_masked
from ebm_ppl.export.parameters import parameter_groups
from ebm_ppl.export.posterior import add_draws, draws_groups
from ebm_ppl.model.program import Model
from ebm_ppl.normalizer.score_test import ScoreTest
from ebm_ppl.programs.arguments import Arguments
from ebm_ppl.training.fit import Fit

if TYPE_CHECKING:
    if sys.version_info >= (3, 12):
        from xarray import DataTree as ArvizData
    else:
        from arviz import InferenceData as ArvizData
else:
    ArvizData = Any


def to_arviz(
    source: Fit | Mapping[str, Any],
    model: Model,
    *args: Any,
    log_normalizer: LogNormalizer | None = None,
    draws: Mapping[str, Any] | None = None,
    score_test: ScoreTest | None = None,
    allow_uncertified: bool = False,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> ArvizData:
    """Export a fit, or posterior draws of an energy's parameters.

    A :class:`Jarzynski` fit has walkers as draws and islands as chains:

    - ``posterior_predictive``: draws of x with equal weights, each island resampled on
      its own (duplicates adjacent).
    - ``sample_stats``: of the *weighted* walkers: ``log_weight``, ``energy``,
      ``energy_<factor>`` where factors are named, and ``ancestor``, the walker that
      each draw of ``posterior_predictive`` is a copy of.  The groups' attributes say
      so: ``draws_are_weighted`` (1 or 0), ``draws``, and ``log_weights`` (where these
      are).
    - ``islands``: ``ess`` and Pareto ``khat`` of every island's weights, and which were
      ``held_out``.
    - ``observed_data``: the data at observed sites, every plate at its full size, and
      nothing else.  What a mask leaves out is NaN.
    - ``training``: ``Fit.history`` over ``step``.

    A :class:`VERA` fit has 4 × 1,000 independent draws of its generator (or ``draws``),
    ``sample_stats`` with their energies, and no ``islands``; its attributes hold
    ``entropy_weight`` and the running ``log_normalizer_bound``, and no log Z unless one
    is given.

    A :class:`MonteCarloMLE` fit has 16 × 1,000 fresh draws of its base with their
    weights, in the groups of a Jarzynski fit; no island is held out.

    A point fit has no posterior draws of the parameters, so there is no ``posterior``
    and no ``log_likelihood`` (LOO needs both): ``parameters`` holds their values, and
    ``standard_errors`` and ``distances`` (from the maximum of the likelihood, in
    standard errors) what a ``score_test`` found; the attribute ``findings`` holds what
    the run warned of when it ended.  With a ``log_normalizer`` the data's
    normalised mean log density goes to the attributes.  With several energy sites,
    variables that every site has end in ``_<site>``.

    Posterior draws, a dict of arrays ``(chain, draw, ...)``, give ``posterior``,
    ``observed_data`` and, with a ``log_normalizer`` of the same draws
    (``batch_ndims=2``), ``log_likelihood``.  Rows that a mask leaves out are absent
    from that, so that LOO does not count them; coordinates say which rows are left.  A
    mask over several plates that leaves no whole slices out gives one dimension
    ``<site>_row``, with ``<site>_<plate>`` along it.

    Names are the model's, but for two: a slash becomes a dot, and a name that is then
    taken (by another one, or by ``chain``, ``draw`` and ``step``) gets an underscore.

    A number that rests on a log Z with flags is left out, and a warning says why.

    Args:
        source: From :meth:`Jarzynski.run` or :meth:`VERA.run`, or parameter draws by
            site name.
        model: The model that was fitted.
        args: Its positional arguments.
        log_normalizer: From :func:`log_normalizer` at ``fit.params`` or at the draws.
            Without it there are no normalised numbers; a Jarzynski fit's attributes
            then hold the running held-out log Z with its flags.
        draws: Draws of x by site name, ``(chain, draw, ...)``, from :func:`sample`:
            ``posterior_predictive`` is then made of them.
        score_test: From :func:`score_test` at ``fit.params``; its verdict goes to the
            attributes ``is_at_maximum``, ``gain_per_row`` and ``score_test_flags``.
        allow_uncertified: Write numbers that rest on an uncertified log Z; the flags go
            to the attributes.
        coords: Coordinate values by dimension name, plates' included.
        dims: Names of an event's dimensions by site name, and of a parameter's (of
            every leaf, where it is a tree); ``<name>_dim_<k>`` otherwise.
        kwargs: The model's keyword arguments.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.23) or ``xarray.DataTree`` (1.x); ``to_netcdf``
        works on both.

    Raises:
        ValueError: ``log_normalizer`` lacks a site; it or ``score_test`` belongs to
            other parameters; ``dims`` or ``coords`` hold unknown names or do not fit; a
            mask differs from draw to draw.
    """
    import xarray as xr

    arguments = Arguments(args, kwargs)
    held = contents_of(source, model, arguments, log_normalizer, draws, dims)
    usable = log_normalizer is not None and (
        log_normalizer.is_certified or allow_uncertified
    )

    if isinstance(source, Fit):
        groups, attributes = fit_groups(source, held, log_normalizer, usable)
        tested, verdict = parameter_groups(held, score_test)
        groups, attributes = groups | tested, attributes | verdict
    elif score_test is not None:
        raise ValueError("score_test is of a point fit, and the source is draws.")
    else:
        groups, attributes = draws_groups(
            model, arguments, held, log_normalizer, usable
        )
    if log_normalizer is not None and not usable:
        warn_of_flags(
            log_normalizer,
            "mean_log_density" if isinstance(source, Fit) else "log_likelihood",
        )

    add_draws(groups.setdefault("posterior_predictive", Group()), held)
    groups["observed_data"] = Group()
    for name, found in held.data.items():
        where = (*held.naming.rows(name, found), *held.event_dims[name])
        groups["observed_data"].variables[held.naming.variables[name]] = (
            where,
            without_masked(found),
        )

    groups = {name: group for name, group in groups.items() if group.variables}
    written = held.naming.dimensions.coordinates(coords, sizes_of(groups))
    tree = xr.DataTree.from_dict(
        {name: _dataset(xr, group, written) for name, group in groups.items()}
    )
    tree.attrs.update(attributes)
    if importlib.metadata.version("arviz") < "1":
        import arviz

        return arviz.InferenceData.from_datatree(tree)
    return tree


def _dataset(xr: Any, group: Group, coords: Mapping[str, Sequence]) -> Any:
    def along(dim: str, places: np.ndarray) -> np.ndarray:
        return np.asarray(coords[dim])[places] if dim in coords else places

    # Plots of ArviZ 1.x fail on dimensions without coordinates.
    index: dict[str, Any] = {}
    for dims, values in group.variables.values():
        for dim, size in zip(dims, values.shape, strict=True):
            if dim in group.places:
                index[dim] = along(*group.places[dim])
            elif dim in coords and len(coords[dim]) == size:
                index[dim] = np.asarray(coords[dim])
            else:
                index[dim] = np.arange(size)
    for name, (dim, plate, places) in group.labels.items():
        index[name] = (dim, along(plate, places))
    return xr.Dataset(group.variables, attrs=group.attrs).assign_coords(index)
