"""Annealed sequential Monte Carlo: weights, islands, paths and passes."""
