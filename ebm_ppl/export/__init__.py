"""Fits as ArviZ data, and plots."""
