"""The HTTP server in front of the engine: routes, checks and error answers. It knows no tensors and no model."""
