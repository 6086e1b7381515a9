"""Nipype workflows and interfaces: thin shells around the plain functions."""

import os

# Nipype asks a server for its latest version when the first interface is made; nothing in this
# package uses the network.
os.environ.setdefault("NIPYPE_NO_ET", "1")
