"""Physics of the gradient echo: arrays in, arrays out."""
