"""Which node gets which part of the model, from what the model needs and what machines can do. Loads no weights."""
