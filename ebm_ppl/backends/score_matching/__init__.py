"""Score matching: energies fitted by their derivatives, without a normaliser."""
