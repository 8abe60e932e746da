"""From logits to tokens: a pure function of the logits and of (seed, sample, position), without a generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mdi.core.batch import LogitAdjustment, Token, TokenSampling
from mdi.kernels import vocabulary
from mdi.layers.peaks import peaks

FIRST_CANDIDATES = 1024
"""Likeliest tokens that are sorted first. The whole vocabulary is sorted only when the draw is not among them."""

CHANGES = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
CHANGES = CHANGES.astype(np.float32)
"""For each byte of a token mask, what is added to the logits of its eight tokens."""

GREEDY_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: bfloat16 and float16 logits that differ at all differ by more."""


def sample(logits: Tensor, samplings: Sequence[TokenSampling]) -> tuple[Token, ...]:
    """Draws one token for each row. logits: [rows, vocab_size] in any float dtype; samplings: one for each row.

    Penalties, biases and token masks change what is drawn. The logprobs that are reported are the model's own.
    """
    rows = logits.float()
    return tuple(map(_sample_row, rows, peaks(rows, [1.0] * len(rows)), samplings))


def _sample_row(logits: Tensor, peak: tuple[int, float], sampling: TokenSampling) -> Token:
    """logits: float32 [vocab_size]. peak: theirs, at temperature 1."""
    highest, total = peak
    adjusted = _adjusted(logits, sampling)
    if sampling.temperature >= GREEDY_TEMPERATURE:
        picked = _draw(adjusted, sampling)
    elif adjusted is logits:
        picked = highest
    else:
        picked = int(adjusted.cpu().numpy().argmax())  # ten times as fast as torch's
    normaliser = float(logits[highest]) + math.log(total)
    top_logprobs = _top(logits, normaliser, sampling.top_logprobs) if sampling.top_logprobs else ()
    return Token(picked, float(logits[picked]) - normaliser, top_logprobs)


def uniform(sampling: TokenSampling) -> float:
    """A number in [0, 1) decided by seed, sample and position: Philox counters (Salmon et al., SC 2011)."""
    key = np.array([sampling.seed % 2**64, sampling.sample], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=sampling.position)).random())


def adjust(logits: Tensor, adjustment: LogitAdjustment) -> None:
    """Applies penalties and biases in place. logits: float64 [vocab_size]: no penalty makes one infinite."""
    if adjustment.penalised:
        ids, often = _penalised(adjustment, len(logits))
        penalised, counts = torch.from_numpy(ids).to(logits.device), torch.from_numpy(often).to(logits)
        values, penalty = logits[penalised], adjustment.repetition_penalty
        largest = torch.finfo(logits.dtype).max
        values = torch.where(values > 0, values / penalty, values * penalty).clamp_(-largest, largest)
        values -= adjustment.presence_penalty * (counts > 0) + adjustment.frequency_penalty * counts
        logits[penalised] = values
    if adjustment.biased_ids:
        biased = torch.tensor(adjustment.biased_ids, device=logits.device)
        logits[biased] += torch.tensor(adjustment.biases, dtype=logits.dtype, device=logits.device)


def _penalised(adjustment: LogitAdjustment, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that are penalised, int64, and how often each is in the answer, float64."""
    ids = np.flatnonzero(_unpacked(adjustment.penalised, vocab_size))
    counts = np.zeros(vocab_size)
    counts[np.frombuffer(adjustment.counted_ids, "<u4")] = np.frombuffer(adjustment.counts, "<u4")
    return ids, counts[ids]


def _unpacked(bits: bytes, vocab_size: int) -> np.ndarray:
    """A set of tokens (see `token_bits`) as uint8 [vocab_size]."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=vocab_size, bitorder="little")


def forbid(logits: Tensor, token_mask: bytes) -> Tensor:
    """The logits, those of tokens that the mask does not allow at minus infinity. logits: finite, [vocab_size].

    A mask that is shorter than the vocabulary forbids the rest.
    """
    bits = np.frombuffer(token_mask, np.uint8)[: -(-len(logits) // 8)]
    changes = np.full((-(-len(logits) // 8), 8), -np.inf, np.float32)
    np.take(CHANGES, bits, axis=0, out=changes[: len(bits)], mode="clip")
    return torch.from_numpy(changes.reshape(-1)[: len(logits)]).to(logits).add_(logits)


def _adjusted(logits: Tensor, sampling: TokenSampling) -> Tensor:
    """The logits after penalties, biases and mask; the same tensor where there are none."""
    if sampling.adjustment:
        logits = logits.double()
        adjust(logits, sampling.adjustment)
    if sampling.token_mask is not None:
        logits = forbid(logits, sampling.token_mask)
    return logits


def _top(logits: Tensor, normaliser: float, count: int) -> tuple[tuple[int, float], ...]:
    values, ids = likeliest(logits, min(count, len(logits)))
    return tuple(zip(ids.tolist(), (values.double() - normaliser).tolist(), strict=True))


def _draw(logits: Tensor, sampling: TokenSampling) -> int:
    """Inverse transform sampling over the tokens that top-k, min-p and top-p keep, likeliest first.

    logits: [vocab_size]. Filters apply in the order top-k, top-p, min-p, after temperature, as in transformers.
    """
    vocab_size = len(logits)
    if 0 < sampling.top_k < vocab_size:
        top, ids = likeliest(logits, sampling.top_k)
        return draw_among(top, ids, sampling)
    [(_, total)] = peaks(logits[None], [sampling.temperature])
    if vocab_size > FIRST_CANDIDATES:
        top, ids = likeliest(logits, FIRST_CANDIDATES)
        weights = _weights(top, top[0], sampling.temperature)
        picked = _pick(weights, ids, total, sampling, complete=len(top) < FIRST_CANDIDATES)
        if picked >= 0:
            return picked
    top, ids = logits.sort(descending=True, stable=True)
    return _pick(_weights(top, top[0], sampling.temperature), ids, total, sampling, complete=True)


def draw_among(logits: Tensor, ids: Tensor, sampling: TokenSampling) -> int:
    """The drawn one of these tokens alone. logits: theirs, descending."""
    weights = _weights(logits, logits[0], sampling.temperature)
    return _pick(weights, ids, float(weights.sum()), sampling, complete=True)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest logits and their ids, as a stable sort of all has them: equal ones in the order of their ids.

    Fewer than `count` where the others are minus infinity: forbidden.
    """
    if vocabulary.compute(logits):
        ids = vocabulary.highest(logits, count)
    else:
        lowest = logits.topk(count).values[-1]
        ids = ((logits >= lowest) & (logits > -torch.inf)).nonzero()[:, 0]
    top, order = logits[ids].sort(descending=True, stable=True)
    return top[:count], ids[order[:count]]


def _weights(logits: Tensor, highest: Tensor, temperature: float) -> Tensor:
    """Probabilities as multiples of the likeliest token's, in float64. highest: that token's logit."""
    return (logits.double() - highest).div_(temperature).exp_()


def _pick(weights: Tensor, ids: Tensor, total: float, sampling: TokenSampling, *, complete: bool) -> int:
    """The drawn id, or -1 where an incomplete list of candidates does not decide.

    weights: of the candidates `ids`, descending from 1. total: of all candidates, listed or not.
    """
    cumulative = weights.cumsum(0)
    kept = 1 + int((cumulative[:-1] < sampling.top_p * total).sum())
    kept = max(1, min(kept, int(((weights > 0) & (weights >= sampling.min_p)).sum())))
    if complete or kept < len(weights):
        target = uniform(sampling) * float(cumulative[kept - 1])
    elif sampling.top_p == 1.0 and sampling.min_p == 0.0 and uniform(sampling) * total < float(cumulative[-1]):
        target = uniform(sampling) * total  # nothing is filtered: all candidates count, listed or not
    else:
        return -1
    index = int(torch.searchsorted(cumulative[:kept], target, right=True))
    return int(ids[min(index, kept - 1)])
