"""BIDS in, BIDS out: finding scans, naming and writing derivatives."""
