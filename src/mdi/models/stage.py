"""A stage with its KV cache: batches in, activations or tokens out. Knows no network and no requests."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mdi.core.batch import Batch, Deepstack, Result, Token, TokenSampling, Visual
from mdi.core.errors import LinkError
from mdi.core.group import Group, Rank
from mdi.core.tracing import BusyMeter, Recorder, SpanName
from mdi.layers.attention import Layout
from mdi.layers.candidates import Candidates, n_candidates
from mdi.layers.kv_cache import KVCache
from mdi.layers.rope import DecoderRope, Grid
from mdi.layers.sampler import sample
from mdi.models.shards import Shards, shard_step, vocabulary_rows, whole_blocks
from mdi.models.weights import LoadedStage

MAX_LOGIT_ROWS = 64  # logits at once: a vocabulary of 151,936 takes 0.6 MB a row


class Stage:
    """A loaded stage with its KV cache: `n_slots` rows of `sequence_length` tokens. Used by one thread at a time.

    cache_dtype: int8, or None for the stage's own. shards: parts in which the sums of the out and down products are
    taken, one after the other, where one node has them all. busy: the time that it computes. recorder: records each
    piece of work. steps, step_s: batches so far, and the seconds that they took, draws included. group: the other ranks
    where the stage is one of them; it comes and goes with the links between nodes.

    Raises ConfigError where the model cannot be cut into so many shards.
    """

    def __init__(
        self,
        loaded: LoadedStage,
        *,
        n_slots: int,
        sequence_length: int,
        cache_dtype: str | None = None,
        shards: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        config, dtype, device = loaded.config, loaded.dtype, loaded.device
        self.spec = loaded.spec
        self.config = config
        self.dtype = dtype
        self.device = device
        self.busy = BusyMeter()
        self.steps, self.step_s = 0, 0.0
        self.recorder = recorder or Recorder()
        self.group: Group | None = None
        rank = loaded.spec.rank or Rank(0, shards, shards)
        cut = Shards.of(config, rank.n_shards, shard_step(loaded.quantization))
        self._shards = cut.of_layers(config, rank) if rank.n_shards > 1 else None
        self._whole_blocks = whole_blocks(config, rank.n_shards)
        self._first_token = vocabulary_rows(config, rank).start
        self._decoder = loaded.decoder
        self._vision = loaded.vision
        self._ropes = [DecoderRope(config.head_dim, rope, device) for rope in config.ropes]
        self._cache = KVCache(
            n_layers=len(loaded.spec.layers),
            n_slots=n_slots,
            sequence_length=sequence_length,
            n_kv_heads=loaded.parts.config.n_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.int8 if cache_dtype == "int8" else dtype,
            device=device,
        )

    def embed(self, token_ids: Tensor, visuals: Sequence[Visual] = ()) -> Tensor:
        """Token embeddings, with those of media in place of the placeholders.

        token_ids: int64 [tokens] -> [tokens, hidden_size] in the stage's dtype.
        """
        hidden = self._decoder.embed(token_ids)
        for visual in visuals:
            embeddings = visual.embeddings[:, : self.config.hidden_size]
            hidden[visual.row : visual.row + len(embeddings)] = embeddings
        return hidden

    @torch.inference_mode()
    def run(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Runs the stage's layers: hidden [tokens, hidden_size] -> the same. Writes the cache."""
        started_s = time.perf_counter()
        with self.working("prefill" if batch.prefills else "decode", batch.id, batch.n_tokens):
            out = self.forward(batch, hidden)
        self.steps += 1
        self.step_s += time.perf_counter() - started_s
        return out

    @torch.inference_mode()
    def sample(self, batch: Batch, hidden: Tensor) -> Result | None:
        """Draws a token for each of the batch's samplings, from the output of `run`. Needs the head.

        In a group rank 0 draws; the others give it what it needs of their part of the logits, and None is returned.
        """
        started_s = time.perf_counter()
        with self.working("sample"):
            rows, samplings, finite = batch.sampled_rows, batch.samplings, _finite_rows(hidden)
            tokens = list[Token]()
            for first in range(0, len(rows), MAX_LOGIT_ROWS):
                part = rows[first : first + MAX_LOGIT_ROWS]
                logits = self._decoder.logits(hidden[part])
                drawn, sound = self._draw(logits, samplings[first : first + MAX_LOGIT_ROWS])
                tokens += drawn
                finite[part] &= sound
        self.step_s += time.perf_counter() - started_s
        return Result(batch.id, tuple(tokens), _overflowed(batch, finite)) if self._leads else None

    @property
    def _leads(self) -> bool:
        return self.spec.rank is None or self.spec.rank.leads

    def _draw(self, logits: Tensor, samplings: Sequence[TokenSampling]) -> tuple[Sequence[Token], Tensor]:
        """A token for each row, and whether its logits are finite. No token where rank 0 draws.

        logits: [rows, own part of the vocabulary].
        """
        count = n_candidates(samplings) if self.group and self._whole_blocks else 0
        if self.group and count:
            return self._draw_from_candidates(self.group, logits, samplings, count)
        if self.group:
            parts = self.group.gather(logits.cpu())
            if parts is None:
                return (), _finite_rows(logits)
            logits = torch.cat(parts, 1).to(self.device)
        finite = _finite_rows(logits)
        return sample(_made_finite(logits, finite), samplings), finite

    def _draw_from_candidates(
        self, group: Group, logits: Tensor, samplings: Sequence[TokenSampling], count: int
    ) -> tuple[Sequence[Token], Tensor]:
        finite = _finite_rows(logits)
        own = Candidates.of(_made_finite(logits, finite), self._first_token, count, finite)
        parts = group.gather(own.packed)
        if parts is None:
            return (), finite
        candidates = Candidates.merged(parts, count)
        return candidates.sample(samplings), candidates.finite[:, 0].bool().to(self.device)

    @contextmanager
    def working(self, name: SpanName, batch_id: int = -1, n_tokens: int = 0) -> Iterator[None]:
        """The time of the body counts as work of this stage."""
        with self.busy, self.recorder.span(name, batch_id, n_tokens):
            yield

    @torch.inference_mode()
    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Logits of every token of the batch, for comparisons: [tokens, own part of the vocabulary]. Needs the head."""
        return self._decoder.logits(self.forward(batch, hidden))

    def forward(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The stage's layers alone: [tokens, hidden_size] -> [tokens, hidden_size].

        In a group rank 0 gives the batch to the others, which get it from `Group.follow`.
        Raises LinkError for a batch that names rows that the cache does not have: kernels trust what they are given.
        """
        self._check(batch, hidden)
        if self.group and self._leads:
            self.group.lead(batch, hidden.cpu())
        for edit in batch.edits:
            self._cache.apply(edit)
        layout = Layout.of(batch.slices, self.device)
        positions = batch.positions.to(self.device)
        rotations = [rope(positions) for rope in self._ropes]
        hidden = hidden.to(self.device)
        deepstack = batch.deepstack.to(self.device) if batch.deepstack else None
        return self._decoder.forward(
            hidden, rotations, self._cache, layout, self.group, shards=self._shards, deepstack=deepstack
        )

    def _check(self, batch: Batch, hidden: Tensor) -> None:
        if self.spec.rank and self.group is None:
            raise LinkError("got a batch, but has no link to the other ranks of its group")
        tokens, shapes = batch.n_tokens, (tuple(hidden.shape), tuple(batch.positions.shape))
        if shapes != ((tokens, self.config.hidden_size), (3, tokens)):
            raise LinkError(f"got hidden states and positions of shapes {shapes} for {tokens} tokens")
        if batch.deepstack:
            self._check_deepstack(batch.deepstack, tokens)
        cache = self._cache
        for part in batch.slices:
            inside = 0 <= part.slot < cache.n_slots and 0 <= part.start < part.end <= cache.sequence_length
            if not inside:
                raise LinkError(
                    f"got tokens {part.start} to {part.end} of slot {part.slot}, but has {cache.n_slots} slots of "
                    f"{cache.sequence_length} tokens"
                )

    def _check_deepstack(self, deepstack: Deepstack, tokens: int) -> None:
        rows, features, first = deepstack.rows, deepstack.features, deepstack.first_layer
        layers_fit = first == self.spec.first_layer and 0 < len(features) <= self.config.n_layers - first
        rows_fit = len(rows) and rows[0] >= 0 and rows[-1] < tokens and bool((rows.diff() > 0).all())
        if not layers_fit or not rows_fit or features.shape[1:] != (len(rows), self.config.hidden_size):
            raise LinkError(
                f"got features of shape {tuple(features.shape)} for {len(rows)} rows of {tokens}, from layer {first} on"
            )

    def encode_steps(self, rows: Tensor, grid: Grid) -> Generator[None, None, Tensor]:
        """`VisionTower.encode_steps` of this stage's tower. Needs the tower."""
        assert self._vision is not None
        return self._vision.encode_steps(rows, grid)


def deepstack_of(visuals: Sequence[Visual], hidden_size: int) -> Deepstack | None:
    """What a tower's rows have beside embeddings, for a batch with these visuals; None where they have nothing."""
    if not visuals or visuals[0].embeddings.shape[1] == hidden_size:
        return None
    rows = [torch.arange(visual.row, visual.row + len(visual.embeddings)) for visual in visuals]
    features = torch.cat([visual.embeddings[:, hidden_size:] for visual in visuals])  # [visual tokens, layers x width]
    by_layer = features.view(len(features), -1, hidden_size).transpose(0, 1).contiguous()
    return Deepstack(torch.cat(rows), by_layer)


def _finite_rows(rows: Tensor) -> Tensor:
    """Whether all numbers of each row are finite: bool [rows]."""
    if rows.sum(dtype=torch.float32).isfinite():
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return rows.isfinite().all(-1)  # a sum of finite numbers may be infinite: then each is looked at


def _made_finite(logits: Tensor, finite: Tensor) -> Tensor:
    """The same logits where all are finite. finite: whether those of each row are."""
    return logits if finite.all() else logits.nan_to_num()


def _overflowed(batch: Batch, finite: Tensor) -> tuple[int, ...]:
    """The slices with numbers that are infinite or none. finite: whether those of each row are."""
    if finite.all():
        return ()
    parts = torch.split(finite, [part.length for part in batch.slices])
    return tuple(index for index, part in enumerate(parts) if not part.all())
