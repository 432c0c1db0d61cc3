"""Energies inside NumPyro models: declared, fitted and exported with their normalisers."""

from ebm_ppl.arviz import to_arviz
from ebm_ppl.certificate import LogNormalizer
from ebm_ppl.distribution import EnergyDistribution
from ebm_ppl.errors import (
    NonFiniteError,
    UncertifiedNormalizerError,
    UnknownNormalizerError,
)
from ebm_ppl.generator import standardized_normal
from ebm_ppl.jarzynski import Jarzynski, JarzynskiState
from ebm_ppl.kernels import MALA, ULA
from ebm_ppl.normalized import normalized
from ebm_ppl.normalizer import log_normalizer
from ebm_ppl.plots import plot_energies, plot_energy_surface, plot_training
from ebm_ppl.refinement import latent_model
from ebm_ppl.resampling import multinomial, systematic
from ebm_ppl.sampling import sample
from ebm_ppl.score import HMCScore, ImportanceScore, VariationalScore
from ebm_ppl.training import Fit
from ebm_ppl.vera import VERA, VERAState
from ebm_ppl.walkers import Walkers

__version__ = "0.1.0"

__all__ = [
    "MALA",
    "ULA",
    "VERA",
    "EnergyDistribution",
    "Fit",
    "HMCScore",
    "ImportanceScore",
    "Jarzynski",
    "JarzynskiState",
    "LogNormalizer",
    "NonFiniteError",
    "UncertifiedNormalizerError",
    "UnknownNormalizerError",
    "VERAState",
    "VariationalScore",
    "Walkers",
    "latent_model",
    "log_normalizer",
    "multinomial",
    "normalized",
    "plot_energies",
    "plot_energy_surface",
    "plot_training",
    "sample",
    "standardized_normal",
    "systematic",
    "to_arviz",
]
