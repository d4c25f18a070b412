"""Errors, log, options, outputs, what a text is, probabilities: no file of data, no model."""
