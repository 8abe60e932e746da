"""Products, attention and norms in C: one shared library, found and loaded by `library`, built by `build`."""
