"""Checkpoints found, checked, loaded, and run by Paddle."""
