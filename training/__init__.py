"""How the bundled checkpoint was made: scenes, questions, tokenizer, training. Not part of the installed package."""

import os

# Read when torch loads: a thread that waits for others must not spin on the core that draws the next batch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
