"""Nipype workflows and interfaces: thin shells around the plain functions."""
