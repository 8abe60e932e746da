"""A calibration text decides how int4 weights of the decoder are rounded, and chunks say which text it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.checkpoints import tiny_gemma_config, tiny_text_config
from torch import Tensor

from mdi.checkpoint import calibration
from mdi.checkpoint.calibration import MIN_SEQUENCES, SEQUENCE, CalibratedWeights, CalibrationText
from mdi.checkpoint.loader import chunk_weights, load_chunk, load_source
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare, prepared
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.safetensors import SINGLE
from mdi.checkpoint.source import Source, open_source
from mdi.checkpoint.weights import RoundedWeights
from mdi.core.batch import Batch, Slice
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.quantization import INT4, INT8, ModelQuantization, QuantizedTensor
from mdi.layers.quantize import dequantize
from mdi.layers.rope import text_positions
from mdi.models.config import StageSpec
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage, stage_specs

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.5.mlp.down_proj.weight"
FC1 = "visual.blocks.0.mlp.fc1.weight"
INT4_ALL = ModelQuantization("int4", "int4", "int4")
DEFAULT_TEXT = CalibrationText.default()
SHORT = CalibrationText("short", DEFAULT_TEXT.text[: 2 * MIN_SEQUENCES * SEQUENCE])
HELD_OUT = DEFAULT_TEXT.text[-SEQUENCE:]


def logits(loaded: LoadedStage, text: str) -> Tensor:
    return logits_of(loaded, torch.tensor(list(text.encode()))[:SEQUENCE])  # the tokens of the tiny models are bytes


def logits_of(loaded: LoadedStage, ids: Tensor) -> Tensor:
    stage = Stage(loaded, n_slots=1, sequence_length=SEQUENCE)
    batch = Batch(0, (Slice(0, 0, len(ids)),), text_positions(0, len(ids)))
    return stage.logits(batch, stage.embed(ids)).float()


def divergence(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.log_softmax(-1), other.log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def chunk(source: Source, text: CalibrationText | None, n_nodes: int = 1) -> Path:
    return prepare(source, n_nodes, quantization=INT4_ALL, calibration=text) / "model_starter.safetensors"


def test_calibrated_chunks_are_nearer_to_the_model_than_rounded_ones(text_only: Path) -> None:
    source = open_source(text_only)
    exact = logits(load_source(source), HELD_OUT)
    rounded = divergence(exact, logits(load_chunk(chunk(source, None)), HELD_OUT))
    calibrated = divergence(exact, logits(load_chunk(chunk(source, SHORT)), HELD_OUT))
    assert calibrated < 0.8 * rounded


@pytest.mark.parametrize(
    "config", [tiny_text_config(), tiny_gemma_config(tie_word_embeddings=True)], ids=["qwen2", "gemma3"]
)
def test_products_are_calibrated_with_what_the_model_gives_them(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the head, where nothing is rounded on the way."""
    source, read = open_source(write_random_checkpoint(tmp_path / "model", config)), dict[str, Tensor]()
    weights = CalibratedWeights(source, SHORT, INT4_ALL)

    def calibrate(names: Sequence[str], x: Tensor, _min_rows: int = 1) -> dict[str, QuantizedTensor]:
        read[names[0]] = x
        return {}

    monkeypatch.setattr(weights, "calibrate", calibrate)
    assert len(list(weights._parts)) == source.model_config.n_layers + 1
    made = read[LM_HEAD][:SEQUENCE] @ source.tensor(EMBEDDING).T
    exact = logits_of(load_source(source), SHORT.sequences(source)[0])
    assert (made - exact).norm() < 1e-4 * exact.norm()


def test_the_same_text_makes_the_same_weights_for_any_number_of_nodes_and_another_one_others(source: Source) -> None:
    alone = dict(chunk_weights(chunk(source, SHORT)))
    folder = chunk(source, SHORT, 3).parent
    for entry in Manifest.read(folder).chunks:
        assert all(torch.equal(weight, alone[name]) for name, weight in chunk_weights(folder / entry.file))
    other = dict(chunk_weights(chunk(source, CalibrationText("other", SHORT.text[::-1]))))
    assert not any(torch.equal(other[name], alone[name]) for name in (Q, DOWN, LM_HEAD))


def test_only_int4_weights_of_the_decoder_are_calibrated(source: Source) -> None:
    quantization = ModelQuantization("int4", "int8", "int4", kept=(Q,))
    weights, rounded = CalibratedWeights(source, SHORT, quantization), RoundedWeights(source)
    for name, format_ in ((FC1, INT4), (LM_HEAD, INT8)):
        assert torch.equal(weights.quantized(name, format_).values, rounded.quantized(name, format_).values)
    assert not torch.equal(weights.quantized(DOWN, INT4).values, rounded.quantized(DOWN, INT4).values)


def test_calibrated_weights_stay_near_the_checkpoint_s(source: Source) -> None:
    made = dequantize(CalibratedWeights(source, SHORT, INT4_ALL).quantized(Q, INT4))
    assert torch.nn.functional.cosine_similarity(made.flatten(), source.tensor(Q).flatten(), dim=0) > 0.98


def test_the_manifest_names_the_text(source: Source) -> None:
    entry = Manifest.read(chunk(source, SHORT).parent).calibration
    assert entry is not None
    assert (entry.name, entry.sha256) == ("short", SHORT.sha256)
    assert Manifest.read(chunk(source, None).parent).calibration is None
    folder = prepare(source, 1, quantization=ModelQuantization("int8", "int8", "int4"), calibration=SHORT)
    assert Manifest.read(folder).calibration is None  # nothing of it depends on the text


def test_a_server_takes_calibrated_chunks_of_any_text_and_makes_those_of_the_default_one(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MAX_SEQUENCES", MIN_SEQUENCES)
    for text in (None, SHORT):
        chunk(source, text, 2)
        made = prepared(source, 2, quantization=INT4_ALL)
        assert (made.manifest.calibration is None) == (text is None)
        made.close()
    made = prepared(source, 1, quantization=ModelQuantization("int4", "int4"))
    assert made.manifest.calibration
    assert made.manifest.calibration.name == "default"
    made.close()


# bad input


def test_a_text_that_is_too_short_is_refused_with_how_much_is_needed(source: Source) -> None:
    with pytest.raises(ConfigError, match=r"'short' has 2047 tokens, but at least 2048 are needed"):
        chunk(source, CalibrationText("short", "x" * (MIN_SEQUENCES * SEQUENCE - 1)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.txt' cannot be read \(No such file"):
        CalibrationText.read(tmp_path / "missing.txt")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory"):
        CalibrationText.read(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Müller".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt' is not UTF-8"):
        CalibrationText.read(tmp_path / "latin.txt")


def test_a_file_s_text_and_name_are_taken(tmp_path: Path) -> None:
    (tmp_path / "talk.txt").write_text("Grüße\n", encoding="utf-8")
    assert CalibrationText.read(tmp_path / "talk.txt") == CalibrationText("talk.txt", "Grüße\n")


def test_a_damaged_weight_is_named(source: Source) -> None:
    weights = load_file(source.path / SINGLE)
    weights["model.layers.2.input_layernorm.weight"][0] = float("nan")
    save_file(weights, source.path / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"what model\.layers\.2\.self_attn\.q_proj\.weight reads"):
        chunk(source, SHORT)


@pytest.mark.parametrize("least", [1, 64, 10**9])
def test_experts_that_read_too_little_of_the_text_are_rounded_to_the_nearest(
    least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MIN_ROWS", least)
    config = tiny_text_config(
        "qwen3_moe", num_experts=40, num_experts_per_tok=1, moe_intermediate_size=64, num_hidden_layers=2
    )
    source = open_source(write_random_checkpoint(tmp_path / "model", config))
    weights, rounded = CalibratedWeights(source, SHORT, INT4_ALL), RoundedWeights(source)
    same = [
        torch.equal(weights.quantized(name, INT4).values, rounded.quantized(name, INT4).values)
        for name in stage_specs(source.model_config, StageSpec(0, 2), "float32")
        if ".experts." in name
    ]
    assert len(same) == 2 * 40 * 3
    assert all(same) if least > 64 else not all(same)
    assert least == 1 or any(same)
