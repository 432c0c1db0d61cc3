"""Estimators of the score of a generator's density."""
