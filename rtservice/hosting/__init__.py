"""From `--protocol` and its options to a factory. No reactor is needed."""
