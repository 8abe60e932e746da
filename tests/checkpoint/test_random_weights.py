"""The random checkpoints are what transformers takes for the real thing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from testing.checkpoints import tiny_config, tiny_deepstack_config
from transformers import (
    AutoTokenizer,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from typer.testing import CliRunner

from mdi.checkpoint.cache import Cache
from mdi.checkpoint.hub import locate
from mdi.checkpoint.prepare import prepared
from mdi.checkpoint.published import PUBLISHED, QWEN2_VL_2B
from mdi.checkpoint.random_weights import random_checkpoint, write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.cli.app import app
from mdi.core.errors import CheckpointError
from mdi.core.quantization import ModelQuantization
from mdi.core.tensors import total_size
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.models.weights import stage_specs
from mdi.planning.plan import make_plan

TEXTS = [
    "Hello",
    "héllo  世界 🎉\n\n x",
    " \t\r\n",
    "".join(map(chr, range(1, 300))),
    "\x00",
    "naïve <b> [INST]",
]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2-vl-2b", 2_208_985_600), ("qwen3-vl-2b", 2_127_532_032), ("qwen3-vl-4b", 4_437_815_808)],
)
def test_configs_have_exactly_the_published_parameters(name: str, parameters: int) -> None:
    config = read_config(PUBLISHED[name])
    specs = stage_specs(config, make_plan(config, 1).stages[0], "bfloat16")
    assert total_size(specs.values()) == parameters


@pytest.mark.parametrize("size", ["2b", "4b", "8b", "32b"])
def test_qwen3_vl_of_every_size_has_the_parameters_of_transformers(size: str) -> None:
    published = PUBLISHED[f"qwen3-vl-{size}"]
    config = read_config(published)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**published))
    specs = stage_specs(config, StageSpec.everything(config), "bfloat16")
    assert total_size(specs.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("tiny", Qwen2VLForConditionalGeneration),
        ("sharded", Qwen2VLForConditionalGeneration),
        ("text_only", Qwen2ForCausalLM),
        ("deepstack", Qwen3VLForConditionalGeneration),
    ],
)
def test_transformers_loads_every_tensor_and_misses_none(name: str, model: Any, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    loaded, report = model.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())
    source = open_source(path)
    theirs = sum(parameter.numel() for parameter in loaded.parameters())
    assert theirs == sum(prod(source.spec(stored).shape) for stored in source.names())


@pytest.fixture
def deepstack(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "deepstack", tiny_deepstack_config())


def test_its_tokenizer_has_one_token_per_byte(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for text in TEXTS:
        assert tokenizer(text).input_ids == list(text.encode())
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("config", [tiny_config(), QWEN2_VL_2B])
def test_special_tokens_have_the_ids_the_config_gives_them(config: dict[str, Any], tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sections = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {**config["vision_config"], "depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
    config = {**config, **small, "rope_scaling": sections, "vision_config": vision}
    tokenizer = AutoTokenizer.from_pretrained(write_random_checkpoint(tmp_path, config))
    ids = {
        "<|endoftext|>": config["bos_token_id"],
        "<|im_start|>": config["eos_token_id"] - 1,
        "<|im_end|>": config["eos_token_id"],
        "<|vision_start|>": config["vision_start_token_id"],
        "<|vision_end|>": config["vision_end_token_id"],
        "<|vision_pad|>": config["vision_token_id"],
        "<|image_pad|>": config["image_token_id"],
        "<|video_pad|>": config["video_token_id"],
    }
    assert {text: tokenizer(text).input_ids for text in ids} == {text: [index] for text, index in ids.items()}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    every_id = range(config["video_token_id"] + 1)
    assert all(tokenizer.convert_ids_to_tokens(list(every_id)))


def rendered(path: Path, messages: list[dict[str, Any]], **options: Any) -> str:
    text = AutoTokenizer.from_pretrained(path).apply_chat_template(messages, tokenize=False, **options)
    return str(text)


def test_its_chat_template_writes_what_qwen2_vl_s_writes(tiny: Path) -> None:
    content: list[dict[str, Any]] = [
        {"type": "image", "image": "cat.png"},
        {"type": "image_url", "image_url": {"url": "dog.png"}},
        {"type": "text", "text": " What?\n"},
        {"type": "video", "video": "film.mp4"},
        {"type": "text", "text": "{{ 1 }} <b>"},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat. "},
    ]
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image}{image} What?\n{video}{{{{ 1 }}}} <b><|im_end|>\n"
        "<|im_start|>assistant\nA cat. <|im_end|>\n"
    )
    assert rendered(tiny, messages) == chat
    assert rendered(tiny, messages, add_generation_prompt=True) == chat + "<|im_start|>assistant\n"


def test_its_chat_template_leaves_the_system_message_to_the_user(tiny: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert rendered(tiny, messages) == expected


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first, same, other = (
        load_file(write_random_checkpoint(tmp_path / name, tiny_config(), seed=seed) / "model.safetensors")
        for name, seed in (("first", 1), ("same", 1), ("other", 2))
    )
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_no_two_tensors_are_alike_and_none_is_constant(tiny: Path) -> None:
    tensors = list(load_file(tiny / "model.safetensors").values())
    assert len({tuple(tensor.flatten()[:8].tolist()) for tensor in tensors}) == len(tensors)
    assert all(tensor.std() > 0.01 for tensor in tensors)


def test_a_tensor_longer_than_the_random_block_is_filled_to_its_end(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=20_000)  # 1,280,000 numbers
    tensors = load_file(write_random_checkpoint(tmp_path, config, std=0.5) / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    assert embedding.std() == pytest.approx(0.5, rel=0.01)
    assert embedding[-100:].std() == pytest.approx(0.5, rel=0.05)


def test_the_dtype_is_in_the_files_and_in_the_config(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path, tiny_config(), dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"


# random checkpoints by name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """The user's cache, and a published model that is tiny."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PUBLISHED, "tiny", tiny_config())
    return Cache.open()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2-vl-2b", 2_208_985_600), ("qwen2-vl-7b", 8_291_375_616), ("qwen2-0.5b", 494_032_768)],
)
def test_the_shapes_are_those_of_the_published_models(name: str, parameters: int) -> None:
    config = read_config(PUBLISHED[name])
    specs = stage_specs(config, make_plan(config, 1).stages[0], config.dtype)
    assert sum(spec.size for spec in specs.values()) == parameters


def test_it_is_written_into_the_cache_once_with_progress(cache: Cache, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = locate("random:tiny", ckpt_folder=tmp_path, progress=lambda *report: seen.append(report))
    assert path == cache.folder / "random:tiny"
    source = open_source(path)
    size = sum(source.spec(name).size_bytes for name in source.names())
    assert {source.spec(name).dtype for name in source.names()} == {"bfloat16"}
    assert seen[-1] == ("writing random:tiny", size, size)
    assert [entry.contents for entry in cache.entries()] == ["checkpoint"]
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert locate("random:tiny", ckpt_folder=tmp_path, download=False) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_an_interrupted_one_is_not_taken_for_a_checkpoint(cache: Cache) -> None:
    def interrupt(_what: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random_checkpoint("tiny", interrupt)
    assert cache.entries() == []
    assert open_source(random_checkpoint("tiny")).names()


def test_room_is_checked_before_anything_is_written(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setenv("MDI_CACHE_GB", "16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**12))
    with pytest.raises(CheckpointError, match=r"16\.6 GB do not fit .*MDI_CACHE_GB"):
        random_checkpoint("qwen2-vl-7b")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 10**10, 10**9))
    with pytest.raises(CheckpointError, match=r"disk .* is full \(4\.4 GB are missing, 1\.0 GB are free\): make room"):
        random_checkpoint("qwen2-vl-2b")
    assert list(cache.folder.iterdir()) == []


def test_an_unknown_name_is_refused_with_those_there_are(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no random checkpoint 'gpt': the names are qwen2-vl-2b, .*tiny"):
        locate("random:gpt", ckpt_folder=tmp_path)


def test_it_is_in_use_while_chunks_of_it_are(cache: Cache) -> None:
    chunks = prepared(open_source(random_checkpoint("tiny")), 2)
    assert chunks.folder == cache.folder / "random:tiny" / "chunks" / "2nodes"
    [entry] = cache.entries()
    assert entry.in_use
    assert not entry.remove()
    chunks.close()
    assert entry.remove()
    assert cache.entries() == []


@pytest.mark.usefixtures("cache")
def test_its_int4_weights_are_not_calibrated() -> None:
    """Minutes of work that would change nothing."""
    with closing(prepared(open_source(random_checkpoint("tiny")), 1, quantization=ModelQuantization("int4"))) as chunks:
        assert chunks.manifest.calibration is None


def test_a_machine_is_measured_with_a_random_checkpoint(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    sizes = ["--streams", "1", "--prompt-lengths", "16", "--image-sizes", "", "--answer-tokens", "4"]
    done = CliRunner().invoke(app, ["bench", "random:tiny", *sizes])
    assert done.exit_code == 0, done.output
    assert "writing random:tiny: done" in done.stderr
    assert "tokens" in done.stdout
