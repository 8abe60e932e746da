"""From logits to tokens. A pure function of the logits and of (seed, sample, position); keeps no generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mdi.core.batch import Adjustment, Draw, Token

HEAD_SIZE = 1024
"""Likeliest tokens looked at first; the whole vocabulary is sorted only when a draw falls behind them."""


def sample(logits: Tensor, draws: Sequence[Draw]) -> tuple[Token, ...]:
    """Draws one token per row. logits: [rows, vocab_size] in any float dtype; draws: one per row."""
    logits = logits.float()
    adjusted = _adjusted(logits, draws)
    greedy = adjusted.argmax(-1).tolist()
    picked = [
        best if draw.temperature == 0 else _draw(row, draw)
        for best, row, draw in zip(greedy, adjusted, draws, strict=True)
    ]
    chosen = logits.gather(1, torch.tensor(picked, device=logits.device)[:, None])[:, 0]
    normalisers = logits.logsumexp(-1)
    logprobs = (chosen - normalisers).tolist()
    tops = [
        _top(row, normaliser, draw.top_logprobs) if draw.top_logprobs else ()
        for row, normaliser, draw in zip(logits, normalisers, draws, strict=True)
    ]
    return tuple(map(Token, picked, logprobs, tops))


def uniform(draw: Draw) -> float:
    """A number in [0, 1) decided by seed, sample and position: Philox counters (Salmon et al., SC 2011)."""
    key = np.array([draw.seed % 2**64, draw.sample], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=draw.position)).random())


def adjust(logits: Tensor, adjustment: Adjustment) -> None:
    """Applies penalties and biases in place. logits: float32 [vocab_size]."""
    if adjustment.seen:
        seen = torch.tensor(adjustment.seen, device=logits.device)
        counts = torch.tensor(adjustment.counts, dtype=logits.dtype, device=logits.device)
        values, penalty = logits[seen], adjustment.repetition_penalty
        values = torch.where(values > 0, values / penalty, values * penalty)
        values -= adjustment.presence_penalty * (counts > 0) + adjustment.frequency_penalty * counts
        logits[seen] = values
    if adjustment.biased:
        biased = torch.tensor(adjustment.biased, device=logits.device)
        logits[biased] += torch.tensor(adjustment.biases, dtype=logits.dtype, device=logits.device)


def _adjusted(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    if not any(draw.adjustment for draw in draws):
        return logits
    adjusted = logits.clone()
    for row, draw in zip(adjusted, draws, strict=True):
        if draw.adjustment:
            adjust(row, draw.adjustment)
    return adjusted


def _top(logits: Tensor, normaliser: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, ids = logits.topk(min(count, len(logits)))
    return tuple(zip(ids.tolist(), (values - normaliser).tolist(), strict=True))


def _draw(logits: Tensor, draw: Draw) -> int:
    """Inverse transform sampling over the tokens that top-k, min-p and top-p keep, likeliest first.

    logits: float32 [vocab_size]. Filters apply in the order top-k, top-p, min-p, after temperature, as in transformers.
    """
    vocab_size = len(logits)
    scaled = logits / draw.temperature
    if 0 < draw.top_k < vocab_size:
        top, ids = scaled.topk(draw.top_k)
        normaliser = top.logsumexp(0)
        return _pick(top, ids, normaliser, draw, complete=True)
    normaliser = scaled.logsumexp(0)
    if vocab_size > HEAD_SIZE:
        top, ids = scaled.topk(HEAD_SIZE)
        picked = _pick(top, ids, normaliser, draw, complete=False)
        if picked >= 0:
            return picked
    top, ids = scaled.sort(descending=True, stable=True)
    return _pick(top, ids, normaliser, draw, complete=True)


def _pick(top: Tensor, ids: Tensor, normaliser: Tensor, draw: Draw, *, complete: bool) -> int:
    """The drawn id, or -1 where an incomplete list of candidates does not decide.

    top: descending scaled logits; normaliser: logsumexp of all candidates, listed or not.
    """
    probabilities = (top - normaliser).double().exp()
    cumulative = probabilities.cumsum(0)
    kept = int((cumulative - probabilities < draw.top_p).sum())
    kept = max(1, min(kept, int((probabilities >= draw.min_p * probabilities[0]).sum())))
    if complete or kept < len(top):
        target = uniform(draw) * float(cumulative[kept - 1])
    elif draw.top_p == 1.0 and draw.min_p == 0.0 and uniform(draw) < float(cumulative[-1]):
        target = uniform(draw)  # nothing is filtered: all candidates together weigh 1, listed or not
    else:
        return -1
    index = int(torch.searchsorted(cumulative[:kept], target, right=True))
    return int(ids[min(index, kept - 1)])
