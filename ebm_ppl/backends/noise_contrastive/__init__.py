"""Noise-contrastive estimation: energies fitted by telling data from noise."""
