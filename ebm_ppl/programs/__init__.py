"""What a compiled program depends on: callables and arguments, told apart by content."""
