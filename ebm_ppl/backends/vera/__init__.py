"""A generator in place of Markov chains (Grathwohl et al. 2021)."""
