"""Checkpoints of GPTQ and AWQ: their numbers are taken as they are, and what is not supported is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.checkpoints import tiny_config, tiny_text_config
from testing.quantized_files import Packer, write_quantized
from torch import Tensor

from mdi import Engine, SamplingParams
from mdi.bench.verify import verify
from mdi.checkpoint.calibration import CalibrationText
from mdi.checkpoint.gguf_formats import EXACT
from mdi.checkpoint.loader import chunk_weights
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare, prepared
from mdi.checkpoint.quantized import QuantizedSource
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import Source, open_source
from mdi.checkpoint.weights import RoundedWeights
from mdi.core.errors import CheckpointError
from mdi.core.quantization import FORMATS, INT4, INT8, UNQUANTIZED, ModelQuantization
from mdi.layers.quantize import dequantize
from mdi.models.decoder import EMBEDDING, LM_HEAD

PACKERS = {
    "int4": Packer(),
    "int4-zeros": Packer(symmetric=False),
    "int4-ordered": Packer(desc_act=True, group=32),
    "int4-zeros-ordered": Packer(desc_act=True, symmetric=False, group=64, second_format=True),
    "int8": Packer(bits=8, group=-1),
    "int8-groups": Packer(bits=8),
    "int8-groups-ordered": Packer(bits=8, desc_act=True, group=64),
}
AWQ = Packer("awq", group=64)
WITHOUT_GROUPS = Packer(group=-1, desc_act=True, second_format=True)
ALL = [*PACKERS.values(), AWQ, WITHOUT_GROUPS]
DOWN, Q = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_text_config(
        "llama", num_hidden_layers=3, hidden_size=128, intermediate_size=256, tie_word_embeddings=False
    )
    return write_random_checkpoint(tmp_path_factory.mktemp("plain") / "model", config)


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Callable[[Packer], Path]:
    """Writes the packed copy of the same checkpoint."""

    def write(packer: Packer) -> Path:
        write_quantized(plain, tmp_path / "packed", packer)
        return tmp_path / "packed"

    return write


def quantized_source(path: Path) -> QuantizedSource:
    source = open_source(path)
    assert isinstance(source, QuantizedSource)
    return source


@pytest.mark.parametrize("packer", ALL, ids=str)
def test_weights_are_those_that_were_packed(packer: Packer, plain: Path, tmp_path: Path) -> None:
    exact = write_quantized(plain, tmp_path / "packed", packer)
    source = quantized_source(tmp_path / "packed")
    assert source.names() == exact.keys()
    format_ = source.packing.format
    for name, weight in exact.items():
        assert source.spec(name).shape == weight.shape
        assert torch.equal(source.tensor(name).float(), weight)
        if name.endswith("_proj.weight"):
            made = source.quantized(name, format_)
            assert made is not None
            assert torch.equal(dequantize(made), weight)


@pytest.mark.parametrize(
    ("text", "lines"), [(CalibrationText("mine.txt", "A text."), 1), (CalibrationText.default(), 0)]
)
def test_a_calibration_text_that_is_not_used_is_named(
    text: CalibrationText, lines: int, packed: Callable[[Packer], Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = quantized_source(packed(AWQ))
    folder = prepare(source, 2, quantization=source.quantization, calibration=text)
    assert Manifest.read(folder).calibration is None
    assert (
        caplog.text.count("the calibration text 'mine.txt' is not used: the checkpoint is quantised already") == lines
    )


@pytest.mark.parametrize("name", PACKERS)
def test_formats_are_named_by_what_the_weights_need(name: str, packed: Callable[[Packer], Path]) -> None:
    assert quantized_source(packed(PACKERS[name])).quantization == ModelQuantization(name)


@pytest.mark.parametrize("packer", [Packer(bits=8, group=32), Packer(bits=8, symmetric=False, group=-1)], ids=str)
def test_8_bits_that_int8_does_not_have_are_rounded_once_more(
    packer: Packer, packed: Callable[[Packer], Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = quantized_source(packed(packer))
    assert "its weights are rounded once more, to one scale an output" in caplog.text
    assert source.quantization == ModelQuantization("int8")
    made, exact = RoundedWeights(source).quantized(f"{DOWN}.weight", INT8), source.tensor(f"{DOWN}.weight")
    assert 0 < (dequantize(made) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("packer", [PACKERS["int4-zeros-ordered"], PACKERS["int8-groups-ordered"], AWQ], ids=str)
@pytest.mark.parametrize("n_nodes", [1, 3])
def test_chunks_have_the_same_numbers(packer: Packer, n_nodes: int, plain: Path, tmp_path: Path) -> None:
    exact = write_quantized(plain, tmp_path / "packed", packer)
    source = open_source(tmp_path / "packed")
    folder = prepare(source, n_nodes, dtype="bfloat16", quantization=source.quantization)
    manifest = Manifest.read(folder)
    assert manifest.quantization == source.quantization
    assert manifest.calibration is None
    for chunk in manifest.chunks:
        for name, weight in chunk_weights(folder / chunk.file):
            expected = exact[name] if name.endswith("_proj.weight") else exact[name].bfloat16()
            assert torch.equal(weight, expected), name


def test_matrices_that_are_left_out_stay_as_they_are(plain: Path, tmp_path: Path) -> None:
    """As by `modules_to_not_convert` of AWQ, and by `dynamic` of GPTQModel. The head may be quantised."""
    left_out = f"{DOWN}.weight"
    exact = write_quantized(
        plain, tmp_path / "packed", Packer(), lambda name: name == LM_HEAD or ("_proj" in name and name != left_out)
    )
    source = open_source(tmp_path / "packed")
    assert source.quantization == ModelQuantization("int4", "int4", kept=(left_out,))
    folder = prepare(source, 1, quantization=source.quantization)
    weights = dict(chunk_weights(folder / "model_starter.safetensors"))
    for name in (left_out, LM_HEAD):
        assert torch.equal(weights[name], exact[name])


def test_a_server_takes_the_formats_of_the_checkpoint(packed: Callable[[Packer], Path]) -> None:
    path, question, greedy = packed(AWQ), "What is at hand?", SamplingParams(temperature=0, max_tokens=8)
    answers = []
    for settings in ({}, {"quantization": "int4", "head_quantization": "none"}, {"n_nodes": 2}):
        with Engine(path, **settings) as engine:
            assert engine.nodes()[0].quantization == ModelQuantization("int4-zeros")
            answers.append(engine.chat(question, greedy).token_ids)
    assert answers[0] == answers[1] == answers[2]
    assert [folder.name for folder in (path / "chunks").iterdir()] == ["2nodes"]  # one node needs none


def test_another_format_is_rounded_to_where_it_is_asked_for(
    packed: Callable[[Packer], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = open_source(packed(AWQ))
    stored = source.quantization
    assert ModelQuantization.asked(None, None, None, stored) is None
    assert ModelQuantization.asked("none", None, None, stored) == UNQUANTIZED
    assert ModelQuantization.asked("int4", "int8", None, stored) == ModelQuantization("int4-zeros", "int8")
    int8 = ModelQuantization.asked("int8", "none", None, stored)
    assert int8 == ModelQuantization("int8")
    with (
        closing(prepared(source, 1, quantization=int8)) as made,
        closing(prepared(source, 1, quantization=stored)) as as_is,
    ):
        assert as_is.folder.name == "1nodes"
        assert made.folder.name == "1nodes-float32-int8-head-none"
        assert "are now int8 (head none): a relative error of " in caplog.text
        weights, exact = dict(chunk_weights(made.file("starter"))), source.tensor(f"{DOWN}.weight")
    assert 0 < (weights[f"{DOWN}.weight"] - exact).norm() < 0.01 * exact.norm()


def test_a_vision_tower_stays_in_floats_or_is_quantised(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2, vision_config={"embed_dim": 64})
    plain = write_random_checkpoint(tmp_path / "plain", config)
    write_quantized(plain, tmp_path / "packed", Packer(group=32))
    source = open_source(tmp_path / "packed")
    assert source.quantization == ModelQuantization("int4")
    asked = ModelQuantization.asked(None, None, "int8", source.quantization)
    assert asked == ModelQuantization("int4", vision="int8")
    folder = prepare(source, 1, quantization=asked)
    weights = load_file(folder / "model_starter.safetensors")
    assert weights["visual.blocks.0.attn.qkv.weight"].dtype == torch.int8
    assert weights[EMBEDDING].dtype == torch.float32


@pytest.mark.parametrize("packer", [Packer(group=64, desc_act=True), AWQ], ids=str)
def test_verify_finds_no_difference_to_transformers(packer: Packer, packed: Callable[[Packer], Path]) -> None:
    source = open_source(packed(packer))
    messages = [{"role": "user", "content": "What is at hand?"}]
    report = verify(source, messages, dtype="float32", quantization=source.quantization, n_nodes=2, max_tokens=8)
    assert report.same_prompt
    assert report.cosine > 0.999
    assert report.first_difference is None


# what is refused


def change_entries(path: Path, **entries: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= entries
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"bits": 3}, "quantization_config.bits is 3: supported are GPTQ with 4 or 8 bits, AWQ with 4 bits"),
        ({"bits": "4"}, "quantization_config.bits should be a valid integer"),
        ({"group_size": 16}, "group_size is 16: supported are multiples of 32, and -1"),
        ({"group_size": 0}, "group_size is 0: supported are multiples of 32, and -1"),
        ({"checkpoint_format": "marlin"}, "GPTQ in the format 'marlin' is not supported: convert it to"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, r"settings of their own for some modules \(dynamic\)"),
        ({"quant_method": "awq", "bits": 8}, "quantization_config.bits is 8: supported are"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ is supported in its version 'gemm' with zero_point only"),
        ({"quant_method": "awq", "zero_point": False}, "AWQ is supported in its version 'gemm' with zero_point only"),
        *(
            ({"quant_method": method}, f"weights quantised by {method!r} are not supported: use GPTQ with 4 or 8 bits")
            for method in ("fp8", "bitsandbytes", "compressed-tensors", None)
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    entries: dict[str, Any], message: str, packed: Callable[[Packer], Path]
) -> None:
    path = packed(Packer())
    change_entries(path, **entries)
    with pytest.raises(CheckpointError, match=rf"^config.json: .*{message}"):
        open_source(path)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.qzeros"), f"the weights lack the tensor {Q}.qzeros"),
        (lambda t: t.pop(f"{Q}.scales"), f"the weights lack the tensor {Q}.scales"),
        (lambda t: t.pop(f"{Q}.g_idx"), f"the weights lack the tensor {Q}.g_idx"),
        (lambda t: t.pop(f"{Q}.qweight"), f"has no tensor {Q}.g_idx"),
        (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:2]}), rf"{Q}.scales has shape \[2, 128\]"),
        (lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"][:96]}), rf"{Q}.g_idx has shape \[96\]"),
        (lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][0]}), rf"{Q}.qzeros is I32 \[16\], which"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}), f"{Q}.qweight is float32"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:, :64].clone()}), rf"{Q}.scales has shape"),
        (lambda t: t[f"{Q}.g_idx"].__setitem__(5, 4), f"{Q}.g_idx names a group that is not one of 4"),
        (lambda t: t[f"{Q}.g_idx"].__setitem__(5, -1), f"{Q}.g_idx names a group that is not one of 4"),
        (lambda t: t[f"{Q}.g_idx"].fill_(0)[:7].fill_(1), f"{Q}.g_idx has groups that are no multiple of 32 inputs"),
        (
            lambda t: t[f"{Q}.scales"].__setitem__((0, 1), torch.nan),
            f"{Q}.scales has numbers that are infinite or none",
        ),
        (lambda t: t[f"{Q}.qzeros"].fill_(0), f"{Q}.qzeros has zeros that are not 8, but .* says sym"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], Any], message: str, packed: Callable[[Packer], Path]
) -> None:
    path = packed(PACKERS["int4-ordered"])
    change_tensors(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_all(open_source(path))


def load_all(source: Source) -> None:
    prepare(source, 1, quantization=source.quantization)


def test_a_bias_that_the_model_does_not_have_may_be_zero_only(packed: Callable[[Packer], Path]) -> None:
    path = packed(Packer())
    change_tensors(path, lambda tensors: tensors.update({f"{Q}.bias": torch.zeros(128)}))
    load_all(open_source(path))
    change_tensors(path, lambda tensors: tensors[f"{Q}.bias"][5].fill_(1))
    with pytest.raises(CheckpointError, match=f"LlamaForCausalLM has no tensor {Q}.bias"):
        open_source(path)


def test_an_order_that_config_json_does_not_name_is_refused(packed: Callable[[Packer], Path]) -> None:
    path = packed(PACKERS["int4-ordered"])
    change_entries(path, desc_act=False)
    with pytest.raises(CheckpointError, match="g_idx orders inputs, but quantization_config says no desc_act"):
        load_all(open_source(path))


def test_a_model_of_another_size_is_refused(packed: Callable[[Packer], Path]) -> None:
    path = packed(AWQ)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"has shape \[256, 128\], but config.json asks for \[128, 128\]"):
        load_all(open_source(path))


def test_every_format_has_a_packer() -> None:
    of_gguf_alone = EXACT.keys() - {INT4.name}
    assert PACKERS.keys() == FORMATS.keys() - of_gguf_alone
