"""`mdi bench`: what a model costs on these nodes, in time and in memory, and how that compares with transformers."""
