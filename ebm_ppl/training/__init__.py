"""The training loop that every backend shares."""
