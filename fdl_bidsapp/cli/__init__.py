"""The two commands: fdl-bidsapp (the BIDS App) and fdl (the toolbox)."""
