"""Energy-based models in NumPyro: declared, fitted, exported with their normalisers."""

from ebm_ppl.backends.contrastive.backend import ContrastiveDivergence
from ebm_ppl.backends.contrastive.state import ContrastiveDivergenceState
from ebm_ppl.backends.jarzynski.backend import Jarzynski
from ebm_ppl.backends.jarzynski.state import JarzynskiState
from ebm_ppl.backends.monte_carlo.backend import MonteCarloMLE
from ebm_ppl.backends.monte_carlo.state import MonteCarloMLEState
from ebm_ppl.backends.noise_contrastive.backend import NoiseContrastive
from ebm_ppl.backends.noise_contrastive.state import NoiseContrastiveState
from ebm_ppl.backends.score_matching.backend import ScoreMatching
from ebm_ppl.backends.score_matching.state import ScoreMatchingState
from ebm_ppl.backends.vera.backend import VERA
from ebm_ppl.backends.vera.latent import latent_model
from ebm_ppl.backends.vera.state import VERAState
from ebm_ppl.energy.bounded import bounded
from ebm_ppl.energy.distribution import EnergyDistribution
from ebm_ppl.energy.log_normalizer import LogNormalizer
from ebm_ppl.energy.mixture import from_sklearn
from ebm_ppl.errors import (
    NonFiniteError,
    UncertifiedNormalizerError,
    UnknownNormalizerError,
)
from ebm_ppl.export.arviz import to_arviz
from ebm_ppl.export.plots import plot_energies
from ebm_ppl.export.storage import Saved, load, save
from ebm_ppl.export.surface import plot_energy_surface
from ebm_ppl.export.training_panels import plot_training
from ebm_ppl.generators.normal import standardized_normal
from ebm_ppl.generators.scores.hmc import HMCScore
from ebm_ppl.generators.scores.importance import ImportanceScore
from ebm_ppl.generators.scores.variational import VariationalScore
from ebm_ppl.kernels.langevin import MALA, ULA
from ebm_ppl.normalizer.estimate import log_normalizer
from ebm_ppl.normalizer.fitted import fitted
from ebm_ppl.normalizer.known import normalized
from ebm_ppl.normalizer.polish import Polished, polish
from ebm_ppl.normalizer.row_density import log_density
from ebm_ppl.normalizer.score_test import ScoreTest, score_test
from ebm_ppl.normalizer.table import TabulatedNormalizer
from ebm_ppl.normalizer.tabulate import tabulate_log_normalizer
from ebm_ppl.normalizer.validation import Validation
from ebm_ppl.smc.resampling import multinomial, residual, systematic
from ebm_ppl.training.fit import Fit
from ebm_ppl.training.monitor import Monitor
from ebm_ppl.walkers.draws import sample
from ebm_ppl.walkers.state import Walkers

__version__ = "0.1.0"

__all__ = [
    "MALA",
    "ULA",
    "VERA",
    "ContrastiveDivergence",
    "ContrastiveDivergenceState",
    "EnergyDistribution",
    "Fit",
    "HMCScore",
    "ImportanceScore",
    "Jarzynski",
    "JarzynskiState",
    "LogNormalizer",
    "Monitor",
    "MonteCarloMLE",
    "MonteCarloMLEState",
    "NoiseContrastive",
    "NoiseContrastiveState",
    "NonFiniteError",
    "Polished",
    "Saved",
    "ScoreMatching",
    "ScoreMatchingState",
    "ScoreTest",
    "TabulatedNormalizer",
    "UncertifiedNormalizerError",
    "UnknownNormalizerError",
    "VERAState",
    "Validation",
    "VariationalScore",
    "Walkers",
    "bounded",
    "fitted",
    "from_sklearn",
    "latent_model",
    "load",
    "log_density",
    "log_normalizer",
    "multinomial",
    "normalized",
    "plot_energies",
    "plot_energy_surface",
    "plot_training",
    "polish",
    "residual",
    "sample",
    "save",
    "score_test",
    "standardized_normal",
    "systematic",
    "tabulate_log_normalizer",
    "to_arviz",
]
