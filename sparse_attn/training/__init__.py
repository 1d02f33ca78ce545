"""Training. Not part of the published archive: nothing at run time imports it."""
