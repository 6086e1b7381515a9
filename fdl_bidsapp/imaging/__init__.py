"""Plain functions on images: grids, intensities, relaxometry, measures, registration."""
