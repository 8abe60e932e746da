"""The models that are computed here, as configs, tensor names and mathematics. Knows no files, nodes or requests."""
