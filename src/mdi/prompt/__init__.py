"""From messages to what the model reads, and from token ids back to text. Knows no slots, batches or nodes."""
