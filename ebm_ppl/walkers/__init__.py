"""Walkers of one energy site: placed, switched, moved, sampled."""
