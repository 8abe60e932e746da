"""The chunks of a group's ranks: put together they are the chunk of one node, in every format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from testing.adapters import write_adapter
from testing.checkpoints import tiny_config, tiny_text_config, tiny_windowed_config
from testing.gguf_files import write_gguf
from testing.quantized_files import Packer, write_quantized
from torch import Tensor

from mdi.checkpoint import prepare as prepare_module
from mdi.checkpoint.calibration import CalibratedWeights, CalibrationText
from mdi.checkpoint.gguf import gguf_folder
from mdi.checkpoint.loader import chunk_weights, load_chunk, load_source
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import Source, open_source
from mdi.core.batch import Slice
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.group import Rank
from mdi.core.quantization import UNQUANTIZED, ModelQuantization, Quantization, QuantizedTensor
from mdi.layers import linear
from mdi.layers.attention import Layout
from mdi.layers.mlp import MLP
from mdi.layers.rope import DecoderRope, text_positions
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, FINAL_NORM, LAYERS, LM_HEAD
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage, stage_specs
from mdi.planning.plan import Plan
from mdi.planning.predict import stage_summary

EVEN = {"num_attention_heads": 8, "head_dim": 32, "intermediate_size": 384, "num_hidden_layers": 2}
ODD = {**EVEN, "num_attention_heads": 12, "vocab_size": 281}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": tiny_text_config("qwen2", **ODD, tie_word_embeddings=False),
    "qwen3": tiny_text_config("qwen3", **ODD),
    "qwen2_vl": tiny_config(**EVEN, **ROPE, hidden_size=256),
    "qwen2_vl untied": tiny_config(**EVEN, **ROPE, hidden_size=256, tie_word_embeddings=False),
    "qwen3_moe": tiny_text_config(
        "qwen3_moe", **ODD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=320, mlp_only_layers=[1]
    ),
}
WINDOWED = tiny_windowed_config(**EVEN, **ROPE, hidden_size=256)  # its tower has matrices named as the decoder's
CONFIGS["qwen2_5_vl"] = {**WINDOWED, "vision_config": {**WINDOWED["vision_config"], "out_hidden_size": 256}}
KINDS = {
    "float32": ("float32", UNQUANTIZED, (1, 1, 1)),
    "bfloat16": ("bfloat16", UNQUANTIZED, (1, 3)),
    "int8": ("bfloat16", ModelQuantization("int8", "int8"), (2, 1, 1)),
    "int4": ("float16", ModelQuantization("int4", "int8", "int4"), (1, 1, 1, 1)),
}
"""Dtype, quantisation, shards of each rank."""
SHORT = CalibrationText("short", CalibrationText.default().text[:4200])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    folder = tmp_path_factory.mktemp("ranks")

    def opened(name: str) -> Source:
        if not (folder / name).exists():
            write_random_checkpoint(folder / name, CONFIGS[name])
        return open_source(folder / name)

    return opened


def prepare_group(source: Source, *stages: Sequence[int], **kind: Any) -> Path:
    """`prepare` for stages of ranks, given by the shards of each."""
    plan = Plan(tuple(spec for specs in group_specs(source.model_config, *stages) for spec in specs))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prepare_module, "make_plan", lambda *_args, **_options: plan)
        return prepare(source, plan.n_nodes, groups=plan.groups, **kind)


def ranks(*shards: int) -> list[Rank]:
    """Of a group, by how many shards each has."""
    return [Rank(sum(shards[:index]), sum(shards[: index + 1]), sum(shards)) for index in range(len(shards))]


def group_specs(config: ModelConfig, *stages: Sequence[int]) -> list[list[StageSpec]]:
    """Stages of as many layers each."""
    each, last = config.n_layers // len(stages), len(stages) - 1
    return [
        [
            StageSpec(
                each * index,
                each * (index + 1),
                embedding=index == 0 and rank.leads,
                vision=index == 0 and rank.leads and config.vision is not None,
                head=index == last,
                rank=rank,
            )
            for rank in ranks(*shards)
        ]
        for index, shards in enumerate(stages)
    ]


def assert_together_whole(config: ModelConfig, parts: Sequence[dict[str, Tensor]], whole: dict[str, Tensor]) -> None:
    """parts: the tensors of each rank of one stage. whole: those of one node, dequantised as they are."""
    for name, tensor in whole.items():
        module = name.split(".")[-2]
        found = [part[name] for part in parts if name in part]
        if module in ("k_proj", "v_proj") and name.startswith(LAYERS):
            assert_kv_heads(config, [(part[query(name)], part[name]) for part in parts], tensor)
        elif module in ("q_proj", "gate_proj", "up_proj", "lm_head") and name.startswith((LAYERS, LM_HEAD)):
            assert torch.equal(torch.cat(found), tensor), name
        elif module in ("o_proj", "down_proj") and name.startswith(LAYERS):
            assert torch.equal(torch.cat(found, 1), tensor), name
        elif name == EMBEDDING and len(found) > 1:  # the others have their rows of it for the head
            assert torch.equal(found[0], tensor)
            rows = tensor[len(tensor) - sum(map(len, found[1:])) :]
            assert torch.equal(torch.cat(found[1:]), rows)
        elif name.startswith(LAYERS) or name == FINAL_NORM:
            assert len(found) == len(parts)
            assert all(torch.equal(part, tensor) for part in found), name
        else:  # the embedding and the vision tower
            assert len(found) == 1
            assert torch.equal(found[0], tensor), name


def query(name: str) -> str:
    return name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")


def assert_kv_heads(config: ModelConfig, pairs: Sequence[tuple[Tensor, Tensor]], whole: Tensor) -> None:
    """Each query head finds, by its place among its rank's, the KV head that it uses in the model."""
    first, by_head = 0, whole.view(config.n_kv_heads, config.head_dim, -1)
    for queries, kv in pairs:
        n_heads, own = len(queries) // config.head_dim, kv.view(-1, config.head_dim, by_head.shape[2])
        for head in range(n_heads):
            used = by_head[(first + head) // (config.n_heads // config.n_kv_heads)]
            assert torch.equal(own[head // (n_heads // len(own))], used)
        first += n_heads
    assert first == config.n_heads


def files_of(folder: Path) -> list[Path]:
    return [folder / chunk.file for chunk in Manifest.read(folder).chunks]


def assert_chunks_together_whole(source: Source, group: Path, one_node: Path) -> None:
    [whole] = files_of(one_node)
    parts = [dict(chunk_weights(file)) for file in files_of(group)]
    assert_together_whole(source.model_config, parts, dict(chunk_weights(whole)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_chunks_of_ranks_are_together_the_one_of_one_node(
    name: str, kind: str, checkpoints: Callable[[str], Source]
) -> None:
    source, (dtype, quantization, shards) = checkpoints(name), KINDS[kind]
    one_node = prepare(source, 1, dtype=dtype, quantization=quantization)
    group = prepare_group(source, shards, dtype=dtype, quantization=quantization)
    assert_chunks_together_whole(source, group, one_node)
    manifest = Manifest.read(group)
    assert [chunk.rank for chunk in manifest.chunks] == ranks(*shards)
    assert manifest.plan_hash != Manifest.read(one_node).plan_hash


@pytest.mark.parametrize("shards", [(1, 1), (1, 1, 1), (1, 1, 1, 1, 1), (3, 4, 5)], ids=str)
def test_twelve_heads_with_two_kv_heads_are_cut_for_any_ranks(
    shards: tuple[int, ...], checkpoints: Callable[[str], Source]
) -> None:
    source = checkpoints("qwen2")
    assert_chunks_together_whole(source, prepare_group(source, shards), prepare(source, 1))


def test_two_stages_of_ranks_have_each_layer_in_one_group(checkpoints: Callable[[str], Source]) -> None:
    source = checkpoints("qwen3")
    files = files_of(prepare_group(source, (1, 1), (1, 1)))
    first, second, third, fourth = (dict(chunk_weights(file)) for file in files)
    whole = {name: source.tensor(name) for name in source.names()}
    stages = [{name: weight for name, weight in whole.items() if is_of(index, name)} for index in range(2)]
    assert_together_whole(source.model_config, [first, second], {**stages[0], EMBEDDING: whole[EMBEDDING]})
    assert torch.equal(torch.cat([third.pop(EMBEDDING), fourth.pop(EMBEDDING)]), whole[EMBEDDING])  # the tied head
    assert_together_whole(source.model_config, [third, fourth], {**stages[1], FINAL_NORM: whole[FINAL_NORM]})


def is_of(layer: int, name: str) -> bool:
    return name.startswith(f"{LAYERS}{layer}.")


@pytest.mark.usefixtures("unpacked")
def test_a_rank_loads_from_the_checkpoint_what_its_chunk_has(checkpoints: Callable[[str], Source]) -> None:
    source = checkpoints("qwen2_vl")
    for quantization in (UNQUANTIZED, ModelQuantization("int4", "int8")):
        for file in files_of(prepare_group(source, (1, 3), quantization=quantization)):
            chunk = load_chunk(file)
            direct = load_source(source, chunk.spec, quantization=quantization)
            pairs = zip(products_of(chunk), products_of(direct), strict=True)
            assert all(torch.equal(mine.weight, theirs.weight) for mine, theirs in pairs)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as they are stored, to look at: without kernels they are not packed."""
    monkeypatch.setattr(linear, "library", lambda: None)


def products_of(loaded: LoadedStage) -> list[linear.Linear]:
    made = [loaded.decoder.lm_head] if loaded.decoder.lm_head else []
    for layer in loaded.decoder.layers:
        mlps = [layer.mlp] if isinstance(layer.mlp, MLP) else layer.mlp.mlps
        made += [layer.qkv, layer.out, *(product for mlp in mlps for product in (mlp.gate_up, mlp.down))]
    return made


@pytest.mark.usefixtures("unpacked")
def test_the_head_of_the_first_rank_is_rows_of_its_embedding(checkpoints: Callable[[str], Source]) -> None:
    first, second = files_of(prepare_group(checkpoints("qwen3"), (2, 1)))
    loaded, other = load_chunk(first), load_chunk(second)
    assert loaded.decoder.embedding is not None
    assert loaded.decoder.lm_head is not None
    assert other.decoder.lm_head is not None
    assert loaded.decoder.lm_head.weight.data_ptr() == loaded.decoder.embedding.data_ptr()
    assert (len(loaded.decoder.embedding), len(loaded.decoder.lm_head.weight)) == (281, 2 * 281 // 3)
    assert (other.decoder.embedding, len(other.decoder.lm_head.weight)) == (None, 281 - 2 * 281 // 3)


# checkpoints of other forms


@pytest.mark.parametrize(
    "packer",
    [Packer(), Packer(symmetric=False, group=64), Packer(bits=8), Packer(bits=8, group=-1), Packer("awq", group=64)],
    ids=str,
)
def test_quantised_checkpoints_are_cut_as_they_are(packer: Packer, tmp_path: Path, wide: Path) -> None:
    write_quantized(wide, tmp_path / "packed", packer)
    source = open_source(tmp_path / "packed")
    assert source.is_exact
    one_node = prepare(source, 1, quantization=source.quantization)
    assert_chunks_together_whole(source, prepare_group(source, (1, 1, 2), quantization=source.quantization), one_node)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With groups enough for checkpoints that were quantised in groups of 128."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    return write_random_checkpoint(tmp_path_factory.mktemp("wide") / "llama", tiny_text_config("llama", **sizes))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_order_of_inputs_is_refused_with_its_remedy(bits: int, tmp_path: Path, wide: Path) -> None:
    write_quantized(wide, tmp_path / "packed", Packer(bits=bits, desc_act=True, group=64))
    source = open_source(tmp_path / "packed")
    with pytest.raises(ConfigError, match=r"desc_act.* split the model by layers .*--tensor-parallel-size"):
        prepare_group(source, (1, 1), quantization=source.quantization)
    with pytest.raises(ConfigError, match="desc_act"):
        load_source(source, group_specs(source.model_config, (1, 1))[0][1], quantization=source.quantization)
    again = ModelQuantization("int8", "int8")  # rounded once more, inputs as they come
    assert_chunks_together_whole(
        source, prepare_group(source, (1, 1), quantization=again), prepare(source, 1, quantization=again)
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_1"])
def test_gguf_files_are_cut_as_they_are(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = open_source(gguf_folder(write_gguf(wide, tmp_path / "model.gguf", kind)))
    assert source.is_exact
    one_node = prepare(source, 1, quantization=source.quantization)
    assert_chunks_together_whole(source, prepare_group(source, (3, 1), quantization=source.quantization), one_node)


def test_an_adapter_is_merged_before_its_weights_are_cut(tmp_path: Path, wide: Path) -> None:
    down = "model.layers.1.mlp.down_proj"
    source = open_source(wide, write_adapter(tmp_path / "adapter", {down: (256, 512)}))
    assert not torch.equal(source.tensor(f"{down}.weight"), open_source(wide).tensor(f"{down}.weight"))
    assert_chunks_together_whole(source, prepare_group(source, (1, 1)), prepare(source, 1))


def test_weights_are_calibrated_as_a_whole_and_once_for_all_ranks(
    checkpoints: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = checkpoints("qwen3"), list[str]()
    kind: dict[str, Any] = {"quantization": ModelQuantization("int4", "int4"), "calibration": SHORT}
    one_node = prepare(source, 1, **kind)
    quantized = CalibratedWeights.quantized

    def counted(weights: CalibratedWeights, name: str, format_: Quantization) -> QuantizedTensor:
        made.append(name)
        return quantized(weights, name, format_)

    monkeypatch.setattr(CalibratedWeights, "quantized", counted)
    group = prepare_group(source, (1, 2), **kind)
    assert len(made) == len(set(made)) == 2 * 7 + 1
    assert_chunks_together_whole(source, group, one_node)
    rounded = dict(chunk_weights(prepare(source, 1, quantization=kind["quantization"]) / "model_starter.safetensors"))
    name = f"{LAYERS}1.mlp.down_proj.weight"
    assert not torch.equal(dict(chunk_weights(files_of(group)[0]))[name], rounded[name][:, :128])


# sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe"])
def test_layers_take_the_bytes_of_one_node_s_but_for_what_every_rank_has(
    name: str, kind: str, checkpoints: Callable[[str], Source]
) -> None:
    config, (dtype, quantization, _) = checkpoints(name).model_config, KINDS[kind]
    whole, *parts = (
        stage_specs(config, StageSpec(0, 2, rank=rank), dtype, quantization) for rank in (None, *ranks(1, 1, 1))
    )
    assert all(part.keys() == whole.keys() for part in parts)
    for tensor, spec in whole.items():
        found = sum(part[tensor].size_bytes for part in parts)
        if "norm" in tensor or tensor.endswith("mlp.gate.weight"):
            assert found == 3 * spec.size_bytes
        elif "k_proj" in tensor or "v_proj" in tensor:
            assert found == 2 * spec.size_bytes  # the middle one of three ranks has both KV heads
        else:
            scales = 4 * spec.shape[0] * (kind == "int8" and tensor.split(".")[-2] in ("o_proj", "down_proj"))
            assert found == spec.size_bytes + 2 * scales  # of an output as a whole: every rank has them


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_s_chunk_has_the_bytes_that_were_predicted(name: str, checkpoints: Callable[[str], Source]) -> None:
    source, quantization = checkpoints(name), ModelQuantization("int4", "int8")
    folder = prepare_group(source, (1, 2), quantization=quantization)
    for chunk in Manifest.read(folder).chunks:
        path = folder / chunk.file
        data_bytes = chunk.size_bytes - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        summary = stage_summary(source.model_config, chunk.spec, "float32", quantization=quantization)
        assert summary.size_bytes == data_bytes == sum(tensor.nbytes for tensor in load_file(path).values())


# what a rank computes


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("shards", [(1, 1), (1, 1, 1), (1, 1, 1, 1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe"])
def test_the_partial_products_of_ranks_add_up_to_the_layer(
    name: str, shards: tuple[int, ...], checkpoints: Callable[[str], Source]
) -> None:
    source = checkpoints(name)
    config = source.model_config
    whole = load_source(source)
    parts = [load_source(source, spec) for spec in group_specs(config, shards)[0]]
    hidden = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    for index in range(config.n_layers):
        expected = attended(whole, index, hidden)
        assert torch.allclose(sum_of([attended(part, index, hidden) for part in parts]), expected, atol=1e-5)
        hidden = hidden + expected
        expected = fed_forward(whole, index, hidden)
        assert torch.allclose(sum_of([fed_forward(part, index, hidden) for part in parts]), expected, atol=1e-5)
        hidden = hidden + expected
    logits = torch.cat([part.decoder.logits(hidden) for part in parts], 1)
    assert torch.allclose(logits, whole.decoder.logits(hidden), atol=1e-5)


def attended(loaded: LoadedStage, index: int, hidden: Tensor) -> Tensor:
    """What the attention of a layer adds."""
    config, layer = loaded.parts.config, loaded.decoder.layers[index]
    tokens, cpu = len(hidden), torch.device("cpu")
    cache = torch.zeros(1, tokens, 2, config.n_kv_heads, config.head_dim)
    rotation = DecoderRope(config.head_dim, config.rope, cpu)(text_positions(0, tokens))
    layout = Layout.of([Slice(0, 0, tokens)], cpu)
    return layer.out(layer._attention(layer.input_norm(hidden), rotation, cache, layout, None))


def fed_forward(loaded: LoadedStage, index: int, hidden: Tensor) -> Tensor:
    """What the MLP of a layer adds."""
    layer = loaded.decoder.layers[index]
    return layer.mlp(layer.mlp_norm(hidden))


def sum_of(partials: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(partials)).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_s_stage_has_caches_and_products_of_its_own_size(
    kind: str, checkpoints: Callable[[str], Source]
) -> None:
    source, (dtype, quantization, _) = checkpoints("qwen2"), KINDS[kind]
    files = files_of(prepare_group(source, (1, 1, 1), dtype=dtype, quantization=quantization))
    for file, (n_kv_heads, vocab) in zip(files, [(1, 93), (2, 94), (1, 94)], strict=True):
        loaded = load_chunk(file)
        stage, own = Stage(loaded, n_slots=1, sequence_length=64), loaded.parts.config
        assert stage._cache.layers[0].shape == (1, 64, 2, n_kv_heads, 32)
        assert (own.n_heads, own.intermediate_size, loaded.config) == (4, 128, source.model_config)
        hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(loaded.dtype)
        layer = loaded.decoder.layers[1]
        assert layer.qkv(hidden).shape == (3, (4 + 2 * n_kv_heads) * 32)
        assert layer.out(hidden.repeat(1, 2)).shape == layer.mlp(hidden).shape == (3, 64)
        assert loaded.decoder.logits(hidden).shape == (3, vocab)


# what is refused


def test_more_shares_than_heads_or_groups_are_refused(checkpoints: Callable[[str], Source]) -> None:
    source = checkpoints("qwen2")
    with pytest.raises(
        ConfigError, match="13 shards are too many for the model's query heads, 12 in whole groups of 1"
    ):
        load_source(source, StageSpec(0, 2, rank=Rank(0, 1, 13)))
    with pytest.raises(ConfigError, match="7 shards are too many for the model's query heads, 12 in whole groups of 2"):
        load_source(source, StageSpec(0, 2, rank=Rank(0, 1, 7)), quantization=ModelQuantization("int8"))


def test_a_tensor_of_another_shape_is_named_with_its_whole_shape(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path / "model", CONFIGS["qwen2"])
    config = path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 384', '"intermediate_size": 256'))
    source = open_source(path)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \[384, 64\].*asks for \[256, 64\]"):
        load_source(source, StageSpec(0, 2, rank=Rank(0, 1, 2)))


def test_the_chunk_of_another_rank_is_refused(checkpoints: Callable[[str], Source]) -> None:
    first, second = files_of(prepare_group(checkpoints("qwen2"), (1, 1)))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="another plan, dtype, quantisation or node"):
        load_chunk(second)
