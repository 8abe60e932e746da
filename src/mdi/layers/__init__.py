"""What every family computes with: products, attention, positions, caches, sampling. Knows no model, no request."""
