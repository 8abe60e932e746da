"""HTTP in front of the engine, and nothing else: no tensors, no model."""
