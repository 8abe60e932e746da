"""Checkpoints as people have them: odd, damaged, contradictory. A model that loads answers as transformers does."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from testing.checkpoints import tiny_config, tiny_text_config
from testing.oracle import Oracle

from mdi import Engine, SamplingParams
from mdi.checkpoint.generation import end_ids
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.processing import media_specs
from mdi.checkpoint.published import PUBLISHED
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.safetensors import INDEX, SINGLE
from mdi.checkpoint.source import open_source
from mdi.cli import app as cli
from mdi.core.errors import CheckpointError
from mdi.media import image_patches
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.registry import read_config

CONFIG, GENERATION, IMAGES = "config.json", "generation_config.json", "preprocessor_config.json"
PROCESSOR = "processor_config.json"
GREEDY = SamplingParams(temperature=0, max_tokens=8)
QUESTION = "What is at hand?"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2\n"

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("vision") / "model", tiny_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("text") / "model", tiny_text_config(num_hidden_layers=2))


@pytest.fixture
def vision_model(vision: Path, tmp_path: Path) -> Path:
    """A Qwen2-VL for the test to change."""
    return Path(shutil.copytree(vision, tmp_path / "vision", ignore=shutil.ignore_patterns("chunks")))


@pytest.fixture
def text_model(text: Path, tmp_path: Path) -> Path:
    """A Qwen2 for the test to change."""
    return Path(shutil.copytree(text, tmp_path / "text", ignore=shutil.ignore_patterns("chunks")))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(data.coffee()).resize((112, 84))


def change(path: Path, file: str, **entries: Any) -> None:
    """Replaces entries of a JSON file; `...` removes one."""
    content = json.loads((path / file).read_text()) if (path / file).exists() else {}
    content |= entries
    (path / file).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_weights(path: Path, edit: Callable[[Weights], Weights]) -> None:
    save_file(edit(load_file(path / SINGLE)), path / SINGLE, {"format": "pt"})


def nest(path: Path) -> None:
    """Brings config.json into the nested form of transformers 5."""
    config = json.loads((path / CONFIG).read_text())
    outside = ("architectures", "model_type", "vision_config", "tie_word_embeddings", "torch_dtype")
    top = {key: value for key, value in config.items() if key in outside or key.endswith("token_id")}
    inner = {key: value for key, value in config.items() if key not in top}
    (path / CONFIG).write_text(json.dumps({**top, "text_config": inner}))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def our_answer(path: Path, picture: Image.Image | None = None, n_nodes: int = 1) -> list[int]:
    media = [{"type": "image", "image": png(picture)}] if picture else []
    content = [*media, {"type": "text", "text": QUESTION}] if media else QUESTION
    with Engine(path, sequence_length=1024, n_nodes=n_nodes) as engine:
        return list(engine.chat([{"role": "user", "content": content}], GREEDY).token_ids)


def refusal(path: Path) -> str:
    """What the user is told, where the model cannot be loaded."""
    with pytest.raises(CheckpointError) as refused, Engine(path):
        pass
    assert "\n" not in str(refused.value)
    return str(refused.value)


def assert_cut_as_in_transformers(picture: Image.Image, path: Path) -> None:
    theirs = Oracle(path).features(picture)
    spec, _ = media_specs(open_source(path))
    assert spec is not None
    ours = image_patches(picture, spec)
    assert [list(ours.grid)] == theirs["image_grid_thw"].tolist()
    np.testing.assert_array_max_ulp(ours.rows, theirs["pixel_values"].numpy(), maxulp=1)


def test_settings_of_transformers_5_are_read_and_win(vision_model: Path, picture: Image.Image) -> None:
    """A2: `processor_config.json` alone, and beside an older `preprocessor_config.json`."""
    old = json.loads((vision_model / IMAGES).read_text())
    nested = {**old, "size": {"shortest_edge": 784, "longest_edge": 3136}, "image_mean": [0.5] * 3}
    del nested["min_pixels"], nested["max_pixels"]
    (vision_model / PROCESSOR).write_text(json.dumps({"image_processor": nested}))
    for _ in range(2):
        assert_cut_as_in_transformers(picture, vision_model)
        (vision_model / IMAGES).unlink(missing_ok=True)
    assert our_answer(vision_model, picture) == Oracle(vision_model).answer(QUESTION, picture)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": 0.4, "image_std": 2},
        {"rescale_factor": 0.5},
        {"patch_size": ..., "image_mean": ...},
        {"do_normalize": None, "do_rescale": None},
        {"size": {"shortest_edge": 784, "longest_edge": 3136}, "min_pixels": None, "max_pixels": None},
        {"size": {"shortest_edge": 784, "longest_edge": 3136}, "min_pixels": 1568},
    ],
)
def test_pictures_are_scaled_as_in_transformers(
    settings: dict[str, Any], vision_model: Path, picture: Image.Image
) -> None:
    """A2, its brothers: every setting is followed."""
    change(vision_model, IMAGES, **settings)
    assert_cut_as_in_transformers(picture, vision_model)


def test_one_file_of_weights_goes_before_an_index_beside_it(text_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A3: transformers loads `model.safetensors`; a warning names both."""
    config = json.loads((text_model / CONFIG).read_text())
    older = write_random_checkpoint(text_model.parent / "older", config, seed=1, shards=2)
    for file in older.glob("model*"):
        shutil.copy(file, text_model)
    with caplog.at_level(logging.WARNING):
        answer = our_answer(text_model)
    assert answer == Oracle(text_model).answer(QUESTION)
    assert answer != our_answer(older)
    assert f"{SINGLE} and {INDEX}" in caplog.text


def test_an_index_and_its_files_name_the_same_tensors(tmp_path: Path) -> None:
    """A3, its brothers: an index of another download, a file beyond the folder."""
    path = write_random_checkpoint(tmp_path / "model", tiny_text_config(num_hidden_layers=2), shards=2)
    index = json.loads((path / INDEX).read_text())
    files = index["weight_map"]
    first, second = sorted(set(files.values()))
    name = next(name for name, file in files.items() if file == first)
    for changed in ({**files, name: second}, {**files, "model.more": first}):
        change(path, INDEX, weight_map=changed)
        assert f"{INDEX} and model-0000" in refusal(path)
    change(path, INDEX, weight_map={**files, name: f"../{path.name}/{first}"})
    assert refusal(path) == f"{INDEX} is damaged: download it again"


def test_two_names_of_one_tensor_are_refused(vision_model: Path) -> None:
    """A3, its brothers: the names of two releases of transformers in one file."""
    name = "model.layers.0.mlp.up_proj.weight"
    twin = name.replace("model.", "model.language_model.")
    change_weights(vision_model, lambda weights: weights | {twin: torch.zeros_like(weights[name])})
    assert f"{twin} and {name} are two names of one tensor" in refusal(vision_model)


def test_mrope_without_sections_is_transformers_default_or_refused(
    vision_model: Path, tmp_path: Path, picture: Image.Image
) -> None:
    """A4: [16, 24, 24] where heads have 128 channels."""
    change(vision_model, CONFIG, rope_scaling=None)
    assert refusal(vision_model).startswith("config.json: mrope_section is transformers' default [16, 24, 24]")
    config = tiny_config(num_hidden_layers=2, hidden_size=256, num_attention_heads=2, num_key_value_heads=1)
    path = write_random_checkpoint(tmp_path / "wide", config | {"rope_scaling": None})
    assert our_answer(path, picture) == Oracle(path).answer(QUESTION, picture)


@pytest.mark.parametrize(
    ("form", "n_nodes"), [("flat", 1), ("nested", 1), ("flat", 2), pytest.param("nested", 2, marks=pytest.mark.slow)]
)
def test_a_stored_head_wins_over_the_flag_for_tied_embeddings(form: str, n_nodes: int, vision_model: Path) -> None:
    """A5: also in the chunks of several nodes."""
    if form == "nested":
        nest(vision_model)
    head = torch.randn(272, 64, generator=torch.Generator().manual_seed(1))
    change_weights(vision_model, lambda weights: weights | {LM_HEAD: head})
    assert our_answer(vision_model, n_nodes=n_nodes) == Oracle(vision_model).answer(QUESTION)


def test_an_equal_stored_head_stays_tied(vision_model: Path) -> None:
    """A5: the copy that some releases store takes no memory."""
    change_weights(vision_model, lambda weights: weights | {LM_HEAD: weights[EMBEDDING].clone()})
    assert open_source(vision_model).model_config.tied_embeddings


@pytest.mark.parametrize("entry", ["patch_size", "temporal_patch_size", "merge_size"])
def test_patches_of_another_size_than_the_towers_are_refused(entry: str, vision_model: Path) -> None:
    """A7: with both values, before any node starts."""
    change(vision_model, IMAGES, **{entry: 16})
    assert f"{IMAGES}: {entry} is 16, but the vision tower of config.json has" in refusal(vision_model)


@pytest.mark.parametrize("missing", ["rope_theta", "rms_norm_eps", "max_position_embeddings", "hidden_act"])
@pytest.mark.parametrize("name", ["vision_model", "text_model"])
def test_what_config_json_leaves_out_is_the_default_of_transformers_class(
    name: str, missing: str, request: pytest.FixtureRequest
) -> None:
    """A10: rope_theta of Qwen2 is 10000, that of Qwen2-VL 1000000; their eps differ as well."""
    path = request.getfixturevalue(name)
    change(path, CONFIG, **{missing: ...})
    theirs = Oracle(path).model.config.get_text_config()
    ours = open_source(path).model_config
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rms_eps, ours.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert our_answer(path) == Oracle(path).answer(QUESTION)


def test_a_default_that_contradicts_the_weights_is_refused(text_model: Path) -> None:
    """A10: transformers' Qwen2 has 32 heads of keys and values."""
    change(text_model, CONFIG, num_key_value_heads=...)
    assert "num_attention_heads 4 is not a multiple of num_key_value_heads 32" in refusal(text_model)


def test_entries_of_the_decoder_are_those_of_its_own_part(vision_model: Path, picture: Image.Image) -> None:
    """A10, its brothers: beside `text_config`, the top level says nothing about the decoder."""
    nest(vision_model)
    change(vision_model, CONFIG, rope_theta=123.0, rms_norm_eps=0.5, num_hidden_layers=1)
    assert our_answer(vision_model, picture) == Oracle(vision_model).answer(QUESTION, picture)


def test_rope_scaling_goes_before_rope_parameters(vision_model: Path, picture: Image.Image) -> None:
    """A10, its brothers: with its own base of frequencies."""
    change(vision_model, CONFIG, rope_parameters={"rope_theta": 5.0, "mrope_section": [8, 0, 0]})
    assert our_answer(vision_model, picture) == Oracle(vision_model).answer(QUESTION, picture)
    change(vision_model, CONFIG, rope_scaling=..., rope_theta=7.0)
    assert our_answer(vision_model, picture) == Oracle(vision_model).answer(QUESTION, picture)


def test_the_towers_own_base_of_frequencies_is_used(vision_model: Path, picture: Image.Image) -> None:
    """A10, its brothers."""
    config = json.loads((vision_model / CONFIG).read_text())
    change(vision_model, CONFIG, vision_config=config["vision_config"] | {"rope_parameters": {"rope_theta": 3.0}})
    assert our_answer(vision_model, picture) == Oracle(vision_model).answer(QUESTION, picture)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size should be a valid integer, got '64'"),
        ({"hidden_size": 64.0}, "hidden_size should be a valid integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers should be less than or equal to 1000"),
        ({"num_hidden_layers": True}, "num_hidden_layers should be a valid integer, got True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps should be greater than or equal to 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings should be a valid boolean, got 'yes'"),
        ({"rope_theta": 0}, "rope_scaling.rope_theta should be greater than 0"),
        ({"rope_scaling": [2, 3, 3]}, "rope_scaling is not a JSON object"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "RoPE scaling of type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, r"mrope_section is \[2, 3, 4\]"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 4]}}, r"mrope_section is \[4, 4\]"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 2"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layers with chunked_attention are not supported"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, ".* but sliding_window is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 8}, "mrope_section|4 heads of 8 do not make hidden_size 64"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"vision_config": {"patch_size": [14, 14]}}, "vision_config.patch_size should be a valid integer"),
        ({"vision_config": {}}, r"the tower's output \(vision_config\) has 3584 numbers, the decoder 64"),
        ({"text_config": []}, "text_config is not a JSON object"),
        ({"text_config": {}}, "text_config.vocab_size is missing"),
        ({"image_token_id": ...}, "image_token_id is 151655, but the model has 272 tokens"),
        ({"video_token_id": 262}, "image_token_id and video_token_id are both 262"),
        ({"image_token_id": 263, "video_token_id": 262}, "image_token_id is 263, but the tokenizer has .* with id 262"),
        ({"image_token_id": -1}, "image_token_id should be greater than or equal to 0"),
        ({"torch_dtype": "bf16"}, "dtype 'bf16' is not supported"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', but Qwen2VLForConditionalGeneration has 'qwen2_vl'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.bits is missing"),
        ({"quantization_config": "int8"}, "weights quantised by None are not supported: use GPTQ with 4 or 8 bits"),
    ],
)
def test_wrong_entries_of_config_json_are_refused_by_name(
    entries: dict[str, Any], message: str, vision_model: Path
) -> None:
    """B1 and the rest of config.json: type, range, and one entry against another."""
    change(vision_model, CONFIG, **entries)
    with pytest.raises(CheckpointError, match=f"^config.json: ({message})"), Engine(vision_model):
        pass


def test_a_window_that_no_layer_uses_is_no_reason_to_refuse(vision_model: Path, picture: Image.Image) -> None:
    """Entries that change nothing are accepted, as in transformers."""
    change(vision_model, CONFIG, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    assert our_answer(vision_model, picture) == Oracle(vision_model).answer(QUESTION, picture)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_token_without_a_row_in_the_embedding_is_refused(file: str, text_model: Path) -> None:
    """B1: whatever the template or a text would use it for."""
    if file == "tokenizer.json":
        model = json.loads((text_model / file).read_text())["model"]
        change(text_model, file, model={**model, "vocab": {**model["vocab"], "<new 272>": 272}})
    else:
        change(text_model, file, additional_special_tokens=[f"<new {index}>" for index in range(259, 273)])
    message = refusal(text_model)
    assert "the tokenizer has the token '<new 272>' with id 272, but the model has 272 tokens" in message


def with_dtype(path: Path, dtype: torch.dtype, **entries: Any) -> None:
    change(path, CONFIG, torch_dtype=..., **entries)
    change_weights(path, lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()})


@pytest.mark.parametrize("name", ["vision_model", "text_model"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_without_a_dtype_in_config_json_the_weights_are_used_as_they_are(
    dtype: str, name: str, request: pytest.FixtureRequest
) -> None:
    """C11: no dtype at all."""
    path = request.getfixturevalue(name)
    with_dtype(path, getattr(torch, dtype))
    assert str(Oracle(path).model.dtype) == f"torch.{dtype}"
    source = open_source(path)
    assert source.model_config.dtype == dtype
    assert all(source.spec(tensor).dtype == dtype for tensor in source.names())
    assert prepare(source, 2).is_dir()


def test_a_dtype_in_the_decoders_part_alone_is_not_that_of_the_model(vision_model: Path) -> None:
    """C11: transformers then takes the type of the weights."""
    nest(vision_model)
    inner = json.loads((vision_model / CONFIG).read_text())["text_config"]
    with_dtype(vision_model, torch.bfloat16, text_config={**inner, "torch_dtype": "float32"})
    assert str(Oracle(vision_model).model.dtype) == "torch.bfloat16"
    assert open_source(vision_model).model_config.dtype == "bfloat16"


@pytest.mark.parametrize("value", ["258", [258.0], ["258"], True, -1, 272, [256, 300], {"id": 258}])
def test_wrong_end_tokens_are_refused_with_the_files_name(value: Any, text_model: Path) -> None:
    """C22: an id is a whole number, and a token of the model."""
    change(text_model, GENERATION, eos_token_id=value)
    assert refusal(text_model).startswith(f"{GENERATION}: eos_token_id")


def test_an_end_token_of_config_json_is_checked_where_it_counts(text_model: Path) -> None:
    """B1: other than tokens that nothing uses."""
    change(text_model, CONFIG, eos_token_id=272, bos_token_id=272)
    with Engine(text_model):  # generation_config.json has others
        pass
    change(text_model, GENERATION, eos_token_id=None)
    assert refusal(text_model).startswith(f"{CONFIG}: eos_token_id is 272, but the model has 272 tokens")


@pytest.mark.parametrize("value", [258, [256], [256, 258]])
def test_end_tokens_are_those_of_transformers(value: Any, text_model: Path) -> None:
    """C22."""
    change(text_model, GENERATION, eos_token_id=value)
    assert set(end_ids(open_source(text_model))) == Oracle(text_model).end_ids


@pytest.mark.parametrize(
    "entries",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [65]},
        {"bad_words_ids": [[65]]},
        {"forced_eos_token_id": 258},
        {"do_sample": "yes"},
        {"repetition_penalty": 0},
        {"do_sample": True, "temperature": "warm"},
    ],
)
def test_settings_that_are_not_computed_here_are_refused(entries: dict[str, Any], text_model: Path) -> None:
    """C22, its brothers: an answer is transformers', or there is none."""
    change(text_model, GENERATION, **entries)
    assert refusal(text_model).startswith(f"{GENERATION}: {[*entries][-1]}")


def test_a_repetition_penalty_holds_for_greedy_answers(text_model: Path) -> None:
    """C22, its brothers."""
    change(text_model, GENERATION, repetition_penalty=1.3)
    assert our_answer(text_model) == Oracle(text_model).answer(QUESTION)


FILES = [CONFIG, GENERATION, IMAGES, "tokenizer.json", "tokenizer_config.json", SINGLE]


@pytest.mark.parametrize("file", FILES)
def test_a_git_lfs_pointer_is_named_with_the_remedy(file: str, vision_model: Path) -> None:
    """C3: whichever file it stands for."""
    (vision_model / file).write_text(POINTER)
    message = f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in '{vision_model}'"
    assert refusal(vision_model).startswith(message)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "no object": lambda path: path.write_text('["a"]'),
    "pairs": lambda path: path.write_text('[["a", 1]]'),
    "another encoding": lambda path: path.write_bytes('{"größe": 1}'.encode("latin-1")),
    "not a number": lambda path: path.write_text('{"a": NaN}'),
    "nested": lambda path: path.write_text("[" * 10**5 + "]" * 10**5),
    "half a character": lambda path: path.write_text('{"a": "\\ud800"}'),
    "a long number": lambda path: path.write_text(f'{{"a": 1{"0" * 5000}}}'),
    "a folder": make_folder,
    "a dangling link": make_dangling,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*FILES[:-1], PROCESSOR])
def test_a_damaged_json_file_is_named_with_the_remedy(file: str, damage: str, vision_model: Path) -> None:
    """C3, its brothers: one function reads all of them."""
    (vision_model / file).touch()
    DAMAGES[damage](vision_model / file)
    message = refusal(vision_model)
    assert file in message
    assert "download it again" in message


@pytest.mark.parametrize("damage", ["empty", "cut", "a folder", "a dangling link"])
def test_damaged_weights_are_named_with_the_remedy(damage: str, vision_model: Path) -> None:
    """C3, its brothers."""
    DAMAGES[damage](vision_model / SINGLE)
    message = refusal(vision_model)
    assert SINGLE in message
    assert "again" in message


@pytest.mark.parametrize("command", ["ask", "serve", "prepare", "plan"])
@pytest.mark.parametrize("file", [CONFIG, SINGLE, "tokenizer.json", GENERATION, IMAGES])
def test_every_command_says_it_in_one_line_with_exit_status_2(
    command: str,
    file: str,
    vision_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """C3: as a user sees it. Chunks are made of config.json and weights alone."""
    (vision_model / file).write_text(POINTER)
    arguments = {"ask": [QUESTION], "serve": ["--port", "0"], "prepare": ["--n-nodes", "2"], "plan": []}[command]
    monkeypatch.setattr(sys, "argv", ["mdi", command, str(vision_model), *arguments])
    if command in ("prepare", "plan") and file not in (CONFIG, SINGLE):
        with suppress(SystemExit):
            cli.main()
        assert "error" not in capfd.readouterr().err
        return
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {file} is a Git LFS pointer, not the file itself: run `git lfs pull` in")


def test_a_published_config_reads_as_in_transformers() -> None:
    """Whatever is checked: the models that people have are read."""
    for config in PUBLISHED.values():
        assert read_config(config).n_layers == config.get("text_config", config)["num_hidden_layers"]
