"""Contrastive divergence: walkers without weights."""
