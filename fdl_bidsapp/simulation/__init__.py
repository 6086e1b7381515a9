"""Simulated heads, contrasts and the demonstration dataset."""
