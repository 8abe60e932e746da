"""Drawing from a vocabulary that the ranks of a group have in parts, without all logits: the tokens that these give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdi.core.batch import Token, TokenSampling
from mdi.layers.peaks import block_peaks, totals
from mdi.layers.sampler import GREEDY_TEMPERATURE, draw_among, likeliest

MAX_CANDIDATES = 1024


def n_candidates(samplings: Sequence[TokenSampling]) -> int:
    """How many of each part's likeliest tokens decide these draws; 0 where it takes all logits."""
    counts = [_n_candidates(sampling) for sampling in samplings]
    return max(counts) if all(counts) else 0


def _n_candidates(sampling: TokenSampling) -> int:
    if sampling.adjustment or sampling.token_mask is not None:
        return 0
    drawn = 1 if sampling.temperature < GREEDY_TEMPERATURE else sampling.top_k
    return max(drawn, sampling.top_logprobs) if 0 < drawn <= MAX_CANDIDATES else 0


@dataclass(frozen=True)
class Candidates:
    """What drawing needs of a part of the vocabulary, for each row: float64, on the CPU.

    highest, sums: of the part's blocks, as `block_peaks` gives them. logits, ids: those of its likeliest tokens, of
    equals the first: [rows, count]. finite: 1 where all logits of the part are finite, else 0: [rows, 1].
    """

    highest: Tensor
    sums: Tensor
    logits: Tensor
    ids: Tensor
    finite: Tensor

    @classmethod
    def of(cls, logits: Tensor, first_id: int, count: int, finite: Tensor) -> Candidates:
        """logits: [rows, part of the vocabulary] in any float dtype, finite. first_id: the part's first token."""
        rows = logits.float()
        top, ids = torch.full((2, len(rows), count), -torch.inf, dtype=torch.float64)
        for index, row in enumerate(rows):
            values, found = likeliest(row, min(count, len(row)))
            top[index, : len(values)], ids[index, : len(values)] = values.cpu(), found.cpu() + first_id
        return cls(*block_peaks(rows, [1.0] * len(rows)), top, ids, finite[:, None].double().cpu())

    @classmethod
    def merged(cls, parts: Sequence[Tensor], count: int) -> Candidates:
        """Those of the whole vocabulary. parts: what `packed` gave, in the order of their tokens."""
        fields = [cls._fields(part, count) for part in parts]
        highest, sums, logits, ids, finite = (torch.cat(each, 1) for each in zip(*fields, strict=True))
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return cls(
            highest, sums, logits.take_along_dim(order, 1), ids.take_along_dim(order, 1), finite.amin(1)[:, None]
        )

    @property
    def packed(self) -> Tensor:
        """Everything, to be sent: float64 [rows, columns]."""
        return torch.cat((self.highest, self.sums, self.logits, self.ids, self.finite), 1)

    @staticmethod
    def _fields(packed: Tensor, count: int) -> tuple[Tensor, ...]:
        n_blocks = (packed.shape[1] - 2 * count - 1) // 2
        return torch.split(packed, [n_blocks, n_blocks, count, count, 1], 1)

    def sample(self, samplings: Sequence[TokenSampling]) -> tuple[Token, ...]:
        """What `sample` gives for the logits of all parts."""
        sums = totals(self.highest, self.sums, [1.0] * len(samplings))
        return tuple(map(_sample_row, self.logits.float(), self.ids.long(), sums, samplings))


def _sample_row(logits: Tensor, ids: Tensor, total: float, sampling: TokenSampling) -> Token:
    """logits, ids: of the candidates, likeliest first. total: see `peaks`, at temperature 1."""
    picked = 0
    if sampling.temperature >= GREEDY_TEMPERATURE:
        picked = draw_among(logits[: sampling.top_k], torch.arange(len(ids)), sampling)
    normaliser = float(logits[0]) + math.log(total)
    logprobs = (logits[: sampling.top_logprobs].double() - normaliser).tolist()
    top_logprobs = tuple(zip(ids[: sampling.top_logprobs].tolist(), logprobs, strict=True))
    return Token(int(ids[picked]), float(logits[picked]) - normaliser, top_logprobs)
