"""Energies as distributions, and what tells one energy from another."""
