"""What `mdi verify` reckons; the command itself is run in tests/e2e."""

from __future__ import annotations

import numpy as np
import torch

from mdi.bench.verify import cosine


def test_the_cosine_of_many_logits_is_exact() -> None:
    """A vocabulary of 262,144 made 1.0037 of a prompt's 128 tokens."""
    one, noise = torch.randn(4, 500_000), torch.randn(4, 500_000)
    other = one + 0.1 * noise
    a, b = (part.double().flatten().numpy() for part in (one, other))
    assert abs(cosine(one, one) - 1) < 1e-12
    assert abs(cosine(one, other) - a @ b / np.sqrt(a @ a * (b @ b))) < 1e-12
