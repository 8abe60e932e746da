"""The ranks of a group have the bits of one node with as many shards, whatever the shares, dtype and kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
from testing.checkpoints import tiny_text_config
from testing.groups import ThreadGroup, ranks_of, run_ranks
from torch import Tensor

from mdi.core.batch import Batch, Deepstack, LogitAdjustment, Result, Slice, TokenSampling
from mdi.core.dtypes import parse_dtype
from mdi.core.errors import ConfigError, LinkError
from mdi.core.group import Rank
from mdi.core.quantization import ModelQuantization, QuantizedTensor
from mdi.kernels import attention as attention_kernels
from mdi.kernels import norms, vocabulary
from mdi.kernels.threads import compute_threads, set_threads
from mdi.layers import linear
from mdi.layers.quantize import quantize
from mdi.layers.rope import RopeConfig, text_positions
from mdi.models import decoder as decoders
from mdi.models.config import ExpertsConfig, LayerKind, ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, LM_HEAD, Decoder
from mdi.models.registry import read_config
from mdi.models.shards import Shards, kv_heads, rank_config, shard_step, vocabulary_rows
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage, format_of, load_stage

CPU = torch.device("cpu")
LENGTH = 700
SAMPLING = TokenSampling(temperature=0.9, top_k=0, top_p=0.9, min_p=0.0, seed=3, sample=0, position=5, top_logprobs=20)
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "int4-minimums")
"""Types that models are computed in; quantised ones with bfloat16 activations."""


def config_of(**changes: Any) -> ModelConfig:
    """Four heads of 64 with two KV heads, an inner width of 512, two layers."""
    return replace(
        read_config(tiny_text_config(num_hidden_layers=2, hidden_size=128, intermediate_size=512)),
        **{"head_dim": 64, "rope": read_config(tiny_text_config()).rope, **changes},
    )


def gemma_of(**changes: Any) -> ModelConfig:
    """The same with the variants of Gemma 3."""
    kinds = LayerKind(window=40, rope=RopeConfig("default", 100.0)), LayerKind()
    variants = {"qkv_bias": False, "qk_norm": True, "activation": "geglu", "norm_offset": 0.5, "post_norms": True}
    return config_of(**variants, embedding_scale=11.3, query_scale=0.7, kinds=kinds, **changes)


@dataclass(frozen=True)
class Model:
    """A model with random weights, of which ranks have parts."""

    config: ModelConfig
    format: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        return parse_dtype("bfloat16" if self.quantization.layers else self.format)

    @property
    def quantization(self) -> ModelQuantization:
        name = self.format if self.format.startswith("int") else None
        return ModelQuantization(name, name)

    def stage(self, rank: Rank | None = None, *, shards: int = 1, cache_dtype: str | None = None) -> Stage:
        """A whole stage, or a rank's."""
        config, spec = self.config, replace(StageSpec.everything(self.config), rank=rank)
        if rank is None:
            loaded = load_stage(config, spec, CPU, _Part(self), self.quantization)
        else:
            cut = Shards.of(config, rank.n_shards, shard_step(self.quantization))
            part = _Part(self, rank, cut)
            embedding = part(EMBEDDING, (config.vocab_size, config.hidden_size)) if rank.leads else None
            own = rank_config(config, rank, cut)
            tied = config.tied_embeddings and not self.quantization.head
            decoder = Decoder(own, spec, embedding, part, tied_head=tied)
            loaded = LoadedStage(config, spec, self.dtype, CPU, decoder, None, self.quantization)
        return Stage(loaded, n_slots=3, sequence_length=LENGTH, cache_dtype=cache_dtype, shards=shards)


@dataclass(frozen=True)
class _Part:
    """A `GetTensor` of random weights: a rank's part of each."""

    model: Model
    rank: Rank | None = None
    cut: Shards | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        whole = self._whole(name).to(parse_dtype(dtype) if dtype else self.dtype)
        rows, columns = self._part(name)
        part = whole if rows is None else whole[rows]
        part = part if columns is None else part[:, columns]
        assert part.shape == shape, name
        return part.contiguous()

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
        whole = self._whole(name)
        format_ = format_of(name, prod(whole.shape[1:]), self.model.quantization)
        if format_ is None or ".mlp.gate." in name:
            return self(name, shape)
        made = quantize(whole.to(self.dtype), format_)
        rows, columns = self._part(name)
        held = {"values": made.values, "scales": made.scales}
        if made.minimums is not None:
            held["minimums"] = made.minimums
        if rows is not None:
            held = {field: tensor[rows] for field, tensor in held.items()}
        if columns is not None:
            per_byte, group = 8 // format_.bits, format_.group
            for field, tensor in held.items():
                step = per_byte if field == "values" else group
                held[field] = tensor if step is None else tensor[:, columns[::step] // step]
        part = QuantizedTensor(format_, **{field: tensor.contiguous() for field, tensor in held.items()})
        assert part.shape == shape, name
        return part

    def _whole(self, name: str) -> Tensor:
        config = self.model.config
        hidden, experts = config.hidden_size, config.experts
        inner = experts.inner_size if experts and ".experts." in name else config.intermediate_size
        sizes = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size, "norm": hidden}
        sizes |= {"o_proj": hidden, "gate_proj": inner, "up_proj": inner, "down_proj": hidden}
        sizes |= {"q_norm": config.head_dim, "k_norm": config.head_dim, "embed_tokens": config.vocab_size}
        sizes |= {"lm_head": config.vocab_size, "gate": experts.count if experts else 0}
        stem, kind = name.split(".")[-2:]
        outputs = sizes.get(stem, hidden)
        inputs = {"o_proj": config.q_size, "down_proj": inner}.get(stem, hidden)
        vector = kind == "bias" or "norm" in stem
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        made = torch.randn((outputs,) if vector else (outputs, inputs), generator=generator)
        return made * (1 if vector else 2 / inputs**0.5) + ("norm" in stem)

    def _part(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns; None is all."""
        if self.rank is None or self.cut is None or "norm" in name:
            return None, None
        config, rank, cut, stem = self.model.config, self.rank, self.cut, name.split(".")[-2]
        heads = range(cut.heads[rank.first_shard], cut.heads[rank.last_shard])
        if stem == "q_proj":
            return _rows_of(heads, config.head_dim), None
        if stem in ("k_proj", "v_proj"):
            return _rows_of(kv_heads(config, heads), config.head_dim), None
        if stem == "o_proj":
            return None, _rows_of(heads, config.head_dim)
        if stem in ("gate_proj", "up_proj", "down_proj"):
            size = config.experts.inner_size if config.experts and ".experts." in name else config.intermediate_size
            inner = torch.arange(cut.inner[size][rank.first_shard], cut.inner[size][rank.last_shard])
            return (None, inner) if stem == "down_proj" else (inner, None)
        if name == LM_HEAD or (name == EMBEDDING and not rank.leads):
            rows = vocabulary_rows(config, rank)
            return torch.arange(rows.start, rows.stop), None
        return None, None


def _rows_of(heads: Sequence[int], head_dim: int) -> Tensor:
    return torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in heads])


def batches(config: ModelConfig) -> list[tuple[Batch, Tensor]]:
    """Prefill of two slots, decode beside prefill, then decode alone; random hidden states in place of embeddings."""
    steps = [
        [Slice(0, 0, 330, (SAMPLING,)), Slice(2, 0, 7)],
        [Slice(0, 330, 1, (SAMPLING,)), Slice(1, 0, 20, (SAMPLING, SAMPLING)), Slice(2, 7, 3)],
        [Slice(0, 331, 1, (SAMPLING,)), Slice(1, 20, 1, (SAMPLING,)), Slice(2, 10, 1, (SAMPLING,))],
        [Slice(2, 11, 1, (SAMPLING,))],
    ]
    made = []
    for index, slices in enumerate(steps):
        positions = torch.cat([text_positions(part.start, part.length) for part in slices], 1)
        batch = Batch(index, tuple(slices), positions)
        generator = torch.Generator().manual_seed(index)
        made.append((batch, torch.randn(batch.n_tokens, config.hidden_size, generator=generator)))
    return made


Outcome = list[tuple[Tensor, Result | None]]


def computed(stage: Stage, work: Sequence[tuple[Batch, Tensor]]) -> Outcome:
    outs = []
    for batch, hidden in work:
        out = stage.run(batch, hidden.to(stage.dtype))
        outs.append((out, stage.sample(batch, out)))
    return outs


def followed(stage: Stage, group: ThreadGroup) -> tuple[Tensor, Result | None]:
    batch, hidden = group.follow()
    out = stage.run(batch, hidden)
    return out, stage.sample(batch, out)


def computed_by(model: Model, shares: Sequence[int], work: Sequence[tuple[Batch, Tensor]], **settings: Any) -> Outcome:
    """What rank 0 computes. The hidden states of the others are its own, bit for bit, and they draw nothing."""

    def rank(group: ThreadGroup) -> Outcome:
        stage = model.stage(group.rank, **settings)
        stage.group = group
        if group.rank.leads:
            return computed(stage, work)
        return [followed(stage, group) for _ in work]

    first, *others = run_ranks(ranks_of(shares), rank)
    for other in others:
        assert all(same_bits(out, expected) for (out, _), (expected, _) in zip(other, first, strict=True))
        assert all(result is None for _, result in other)
    return first


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also of what is no number."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def check(model: Model, *shares: Sequence[int], **settings: Any) -> None:
    """One node and groups with these shares have the same bits."""
    work = batches(model.config)
    expected = computed(model.stage(shards=sum(shares[0]), **settings), work)
    assert all(out.isfinite().all() for out, _ in expected)
    for share in shares:
        made = computed_by(model, share, work, **settings)
        assert all(torch.equal(out, other) for (out, _), (other, _) in zip(made, expected, strict=True))
        assert [result for _, result in made] == [result for _, result in expected]


@pytest.mark.parametrize("name", FORMATS)
def test_groups_have_the_bits_of_one_node_with_as_many_shards(name: str) -> None:
    check(Model(config_of(), name), (2, 2), (1, 3), (1, 1, 1, 1))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int4"])
def test_shares_that_cut_the_query_heads_of_a_kv_head(name: str) -> None:
    model = Model(config_of(n_heads=12), name)
    assert model.stage(Rank(1, 2, 3))._cache.layers[0].shape[3] == 2
    check(model, (1, 1, 1), (2, 1))
    check(model, (1, 1, 1, 1, 1), (2, 3))


@pytest.mark.parametrize(
    "config",
    [
        config_of(qkv_bias=False, qk_norm=True, norm_dtype="float32"),
        config_of(kinds=(LayerKind(window=40), LayerKind(rotates=False)), tied_embeddings=False),
        config_of(experts=ExpertsConfig(5, 2, 256, True, (0, 1))),
        config_of(experts=ExpertsConfig(5, 2, 256, False, (1,))),
        gemma_of(),
        gemma_of(experts=ExpertsConfig(5, 2, 256, False, (1,))),
    ],
    ids=["norms", "kinds", "experts", "some experts", "gemma", "gemma with experts"],
)
@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_kinds_of_layers(config: ModelConfig, name: str) -> None:
    check(Model(config, name), (1, 3))


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_an_int8_cache(name: str) -> None:
    check(Model(config_of(n_heads=12), name), (2, 1), cache_dtype="int8")


@pytest.mark.parametrize(
    "config",
    [config_of(), config_of(experts=ExpertsConfig(3, 2, 256, True, (1,))), gemma_of()],
    ids=["plain", "experts", "gemma"],
)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
def test_without_kernels(name: str, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch(monkeypatch)
    model = Model(config, name)
    assert model.stage()._decoder._native is None
    check(model, (1, 3))


def use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes all, as on other devices."""
    for module in (linear, norms, vocabulary):
        monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setattr(attention_kernels, "works_on", lambda _device: False)


@pytest.mark.parametrize(
    ("name", "error"), [("float32", 1e-5), ("bfloat16", 0.02), ("float16", 0.003), ("int8", 0.05), ("int4", 0.05)]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_kernels_compute_gemma_as_torch_does(
    name: str, error: float, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With heads of 256 channels. error: of what torch rounds after each operation, and of activations in int8."""
    model = Model(gemma_of(head_dim=256, vocab_size=300), name)
    ids = (torch.arange(330) * 7) % 300
    batch = Batch(0, (Slice(0, 0, 330),), text_positions(0, 330))

    def made() -> tuple[Stage, Tensor]:
        stage = model.stage(shards=shards)
        return stage, stage.logits(batch, stage.embed(ids))

    stage, ours = made()
    assert stage._decoder._native is not None
    use_torch(monkeypatch)
    stage, theirs = made()
    assert stage._decoder._native is None
    assert (ours.double() - theirs.double()).norm() < error * theirs.double().norm()


GREEDY = replace(SAMPLING, temperature=0.0, top_logprobs=0)
TOP_K = replace(SAMPLING, top_k=20, top_logprobs=3)
BIASED = replace(GREEDY, adjustment=LogitAdjustment(1.0, 0.0, 0.0, b"", b"", b"", (7,), (9.0,)))
VOCAB_SIZE = 18_000  # four shards of whole blocks


@pytest.mark.parametrize(
    ("samplings", "n_columns"),
    [
        ((GREEDY, GREEDY), 2 * 18 + 4 * 3),
        ((GREEDY, TOP_K), 2 * 18 + 4 * 41),
        ((TOP_K, SAMPLING), VOCAB_SIZE),
        ((GREEDY, BIASED), VOCAB_SIZE),
        ((replace(TOP_K, token_mask=b"\xff" * 400), TOP_K), VOCAB_SIZE),
    ],
    ids=["greedy", "top-k", "one from all", "a bias", "a mask"],
)
@pytest.mark.parametrize("name", FORMATS)
def test_draws_from_candidates_and_from_all_logits(
    name: str, samplings: tuple[TokenSampling, TokenSampling], n_columns: int
) -> None:
    """n_columns: what rank 0 gathers of a row: block by block, by candidates, or all."""
    model = Model(config_of(vocab_size=VOCAB_SIZE), name)
    batch = Batch(0, (Slice(0, 0, 9, samplings[:1]), Slice(1, 0, 5, samplings[1:])), text_positions(0, 14))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.n_tokens, model.config.hidden_size, generator=generator)
    hidden[9] = torch.nan if name == "float32" else hidden[9]
    [(_, expected)] = computed(model.stage(shards=4), [(batch, hidden)])

    def rank(group: ThreadGroup) -> tuple[Result | None, int]:
        stage = model.stage(group.rank)
        stage.group = group
        [(_, result)] = computed(stage, [(batch, hidden)]) if group.rank.leads else [followed(stage, group)]
        return result, group.gathered_columns

    for shares in ((1, 3), (1, 1, 1, 1)):
        (result, gathered), *_ = run_ranks(ranks_of(shares), rank)
        assert result == expected
        lacking = (4 - len(shares)) * (n_columns - 2 * 18) // 4 if n_columns < VOCAB_SIZE else 0
        assert gathered == n_columns - lacking


def test_layers_that_are_called_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not packed for one native call has its bits."""
    model = Model(config_of(experts=ExpertsConfig(5, 2, 256, True, (1,))), "bfloat16")
    work = batches(model.config)
    expected = computed_by(model, (1, 3), work)
    monkeypatch.setattr(decoders, "_native", lambda *_: None)
    assert model.stage()._decoder._native is None
    made = computed_by(model, (1, 3), work)
    assert all(torch.equal(out, other) for (out, _), (other, _) in zip(made, expected, strict=True))


def test_features_of_images_are_added_once() -> None:
    model = Model(config_of(), "bfloat16")
    (batch, hidden), *_ = batches(model.config)
    deepstack = Deepstack(torch.tensor([2, 3, 50]), torch.randn(1, 3, hidden.shape[1]).to(model.dtype))
    work = [(replace(batch, deepstack=deepstack), hidden)]
    [(expected, _)] = computed(model.stage(shards=4), work)
    [(out, _)] = computed_by(model, (2, 2), work)
    assert torch.equal(out, expected)


def test_rows_that_are_no_numbers_stay_by_themselves() -> None:
    model = Model(config_of(), "bfloat16")
    work = batches(model.config)[:1]
    work[0][1][331] = torch.nan  # of the second slice
    [(expected, expected_result)] = computed(model.stage(shards=4), work)
    [(out, result)] = computed_by(model, (1, 3), work)
    assert result == expected_result
    assert result
    assert result.overflowed == (1,)
    assert torch.equal(out[:330], expected[:330])
    assert out[:330].isfinite().all()


class Replayed:
    """`Group` of a rank whose others are recorded: full sums of each exchange. lost_in: the exchange that fails."""

    def __init__(self, rank: Rank, recorded: Sequence[Tensor], lost_in: int = -1) -> None:
        self.rank = rank
        self._recorded = recorded
        self._exchanges = 0
        self._places: dict[int, int] = {}  # the exchange of a tensor, by where it is
        self._lost_in = lost_in

    def lead(self, batch: Batch, hidden: Tensor) -> None:
        pass

    def follow(self) -> tuple[Batch, Tensor]:
        raise NotImplementedError

    def exchange(self, partials: Tensor) -> None:
        self.send(partials, slice(0, partials.shape[1]))
        self.receive(partials, partials.shape[1])

    def send(self, partials: Tensor, rows: slice) -> None:
        if rows.start == 0:
            self._places[partials.data_ptr()] = self._exchanges
            self._exchanges += 1
        if self._exchanges > self._lost_in >= 0:
            raise LinkError("secondary0 is gone")

    def receive(self, partials: Tensor, last_row: int) -> None:
        sums, own = (
            self._recorded[self._places[partials.data_ptr()]],
            slice(self.rank.first_shard, self.rank.last_shard),
        )
        assert torch.equal(partials[own, :last_row], sums[own, :last_row])
        partials[:, :last_row] = sums[:, :last_row]

    def gather(self, columns: Tensor) -> list[Tensor] | None:
        raise NotImplementedError


@pytest.mark.parametrize("experts", [None, ExpertsConfig(5, 2, 256, True, (1,))], ids=["plain", "experts"])
def test_a_rank_may_have_several_threads_and_may_lose_the_others(experts: ExpertsConfig | None) -> None:
    model, sums = Model(config_of(experts=experts), "bfloat16"), list[Tensor]()
    (batch, hidden), *_ = batches(model.config)
    hidden = hidden.to(model.dtype)

    def rank(group: ThreadGroup) -> Tensor:
        stage = model.stage(group.rank)
        stage.group = group
        if group.rank.leads:
            group.recorded = sums
        else:
            group.follow()
        return stage.run(batch, hidden)

    expected, _ = run_ranks(ranks_of((3, 1)), rank)
    stage, before = model.stage(Rank(0, 3, 4)), compute_threads()
    for n_threads in (1, 2, 3):
        set_threads(n_threads, "cpu")
        try:
            stage.group = Replayed(Rank(0, 3, 4), sums, lost_in=2)
            with pytest.raises(LinkError, match="secondary0 is gone"):
                stage.run(batch, hidden)
            stage.group = Replayed(Rank(0, 3, 4), sums)
            assert torch.equal(stage.run(batch, hidden), expected)
        finally:
            set_threads(before, "cpu")


def test_a_rank_without_its_group_refuses_batches() -> None:
    model = Model(config_of())
    batch, hidden = batches(model.config)[-1]
    with pytest.raises(LinkError, match="has no link to the other ranks of its group"):
        model.stage(Rank(0, 2, 4)).run(batch, hidden)


def test_shards_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 shards are too many for the model's query heads, 4 in whole groups of 1"):
        Model(config_of()).stage(shards=5)
    with pytest.raises(ConfigError, match="16 shards are too many for the model's intermediate size, 512"):
        Model(config_of(n_heads=16), "int8").stage(shards=16)
