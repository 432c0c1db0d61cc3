"""Generator programs and the scores of their densities."""
