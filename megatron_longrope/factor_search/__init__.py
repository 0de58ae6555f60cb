"""Search for rescale factors: space, algorithms, racing, journal and runner."""
