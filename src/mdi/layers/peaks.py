"""The likeliest token of each row of logits, and the sum of all probabilities: block by block, then over all blocks.

A block's numbers depend on its own logits alone. So those of a vocabulary in parts are those of a whole one, bit for
bit, where parts have whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mdi.core.group import VOCABULARY_BLOCK
from mdi.kernels import vocabulary

LOWEST = -np.finfo(np.float64).max


def peaks(logits: Tensor, temperatures: Sequence[float]) -> list[tuple[int, float]]:
    """Of each row: the likeliest token, the first of equals, and the probability of all as a multiple of its own.

    logits: float32 or float64 [rows, vocab_size]. temperatures: one for each row, above 0.
    """
    highest, sums = block_peaks(logits, temperatures)
    firsts = (highest.numpy().argmax(1) * VOCABULARY_BLOCK).tolist()
    blocks = (row[first : first + VOCABULARY_BLOCK] for row, first in zip(logits, firsts, strict=True))
    likeliest = [first + int(block.cpu().numpy().argmax()) for first, block in zip(firsts, blocks, strict=True)]
    return list(zip(likeliest, totals(highest, sums, temperatures), strict=True))


def block_peaks(logits: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Of each block of each row: the highest logit, and the sum of e^((logit - highest) / temperature).

    Returns float64 [rows, blocks] each, on the CPU. A row's numbers do not depend on the others.
    """
    if vocabulary.compute(logits):
        return vocabulary.block_peaks(logits, temperatures)
    each = [_block_peaks(row, temperature) for row, temperature in zip(logits, temperatures, strict=True)]
    highest, sums = torch.stack([torch.stack(one) for one in each], dim=1).cpu()
    return highest, sums


def totals(highest: Tensor, sums: Tensor, temperatures: Sequence[float]) -> list[float]:
    """The sum of e^((logit - highest of all) / temperature) of each row, of what `block_peaks` gives."""
    heights, scale = highest.numpy(), np.array(temperatures)[:, None]
    highest_of_all = np.maximum(heights.max(1, keepdims=True), LOWEST)
    found: list[float] = (sums.numpy() * np.exp((heights - highest_of_all) / scale)).sum(1).tolist()
    return found


def _block_peaks(row: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    blocks = pad(row.double(), (0, -len(row) % VOCABULARY_BLOCK), value=-torch.inf).view(-1, VOCABULARY_BLOCK)
    highest = blocks.amax(1)
    sums = (blocks - highest.clamp_min(LOWEST)[:, None]).div_(temperature).exp_().sum(1)
    return highest, sums
