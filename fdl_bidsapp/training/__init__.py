"""Losses, data, training loop, evaluation."""
