"""Monte Carlo maximum likelihood: log Z by fresh draws of the base."""
