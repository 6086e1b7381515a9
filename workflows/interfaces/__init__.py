"""Thin Nipype interfaces: each loads, calls a plain function and saves."""
