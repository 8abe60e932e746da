"""From logits to tokens: a pure function of the logits and of (seed, sample, position), without a generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mdi.core.batch import LogitAdjustment, Token, TokenSampling

FIRST_CANDIDATES = 1024
"""Likeliest tokens that are sorted first. The whole vocabulary is sorted only when the draw is not among them."""


def sample(logits: Tensor, samplings: Sequence[TokenSampling]) -> tuple[Token, ...]:
    """Draws one token for each row. logits: [rows, vocab_size] in any float dtype; samplings: one for each row.

    Penalties, biases and token masks change what is drawn. The logprobs that are reported are the model's own.
    """
    logits = logits.float()
    adjusted = _adjusted(logits, samplings)
    greedy = adjusted.argmax(-1).tolist()
    picked = [
        best if sampling.temperature == 0 else _draw(row, sampling)
        for best, row, sampling in zip(greedy, adjusted, samplings, strict=True)
    ]
    chosen = logits.gather(1, torch.tensor(picked, device=logits.device)[:, None])[:, 0]
    normalisers = logits.logsumexp(-1)
    logprobs = (chosen - normalisers).tolist()
    top_logprobs = [
        _top(row, normaliser, sampling.top_logprobs) if sampling.top_logprobs else ()
        for row, normaliser, sampling in zip(logits, normalisers, samplings, strict=True)
    ]
    return tuple(map(Token, picked, logprobs, top_logprobs))


def uniform(sampling: TokenSampling) -> float:
    """A number in [0, 1) decided by seed, sample and position: Philox counters (Salmon et al., SC 2011)."""
    key = np.array([sampling.seed % 2**64, sampling.sample], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=sampling.position)).random())


def adjust(logits: Tensor, adjustment: LogitAdjustment) -> None:
    """Applies penalties and biases in place. logits: float32 [vocab_size]."""
    if adjustment.penalised_ids:
        penalised = torch.tensor(adjustment.penalised_ids, device=logits.device)
        counts = torch.tensor(adjustment.counts, dtype=logits.dtype, device=logits.device)
        values, penalty = logits[penalised], adjustment.repetition_penalty
        values = torch.where(values > 0, values / penalty, values * penalty)
        values -= adjustment.presence_penalty * (counts > 0) + adjustment.frequency_penalty * counts
        logits[penalised] = values
    if adjustment.biased_ids:
        biased = torch.tensor(adjustment.biased_ids, device=logits.device)
        logits[biased] += torch.tensor(adjustment.biases, dtype=logits.dtype, device=logits.device)


def forbid(logits: Tensor, token_mask: bytes) -> None:
    """Sets the logits of tokens that the mask does not allow to minus infinity. logits: [vocab_size].

    A mask that is shorter than the vocabulary forbids the rest: the bits are filled up with zeros.
    """
    allowed = np.unpackbits(np.frombuffer(token_mask, np.uint8), count=len(logits), bitorder="little")
    logits.masked_fill_(torch.from_numpy(allowed).to(logits.device) == 0, -torch.inf)


def _adjusted(logits: Tensor, samplings: Sequence[TokenSampling]) -> Tensor:
    if not any(sampling.adjustment or sampling.token_mask is not None for sampling in samplings):
        return logits
    adjusted = logits.clone()
    for row, sampling in zip(adjusted, samplings, strict=True):
        if sampling.adjustment:
            adjust(row, sampling.adjustment)
        if sampling.token_mask is not None:
            forbid(row, sampling.token_mask)
    return adjusted


def _top(logits: Tensor, normaliser: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, ids = logits.topk(min(count, len(logits)))
    return tuple(zip(ids.tolist(), (values - normaliser).tolist(), strict=True))


def _draw(logits: Tensor, sampling: TokenSampling) -> int:
    """Inverse transform sampling over the tokens that top-k, min-p and top-p keep, likeliest first.

    logits: float32 [vocab_size]. Filters apply in the order top-k, top-p, min-p, after temperature, as in transformers.
    """
    vocab_size = len(logits)
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < vocab_size:
        top, ids = scaled.topk(sampling.top_k)
        normaliser = top.logsumexp(0)
        return _pick(top, ids, normaliser, sampling, complete=True)
    normaliser = scaled.logsumexp(0)
    if vocab_size > FIRST_CANDIDATES:
        top, ids = scaled.topk(FIRST_CANDIDATES)
        picked = _pick(top, ids, normaliser, sampling, complete=False)
        if picked >= 0:
            return picked
    top, ids = scaled.sort(descending=True, stable=True)
    return _pick(top, ids, normaliser, sampling, complete=True)


def _pick(top: Tensor, ids: Tensor, normaliser: Tensor, sampling: TokenSampling, *, complete: bool) -> int:
    """The drawn id, or -1 where an incomplete list of candidates does not decide.

    top: scaled logits of the candidates `ids`, descending. normaliser: logsumexp over all candidates, listed or not.
    """
    probabilities = (top - normaliser).double().exp()
    cumulative = probabilities.cumsum(0)
    kept = int((cumulative - probabilities < sampling.top_p).sum())
    likely = (probabilities > 0) & (probabilities >= sampling.min_p * probabilities[0])
    kept = max(1, min(kept, int(likely.sum())))
    if complete or kept < len(top):
        target = uniform(sampling) * float(cumulative[kept - 1])
    elif sampling.top_p == 1.0 and sampling.min_p == 0.0 and uniform(sampling) < float(cumulative[-1]):
        target = uniform(sampling)  # nothing is filtered: all candidates together weigh 1, listed or not
    else:
        return -1
    index = int(torch.searchsorted(cumulative[:kept], target, right=True))
    return int(ids[min(index, kept - 1)])
