"""Search in an index. Needs no Paddle but to open a checkpoint."""
