"""Compares this system with transformers: one prompt through both, and the difference.

Each side renders, tokenises, preprocesses and computes by itself. Here the model runs as `n_nodes` stages in this
process, exactly as nodes run them.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdi.bench.peers import ANY_FILE, Transformers
from mdi.checkpoint.generation import end_ids
from mdi.checkpoint.loader import chunk_weights, load_chunk, load_source
from mdi.checkpoint.prepare import prepared
from mdi.checkpoint.processing import media_specs
from mdi.checkpoint.source import Source
from mdi.core.batch import Batch, Slice, TokenSampling, Visual
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.kernels.threads import set_threads
from mdi.models.shards import Shards
from mdi.models.stage import Stage, deepstack_of
from mdi.models.weights import LoadedStage
from mdi.planning.plan import make_plan
from mdi.prompt.assembly import Prompt
from mdi.prompt.builder import PromptBuilder
from mdi.prompt.tokenizer import Tokenizer
from mdi.prompt.vocabulary import check_vocabulary

CHUNK = 512
GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)


@dataclass(frozen=True)
class Report:
    """Result of a comparison.

    differences: per prompt position, the largest absolute logit difference over the vocabulary.
    relative: the largest difference over the largest logit. cosine: of all logits. ours, theirs: greedy answers as
    token ids. text: of ours, special tokens included: boxes of grounding answers stand in them.
    """

    same_prompt: bool
    differences: tuple[float, ...]
    relative: float
    cosine: float
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    text: str

    @property
    def first_difference(self) -> int | None:
        """Index of the first differing token; None where the answers are equal."""
        pairs = zip(self.ours, self.theirs, strict=False)
        unequal = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
        if unequal is None and len(self.ours) != len(self.theirs):
            return min(len(self.ours), len(self.theirs))
        return unequal


def verify(
    source: Source,
    messages: Sequence[dict[str, Any]],
    *,
    dtype: str,
    quantization: ModelQuantization = UNQUANTIZED,
    n_nodes: int = 1,
    shards: int = 1,
    max_tokens: int = 16,
) -> Report:
    """Runs both and compares. Memory: both models at once, in `dtype`.

    A quantised model is compared with the numbers that its weights stand for, in float32. shards: of every weight, as
    groups share them: a group has the bits of one node with as many. Raises ConfigError for more than the model has.
    """
    Shards.of(source.model_config, shards)
    with torch.inference_mode():
        loaded, theirs = _loaded(source, dtype, quantization, n_nodes)
        their_ids, their_logits = theirs.read(messages)
        their_answer = theirs.answer(messages, max_tokens)
        tokenizer = Tokenizer(source.path)
        prompt = _prompt(source, tokenizer, messages, max_tokens)
        set_threads(None, "cpu")
        our_logits, ours = _through_stages(loaded, shards, prompt, end_ids(source), max_tokens)
    same_prompt, text = list(prompt.token_ids) == their_ids, tokenizer.decode(ours)
    if not same_prompt:
        return Report(False, (), float("inf"), 0.0, ours, their_answer, text)
    difference = (our_logits - their_logits).abs()
    return Report(
        same_prompt=True,
        differences=tuple(difference.max(-1).values.tolist()),
        relative=float(difference.max() / their_logits.abs().max()),
        cosine=cosine(our_logits, their_logits),
        ours=ours,
        theirs=their_answer,
        text=text,
    )


def cosine(one: Tensor, other: Tensor) -> float:
    """Of all numbers of two matrices. Summed in float64: in float32, millions of products give more than 1."""

    def dot(first: Tensor, second: Tensor) -> float:
        return sum(float(row.double() @ like.double()) for row, like in zip(first, second, strict=True))

    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def _loaded(
    source: Source, dtype: str, quantization: ModelQuantization, n_nodes: int
) -> tuple[list[LoadedStage], Transformers]:
    """The stages, and the model in transformers that they are compared with."""
    if quantization == UNQUANTIZED:
        plan = make_plan(source.model_config, n_nodes)
        return [load_source(source, spec, dtype=dtype) for spec in plan.stages], Transformers(source, dtype)
    theirs = Transformers(source, "float32")
    with closing(prepared(source, n_nodes, dtype=dtype, quantization=quantization)) as chunks:
        files = [chunks.file(role) for role in chunks.manifest.plan.roles]
        for file in files:
            theirs.replace(chunk_weights(file))
        return [load_chunk(file) for file in files], theirs


def _prompt(source: Source, tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], max_tokens: int) -> Prompt:
    config = source.model_config
    spec, video = media_specs(source)
    room = config.max_positions - max_tokens
    check_vocabulary(tokenizer.backend, config)
    builder = PromptBuilder(config, tokenizer, spec, ANY_FILE, room, video)
    return builder.build(messages)


def _through_stages(
    loaded: Sequence[LoadedStage], shards: int, prompt: Prompt, ends: Container[int], max_tokens: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Logits of the prompt, float32 [tokens, vocab_size], and the greedy answer."""
    length = len(prompt.token_ids)
    stages = [Stage(stage, n_slots=1, sequence_length=length + max_tokens, shards=shards) for stage in loaded]
    visuals = _encode_media(stages[0], prompt)
    hidden = stages[0].embed(torch.tensor(prompt.token_ids), visuals)
    deepstack = deepstack_of(visuals, hidden.shape[1])
    logits = []
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        part = deepstack.between(start, end) if deepstack else None
        batch = Batch(start, (Slice(0, start, end - start),), prompt.positions[:, start:end], deepstack=part)
        logits.append(_last_logits(stages, batch, hidden[start:end]).float())
    answer = [int(logits[-1][-1].argmax())]
    while len(answer) < max_tokens and answer[-1] not in ends:
        index = length + len(answer) - 1
        positions = torch.full((3, 1), index + prompt.delta)
        hidden = stages[0].embed(torch.tensor(answer[-1:]))
        answer.append(int(_last_logits(stages, Batch(index, (Slice(0, index, 1),), positions), hidden)[-1].argmax()))
    return torch.cat(logits), tuple(answer)


def _last_logits(stages: Sequence[Stage], batch: Batch, hidden: Tensor) -> Tensor:
    for stage in stages[:-1]:
        hidden = stage.forward(batch, hidden)
        batch = batch.beyond(stage.spec.last_layer)
    return stages[-1].logits(batch, hidden)


def _encode_media(stage: Stage, prompt: Prompt) -> list[Visual]:
    visuals = []
    for media in prompt.media:
        steps = stage.encode_steps(torch.from_numpy(media.patches.rows), media.patches.grid)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                visuals.append(Visual(media.span.start, done.value))
                break
    return visuals
