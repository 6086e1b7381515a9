"""Segmentation of iron-rich deep nuclei from multi-echo GRE maps, as a BIDS App."""

__version__ = "0.1.0"

__all__ = ["__version__"]
