"""Frequency-disentangled networks in torch; nothing here reads images."""
