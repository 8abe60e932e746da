"""Anthropic's routes, as its official client uses them: messages, and the count of their tokens."""
