"""Physics of the gradient echo: arrays in, arrays out."""

GAMMA_BAR = 42.577
"""Proton gyromagnetic ratio over 2π, in MHz/T, which is Hz per tesla and ppm."""
