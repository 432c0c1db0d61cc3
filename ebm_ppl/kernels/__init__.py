"""Markov kernels that know their own log weights."""
