"""How the bundled checkpoint was made: scenes, questions, tokenizer, training. Not part of the installed package."""

import os

# Read when torch loads: a thread that waits for others spins, but not for long on the core that draws the next batch.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
