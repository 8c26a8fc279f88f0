"""What was trained, over what: an adapter with its basis and its base, opened and checked once, whoever asks."""
