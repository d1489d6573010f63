"""Published benchmarks: the served agent on GTA and GAIA, in the data sets' own file formats, by their own rules."""
