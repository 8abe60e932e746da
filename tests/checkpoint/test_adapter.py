"""LoRA adapters: the merged model is transformers' with the published formula, and others are refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.adapters import write_adapter
from testing.checkpoints import tiny_config, tiny_text_config
from testing.gguf_files import write_gguf
from testing.quantized_files import Packer, write_quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2VLForConditionalGeneration

from mdi import Engine, SamplingParams
from mdi.bench.verify import verify
from mdi.checkpoint.gguf import gguf_folder
from mdi.checkpoint.loader import chunk_weights
from mdi.checkpoint.prepare import prepare, prepared
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.errors import CheckpointError
from mdi.core.quantization import INT8, UNQUANTIZED, ModelQuantization
from mdi.layers.quantize import dequantize, quantize

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
SHAPES = {Q: (128, 128), "model.layers.1.self_attn.q_proj": (128, 128), DOWN: (128, 256)}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
QUESTION = "What is at hand?"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256}
    return write_random_checkpoint(tmp_path_factory.mktemp("base") / "model", tiny_text_config("llama", **sizes))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", SHAPES)


def change(adapter: Path, edit: Callable[[dict[str, Tensor]], Any], **entries: Any) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | entries))


def add_published(model: Any, adapter: Path, scales: dict[str, float]) -> None:
    """W + scale * B A, into transformers' model. scales: by module."""
    halves = load_file(adapter / "adapter_model.safetensors")
    for module, scale in scales.items():
        up, down = (halves[f"base_model.model.{module}.lora_{half}.weight"] for half in "BA")
        model.get_submodule(module).weight.data += scale * (up @ down)


@pytest.mark.parametrize(
    ("entries", "scales"),
    [
        ({}, (4.0, 4.0, 4.0)),
        ({"use_rslora": True}, (8.0, 8.0, 8.0)),
        ({"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}, (4.0, 8.0, 8.0)),
        ({"rank_pattern": {"down_proj": 2}, "use_rslora": True}, (8.0, 8.0, 16 / math.sqrt(2))),
        ({"alpha_pattern": {r"model\.layers\.\d+\.self_attn\.q_proj": 8.0}}, (2.0, 2.0, 4.0)),
    ],
)
def test_weights_are_those_of_the_published_formula(
    entries: dict[str, Any], scales: tuple[float, ...], base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", SHAPES, **entries)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    add_published(model, adapter, dict(zip(SHAPES, scales, strict=True)))
    source = open_source(base, adapter)
    for module in SHAPES:
        merged = model.get_submodule(module).weight.data
        assert torch.allclose(source.tensor(f"{module}.weight"), merged, atol=1e-6)


@pytest.mark.parametrize("n_nodes", [1, 3])
def test_answers_are_those_of_the_merged_model(n_nodes: int, base: Path, adapter: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    add_published(model, adapter, dict.fromkeys(SHAPES, 4.0))
    with Engine(base, adapter=adapter, n_nodes=n_nodes) as engine:
        prompt = engine.tokenize([{"role": "user", "content": QUESTION}])
        answer = list(engine.chat([{"role": "user", "content": QUESTION}], GREEDY).token_ids)
    with torch.no_grad():
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert answer == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_names_of_a_vision_model_are_those_of_any_version_of_transformers(prefix: str, tmp_path: Path) -> None:
    base = write_random_checkpoint(tmp_path / "base", tiny_config(num_hidden_layers=2))
    tower = "visual.blocks.1.attn.qkv" if prefix == "model." else "model.visual.blocks.1.attn.qkv"
    shapes = {f"{prefix}layers.1.mlp.up_proj": (128, 64), tower: (96, 32)}
    adapter = write_adapter(tmp_path / "adapter", shapes)
    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    places = {"model.language_model.layers.1.mlp.up_proj": 0, "model.visual.blocks.1.attn.qkv": 1}
    source, halves = open_source(base, adapter), load_file(adapter / "adapter_model.safetensors")
    for module, index in places.items():
        stored = list(shapes)[index]
        up, down = (halves[f"base_model.model.{stored}.lora_{half}.weight"] for half in "BA")
        name = f"{module}.weight".replace("model.language_model.", "model.").replace("model.visual", "visual")
        assert torch.allclose(source.tensor(name), model.get_submodule(module).weight + 4.0 * (up @ down), atol=1e-6)


def test_it_is_rounded_to_the_type_of_the_weight_and_then_quantised(adapter: Path, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256}
    base = write_random_checkpoint(tmp_path / "base", tiny_text_config("llama", **sizes), dtype="bfloat16")
    source, halves = open_source(base, adapter), load_file(adapter / "adapter_model.safetensors")
    up, down = (halves[f"base_model.model.{DOWN}.lora_{half}.weight"] for half in "BA")
    exact = open_source(base).tensor(f"{DOWN}.weight").double() + 4.0 * (up.double() @ down.double())
    merged = source.tensor(f"{DOWN}.weight")
    assert merged.dtype == torch.bfloat16
    assert ((merged - exact).abs() <= 2.0**-8 * exact.abs()).all()
    folder = prepare(source, 1, quantization=ModelQuantization("int8"))
    weights = dict(chunk_weights(folder / "model_starter.safetensors"))
    assert torch.equal(weights[f"{DOWN}.weight"], dequantize(quantize(merged, INT8)))


def test_chunks_of_base_and_adapters_are_never_mixed(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", SHAPES, lora_alpha=8)
    sources = [open_source(base), open_source(base, adapter), open_source(base, other)]
    made = []
    for source in sources:
        with closing(prepared(source, 2)) as chunks:
            made.append(chunks)
    assert [chunks.folder for chunks in made] == [path / "chunks" / "2nodes" for path in (base, adapter, other)]
    assert len({chunks.manifest.digest for chunks in made}) == 3
    change(adapter, lambda halves: halves[f"base_model.model.{Q}.lora_B.weight"].mul_(2))
    with closing(prepared(open_source(base, adapter), 2)) as again:
        assert again.folder == made[1].folder
        assert again.manifest.digest != made[1].manifest.digest


def test_verify_finds_no_difference_to_transformers(base: Path, adapter: Path) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    for quantization in (UNQUANTIZED, ModelQuantization("int8")):
        source = open_source(base, adapter)
        report = verify(source, messages, dtype="float32", quantization=quantization, n_nodes=2, max_tokens=8)
        assert report.relative < (1e-4 if quantization == UNQUANTIZED else 0.05)


# what is refused


@pytest.mark.parametrize(
    ("edit", "entries", "message"),
    [
        (lambda _: None, {"peft_type": "PROMPT_TUNING"}, "adapters of the type 'PROMPT_TUNING' are not supported"),
        (lambda _: None, {"peft_type": None}, "adapters of the type None are not supported: only LORA is"),
        (lambda _: None, {"use_dora": True}, "use_dora is set, which is not supported: merge it into its base"),
        (lambda _: None, {"fan_in_fan_out": True}, "fan_in_fan_out is set, which is not supported"),
        (lambda _: None, {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        (lambda _: None, {"r": 0}, "adapter_config.json: r should be greater than or equal to 1"),
        (lambda _: None, {"lora_alpha": "16"}, "adapter_config.json: lora_alpha should be a valid number"),
        (lambda _: None, {"rank_pattern": {"(": 4}}, r"the pattern '\(' is no regular expression"),
        (lambda _: None, {"r": 8}, "whose rank is 8: it is an adapter of someone/base, or of another model"),
        (lambda t: t.clear(), {}, "changes nothing: save the adapter again"),
        (lambda t: t.pop(f"base_model.model.{Q}.lora_B.weight"), {}, f"has only one matrix for {Q}"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}),
            {},
            "has base_model.model.lm_head.weight, which is not of a LoRA of linear layers",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)}),
            {},
            "embed_tokens.lora_embedding_A, which is not of a LoRA of linear layers",
        ),
        (
            lambda t: t.update({f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 96)}),
            {},
            rf"matrices of \(4, 96\) and \(128, 4\) for {Q}, whose weight is \(128, 128\) here",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 4)}),
            {},
            "changes model.layers.9.mlp.up_proj, which model does not have: it is an adapter of someone/base",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 4)}),
            {},
            "changes lm_head, which embedding and LM head share",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 4)}),
            {},
            "has only one matrix for model.norm",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    edit: Callable[[dict[str, Tensor]], Any], entries: dict[str, Any], message: str, base: Path, adapter: Path
) -> None:
    change(adapter, edit, **entries)
    with pytest.raises(CheckpointError, match=message):
        open_source(base, adapter)


def test_a_pattern_that_takes_for_ever_is_refused(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdi.checkpoint.adapter.MATCH_S", 0.2)
    change(adapter, lambda _: None, rank_pattern={"(.|..)+[!?]": 4})
    with pytest.raises(CheckpointError, match=r"the pattern '.*' takes too long to match: write a simpler one"):
        open_source(base, adapter)


def test_files_that_are_missing_are_named(base: Path, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no adapter folder"):
        open_source(base, adapter / "nowhere")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        open_source(base, base)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
        open_source(base, adapter)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        open_source(base, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"has an adapter_model\.bin, which may run code"):
        open_source(base, adapter)


def test_a_base_that_is_quantised_already_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_quantized(base, tmp_path / "packed", Packer())
    file = write_gguf(base, tmp_path / "model.gguf", "Q4_0")
    for path in (tmp_path / "packed", gguf_folder(file)):
        with pytest.raises(
            CheckpointError, match=r"is quantised already, .*: use the checkpoint that it was made from"
        ):
            open_source(path, adapter)
