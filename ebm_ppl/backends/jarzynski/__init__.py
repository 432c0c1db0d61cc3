"""Weighted walkers (Carbone et al. 2023)."""
