"""Trained bundles (safetensors) and their model cards."""
