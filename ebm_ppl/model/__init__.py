"""NumPyro models with energies: run, bound to data, inspected."""
