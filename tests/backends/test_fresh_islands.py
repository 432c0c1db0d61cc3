"""Whether fresh islands may take over: draws of a known distribution, and of less."""

import jax.numpy as jnp
import numpy as np
import pytest

from ebm_ppl.backends.jarzynski.fresh_islands import (
    MAX_LOST,
    doubt,
    moments_apart,
    share_lost,
)
from ebm_ppl.smc.ensemble import Ensemble

pytestmark = pytest.mark.xdist_group("renewal")


def islands(rng, shares, dim, log_z=None, num_walkers=64, width=0.3):
    """Walkers of a normal and, by a share per island, of a narrow mode beside it."""
    shares = np.asarray(shares)
    num = len(shares), num_walkers
    is_far = rng.uniform(size=num) < shares[:, None]
    position = rng.normal(size=(*num, dim))
    position = np.where(is_far[..., None], width * position, position)
    position[..., 0] += 6.0 * is_far
    log_z = np.zeros(len(shares)) if log_z is None else log_z
    zeros = jnp.zeros(num)
    return Ensemble(jnp.asarray(position), zeros, zeros, jnp.asarray(log_z))


def of_each(rng, dim, share, fresh_share, log_z=(0.0, 0.0), noise=0.03):
    """Twelve islands that train, four held out, four fresh ones."""
    log_zs = [
        level + noise * rng.normal(size=num)
        for num, level in ((12, log_z[0]), (4, log_z[0]), (4, log_z[1]))
    ]
    all_shares = [[share] * 12, [share] * 4, [fresh_share] * 4]
    return [
        islands(rng, shares, dim, log_z)
        for shares, log_z in zip(all_shares, log_zs, strict=True)
    ]


@pytest.mark.parametrize("dim", [1, 3, 16])
def test_islands_of_the_same_energy_take_over(dim):
    rng = np.random.default_rng(dim)
    told = [doubt(*of_each(rng, dim, 0.2, 0.2)) for _ in range(100)]
    assert sum(map(bool, told)) <= 2, told


@pytest.mark.parametrize("dim", [1, 3, 16])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_part_that_is_lost(dim, share):
    """log Z says nothing of it: the share may be too small for its noise."""
    rng = np.random.default_rng(dim)
    for _ in range(20):
        training, _, fresh = groups = of_each(rng, dim, share, 0.0)
        assert "none is where" in doubt(*groups) or "elsewhere" in doubt(*groups)
        assert share_lost(training, fresh)[0] > MAX_LOST
        # A few times fewer, or more, are not none.
        fewer = islands(rng, [0.4 * share] * 4, dim)
        assert share_lost(training, fewer)[0] <= MAX_LOST


def test_what_learning_did_does_not_count():
    """Islands that train stand elsewhere, at a smaller log Z: fresh ones are right."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        groups = of_each(rng, 3, 0.6, 0.2, log_z=(-0.3, 0.0))
        assert moments_apart(groups[0], groups[2])[0]
        assert doubt(*groups) == ""
        # At a larger one, it is the fresh ones that lack something.
        groups = of_each(rng, 3, 0.6, 0.2, log_z=(0.05, 0.0))
        assert "elsewhere" in doubt(*groups)


def test_log_z_of_fresh_islands():
    rng = np.random.default_rng(0)
    groups = of_each(rng, 2, 0.2, 0.2, log_z=(0.4, 0.0))
    assert "nats under those that train" in doubt(*groups)
    groups = of_each(rng, 2, 0.2, 0.2, log_z=(0.0, 0.4))
    assert doubt(*groups) == ""
    groups = of_each(rng, 2, 0.2, 0.2, noise=1.0)
    assert "they disagree about log Z" in doubt(*groups)
    # Those that train are off by more than that, wherever they are.
    groups = of_each(rng, 2, 0.2, 0.0, log_z=(-5.0, 0.0), noise=1.0)
    assert doubt(*groups) == ""


def test_one_log_z_per_row():
    """Many rows, of which a few or all have lost a part; and a single training island."""
    rng = np.random.default_rng(0)

    def rows(shares):
        parts = [of_each(rng, 2, 0.3, share) for share in shares]
        return [
            Ensemble(
                *(
                    jnp.stack(leaves, axis)
                    for leaves, axis in zip(
                        zip(*same, strict=True), (2, 2, 2, 1), strict=True
                    )
                )
            )
            for same in zip(*parts, strict=True)
        ]

    assert doubt(*rows([0.3] * 20)) == ""
    assert doubt(*rows([0.3] * 19 + [0.0])) == ""
    assert "elsewhere" in doubt(*rows([0.3] * 10 + [0.0] * 10))
    alone = [islands(rng, [0.3], 2), islands(rng, [0.3] * 2, 2), islands(rng, [0.3], 2)]
    assert doubt(*alone) == ""
