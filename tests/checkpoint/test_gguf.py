"""GGUF files: weights, config and tokenizer are those of the checkpoint that was written, and answers transformers'."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from testing.checkpoints import tiny_gemma_config, tiny_text_config
from testing.gguf_files import ARCHITECTURES, K_QUANTS, KINDS, dequantised, write_gguf
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from mdi import Engine, SamplingParams
from mdi.checkpoint.gguf import GgufSource, gguf_folder
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.checkpoint.weights import RoundedWeights
from mdi.core.batch import Token
from mdi.core.errors import CheckpointError
from mdi.core.quantization import INT4, INT4_MINIMUMS, INT8, INT8_32, INT8_32_MINIMUMS, Quantization
from mdi.layers.quantize import dequantize
from mdi.models.decoder import EMBEDDING
from mdi.models.registry import read_config

QUESTION = "What is at hand?"
GREEDY = SamplingParams(temperature=0, max_tokens=8)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": False},  # transformers' reader takes no other head size
    "llama": {"tie_word_embeddings": False},
    "qwen3_moe": {  # the sizes that transformers' reader does not take from the file
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {  # five layers with a window, one without
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 256,
        "num_hidden_layers": 6,
        "sliding_window": 16,
        "tie_word_embeddings": False,
    },
}
ROUTER = ".mlp.gate.weight"
TOKENS = settings(max_examples=200)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_random_checkpoint(folder / name, tiny_text_config(name, **{"num_hidden_layers": 2, **changes}))
        for name, changes in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as a block of K-quants."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = tiny_text_config("qwen2", **sizes, tie_word_embeddings=False)
    return write_random_checkpoint(tmp_path_factory.mktemp("wide") / "qwen2", config)


@pytest.fixture(scope="module")
def small(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(checkpoints["llama"], tmp_path_factory.mktemp("small") / "small.gguf", "Q4_0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_were_written(
    family: str, kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    written = load_file(checkpoints[family] / "model.safetensors")
    source = open_source(gguf_folder(write_gguf(checkpoints[family], tmp_path / "model.gguf", kind)))
    assert isinstance(source, GgufSource)
    assert source.names() == written.keys()
    for name, weight in written.items():
        assert source.spec(name).shape == tuple(weight.shape)
        expected = weight if weight.dim() == 1 or name.endswith(ROUTER) else dequantised(weight, kind)
        if family == "gemma3_text" and weight.dim() == 1:
            expected = (weight + 1) - 1  # as the converter adds it, and we take it away
        assert torch.equal(source.tensor(name), expected)


@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_reader(
    family: str, n_nodes: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    file = write_gguf(checkpoints[family], tmp_path / f"{family}.gguf", "Q8_0")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    with Engine(file, n_nodes=n_nodes, dtype="float32", quantization="none") as engine:
        assert engine.model_name == family
        prompt = engine.tokenize([{"role": "user", "content": QUESTION}])
        answer = engine.chat([{"role": "user", "content": QUESTION}], GREEDY).token_ids
    with torch.no_grad():
        theirs = oracle.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert list(answer) == theirs[0, len(prompt) :].tolist()


def test_the_config_is_that_of_the_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for family, path in checkpoints.items():
        file = write_gguf(path, tmp_path / f"{family}.gguf", "F16")
        ours, original = open_source(gguf_folder(file)).model_config, open_source(path).model_config
        assert (ours.dtype, original.dtype) == ("bfloat16", "float32")
        for name in ("architecture", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "tied_embeddings", "qk_norm"):
            assert getattr(ours, name) == getattr(original, name), name
        assert ours.rms_eps == original.rms_eps
        assert (ours.ropes, ours.kinds) == (original.ropes, original.kinds)
        assert ours.query_scale == original.query_scale
        assert ours.experts == original.experts


GEMMA = tiny_gemma_config(num_hidden_layers=7, sliding_window_pattern=6)  # GGUF files have no other pattern


def test_gemma_scales_positions_of_some_layers_only(tmp_path: Path) -> None:
    """As the files of 4B and larger do."""
    path = write_random_checkpoint(tmp_path / "gemma", GEMMA, dtype="bfloat16")
    source = open_source(gguf_folder(write_gguf(path, tmp_path / "a.gguf", "BF16")))
    ours, original = source.model_config, open_source(path).model_config
    assert ours.ropes[0].scaling
    assert ours.ropes[0].scaling.factor == 8
    assert ours == replace(original, max_positions=ours.max_positions)
    for name, weight in load_file(path / "model.safetensors").items():
        assert torch.equal(source.tensor(name).bfloat16(), weight) or "norm" in name, name
        assert torch.allclose(source.tensor(name), weight.float(), atol=1e-7), name


def test_gemma_27b_is_known_by_its_layers(tmp_path: Path) -> None:
    """Its scores are multiplied by (hidden_size / heads) ** -0.5; the file does not say so."""
    path = write_random_checkpoint(tmp_path / "gemma", GEMMA | {"num_hidden_layers": 1})
    for layers, scale in ((61, 1.0), (62, (32 / 16) ** 0.5)):
        file = write_gguf(path, tmp_path / f"{layers}.gguf", "F16", **{"gemma3.block_count": layers})
        config = read_config(json.loads((gguf_folder(file) / "config.json").read_text()))
        assert config.query_scale == scale


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"gemma3.final_logit_softcapping": 30.0}, "final_logit_softcapping is set, which is not supported"),
        ({"gemma3.attention.sliding_window": 0}, "sliding_window should be greater than or equal to 1"),
    ],
)
def test_what_is_not_computed_of_gemma_is_refused_by_name(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_random_checkpoint(tmp_path / "gemma", GEMMA | {"num_hidden_layers": 1})
    file = write_gguf(path, tmp_path / "a.gguf", "F16", **entries)
    with pytest.raises(CheckpointError, match=message):
        gguf_folder(file)


def test_frequencies_of_llama_3_are_found_in_their_divisors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = tiny_text_config("llama", num_hidden_layers=1, head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    path = write_random_checkpoint(tmp_path / "llama", config)
    ours = open_source(gguf_folder(write_gguf(path, tmp_path / "a.gguf", "F16"))).model_config.rope
    assert ours == open_source(path).model_config.rope
    other = write_random_checkpoint(tmp_path / "other", config | {"rope_scaling": scaling | {"high_freq_factor": 2.0}})
    with pytest.raises(CheckpointError, match=r"scales positions by a rope_freqs.weight that is not Llama 3's"):
        gguf_folder(write_gguf(other, tmp_path / "b.gguf", "F16"))


@TOKENS
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("'ſs \n\t12é日🎉")), max_size=40))
def test_tokens_are_those_of_the_checkpoints_tokenizer(text: str, checkpoints: dict[str, Path], small: Path) -> None:
    original = Tokenizer.from_file(str(checkpoints["llama"] / "tokenizer.json"))
    ours = Tokenizer.from_file(str(gguf_folder(small) / "tokenizer.json"))
    assert ours.encode(text).ids == original.encode(text).ids
    assert ours.decode(ours.encode(text).ids) == original.decode(original.encode(text).ids)


def test_the_files_of_one_gguf_are_written_once(small: Path) -> None:
    folder = gguf_folder(small)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert gguf_folder(small) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [258]}


@pytest.mark.parametrize(
    ("kind", "format_"),
    [
        *(("Q4_0", INT4), ("Q4_0", INT8_32), ("Q5_0", INT8_32), ("Q8_0", INT8_32)),
        *(("Q4_1", INT4_MINIMUMS), ("Q5_1", INT8_32_MINIMUMS)),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_numbers_and_scales_are_taken_as_they_are(
    family: str, kind: str, format_: Quantization, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = open_source(gguf_folder(write_gguf(checkpoints[family], tmp_path / "model.gguf", kind)))
    weights = RoundedWeights(source)
    for name in source.names():
        if len(source.spec(name).shape) == 2 and not name.endswith(ROUTER):
            assert torch.equal(dequantize(weights.quantized(name, format_)), source.tensor(name))
            assert source.quantized(name, INT8) is None
    assert weights.rounding.relative_error == 0
    other = open_source(gguf_folder(write_gguf(checkpoints[family], tmp_path / "other.gguf", "F16")))
    assert other.quantized(EMBEDDING, format_) is None


@pytest.mark.parametrize(
    ("kind", "format_"),
    [
        ("F32", "none"),
        ("BF16", "none"),
        ("Q4_0", "int4"),
        ("Q4_1", "int4-minimums"),
        ("Q5_1", "int8-32-minimums"),
        ("Q8_0", "int8-32"),
    ],
)
def test_each_type_has_a_format(kind: str, format_: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    file = write_gguf(checkpoints["llama"], tmp_path / "model.gguf", kind)
    assert str(open_source(gguf_folder(file)).quantization) == format_


def test_experts_with_their_own_numbers_need_no_chunks(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    file = write_gguf(checkpoints["qwen3_moe"], tmp_path / "model.gguf", "Q8_0")
    source = open_source(gguf_folder(file))
    assert (str(source.quantization), source.is_exact) == ("int8-32", True)
    with Engine(file) as engine:
        assert engine.nodes()[0].quantization.layers == "int8-32"
        assert len(engine.chat(QUESTION, GREEDY).token_ids) == 8
    assert not list((source.home).glob("**/*.safetensors"))


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_become_int8_or_what_is_asked_for(
    kind: str, wide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_gguf(wide, tmp_path / "model.gguf", kind)
    caplog.set_level("INFO", "mdi.checkpoint.prepare")
    first = {asked: first_token(file, asked) for asked in (None, "int8", "none")}
    error = float(re.findall(r"are now int8-32: a relative error of ([\d.]+) %", caplog.text)[0])
    assert 0 < error < 1
    assert first[None].logprob == pytest.approx(first["none"].logprob, abs=0.05)
    assert first["int8"].logprob == pytest.approx(first["none"].logprob, abs=0.1)


def test_three_nodes_answer_as_one(wide: Path, tmp_path: Path) -> None:
    file = write_gguf(wide, tmp_path / "model.gguf", "Q6_K")
    with Engine(file) as alone, Engine(file, n_nodes=3) as engine:
        assert {str(node.quantization) for node in engine.nodes()} == {"int8-32"}
        assert engine.chat(QUESTION, GREEDY).token_ids == alone.chat(QUESTION, GREEDY).token_ids


@pytest.mark.slow  # calibration takes its time
def test_k_quants_become_int4_where_that_is_asked_for(
    wide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mdi.checkpoint.prepare")
    file = write_gguf(wide, tmp_path / "model.gguf", "Q4_K")
    made = first_token(file, "int4")
    error = float(re.findall(r"are now int4: a relative error of ([\d.]+) %", caplog.text)[0])
    assert 1 < error < 20
    assert made.logprob == pytest.approx(first_token(file, "none").logprob, abs=1)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_experts_of_k_quants_become_int8(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    checkpoint = write_random_checkpoint(tmp_path / "moe", tiny_text_config("qwen3_moe", **sizes, **experts))
    file = write_gguf(checkpoint, tmp_path / "model.gguf", kind)
    caplog.set_level("INFO", "mdi.checkpoint.prepare")
    made = first_token(file, None)
    assert 0 < float(re.findall(r"are now int8-32: a relative error of ([\d.]+) %", caplog.text)[0]) < 1
    assert made.logprob == pytest.approx(first_token(file, "none").logprob, abs=0.05)


@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize(("kind", "format_"), [("Q4_1", "int4-minimums"), ("Q5_1", "int8-32-minimums")])
def test_numbers_with_minimums_answer_as_transformers_does_with_the_weights_that_they_stand_for(
    kind: str, format_: str, n_nodes: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    file = write_gguf(checkpoints["llama"], tmp_path / "model.gguf", kind)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    with Engine(file, n_nodes=n_nodes, dtype="float32") as engine:
        assert {str(node.quantization) for node in engine.nodes()} == {format_}
        prompt = engine.tokenize([{"role": "user", "content": QUESTION}])
        answer = engine.chat(QUESTION, GREEDY).samples[0].tokens
    ids = [*prompt, *(token.id for token in answer)]
    with torch.no_grad():
        logprobs = oracle(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert logprobs.argmax(-1).tolist() == ids[len(prompt) :]
    for token, expected in zip(answer, logprobs, strict=True):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=0.03)


def first_token(file: Path, quantization: str | None) -> Token:
    with Engine(file, dtype="float32", quantization=quantization) as engine:
        return engine.chat(QUESTION, SamplingParams(temperature=0, max_tokens=1)).samples[0].tokens[0]


def test_k_quants_are_dequantised_as_transformers_does(wide: Path, tmp_path: Path) -> None:
    for kind in K_QUANTS:
        file = write_gguf(wide, tmp_path / f"{kind}.gguf", kind)
        source = open_source(gguf_folder(file))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        for name, weight in theirs.named_parameters():
            assert torch.equal(source.tensor(name), weight.data), name


def test_a_model_that_is_split_is_named_by_its_first_part(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    whole = write_gguf(checkpoints["llama"], tmp_path / "whole.gguf", "Q8_0")
    first = write_gguf(checkpoints["llama"], tmp_path / "model.gguf", "Q8_0", tensors_a_part=8)
    assert first.name == "model-00001-of-00003.gguf"
    with Engine(first) as split, Engine(whole) as engine:
        assert split.chat(QUESTION, GREEDY).token_ids == engine.chat(QUESTION, GREEDY).token_ids
        assert split.model_name == "model"
    second = first.with_name("model-00002-of-00003.gguf")
    with pytest.raises(CheckpointError, match=r"is part 2 of 3: name the first one, model-00001-of-00003.gguf"):
        gguf_folder(second)
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.gguf is part 1 of 3, not 2 of 3"):
        gguf_folder(first)
    second.write_bytes(content[: len(content) - 1000])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.gguf is damaged or cut off"):
        gguf_folder(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.gguf is missing beside model-00001"):
        gguf_folder(first)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_it_is_quantised_anew_where_that_is_asked_for(small: Path, quantization: str) -> None:
    with Engine(small, quantization=quantization) as engine:
        assert engine.nodes()[0].quantization.layers == quantization
        assert len(engine.chat(QUESTION, GREEDY).token_ids) == 8


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"general.architecture": "gemma2"}, "'gemma2' are not supported; supported: llama, qwen2, qwen2vl, qwen3"),
        ({"llama.expert_count": 8}, "model.gguf mixes 8 experts .* as Mixtral does: .* that are: qwen3moe, qwen3vlmoe"),
        ({"split.count": 3}, "model.gguf is part 1 of 3, not 1 of 1: keep the names"),
        ({"tokenizer.ggml.pre": "tekken"}, "splits text as 'tekken', which is not supported; supported: gpt-2"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer of the kind 'rwkv' are not supported"),
        ({"llama.rope.dimension_count": 8}, "rotates a part of each head only"),
        ({"llama.rope.scaling.type": "longrope"}, "RoPE scaling of type 'longrope' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    entries: dict[str, Any], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    file = write_gguf(checkpoints["llama"], tmp_path / "model.gguf", "F16", **entries)
    with pytest.raises(CheckpointError, match=message), Engine(file):
        pass


def test_a_tensor_that_would_not_be_computed_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "qwen2", "llama")
    file = write_gguf(checkpoints["qwen2"], tmp_path / "model.gguf", "F16")
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM has no tensor model.layers.0.self_attn.k_proj.bias"):
        open_source(gguf_folder(file))


def test_a_file_that_is_none_is_refused(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    for name, part in (("text", b"no model at all"), ("cut", content[: len(content) // 2]), ("head", content[:100])):
        (tmp_path / f"{name}.gguf").write_bytes(part)
        with pytest.raises(CheckpointError, match=f"{name}.gguf is (no GGUF file|damaged or cut off)"):
            gguf_folder(tmp_path / f"{name}.gguf")
