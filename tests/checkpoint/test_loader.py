"""A stage is loaded strictly, undamaged, and without its neighbours' bytes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from testing.checkpoints import tiny_config, tiny_text_config

from mdi.checkpoint.loader import load_chunk, load_source
from mdi.checkpoint.manifest import FILE_NAME, Manifest
from mdi.checkpoint.prepare import chunk_metadata, prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import Source, open_source
from mdi.checkpoint.writer import write_safetensors
from mdi.core.dtypes import parse_dtype
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.tensors import TensorSpec
from mdi.layers import linear
from mdi.layers.mlp import MLP
from mdi.models.config import StageSpec
from mdi.models.decoder import EMBEDDING, FINAL_NORM
from mdi.models.qwen2_vl import VisionTransformer
from mdi.models.registry import FAMILIES
from mdi.models.weights import stage_specs
from mdi.planning.plan import make_plan
from mdi.planning.predict import stage_summary


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, in a fixed order, but not the copies of norms that kernels take."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from tensors_in(item)
    elif type(thing).__module__.startswith(("mdi.models", "mdi.layers")):
        for name, attribute in vars(thing).items():
            if name != "exact":
                yield from tensors_in(attribute)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as they are stored, to look at: without kernels they are not packed."""
    monkeypatch.setattr(linear, "library", lambda: None)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("n_nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["tiny", "sharded", "text_only"])
def test_a_chunk_and_the_checkpoint_give_the_same_stage(
    name: str, n_nodes: int, request: pytest.FixtureRequest
) -> None:
    source = open_source(request.getfixturevalue(name))
    folder = prepare(source, n_nodes)
    for chunk in Manifest.read(folder).chunks:
        ours, direct = load_chunk(folder / chunk.file), load_source(source, chunk.spec)
        assert (ours.config, ours.spec) == (direct.config, direct.spec) == (source.model_config, chunk.spec)
        assert (ours.vision is None) == (direct.vision is None) == (not chunk.vision)
        for part in ("decoder", "vision"):
            pairs = zip(tensors_in(getattr(ours, part)), tensors_in(getattr(direct, part)), strict=True)
            assert all(torch.equal(mine.to_dense(), theirs.to_dense()) for mine, theirs in pairs)


@pytest.mark.usefixtures("unpacked")
def test_a_stage_has_the_checkpoint_s_numbers_in_their_places(tiny: Path) -> None:
    source = open_source(tiny)
    stage = load_source(source, StageSpec(2, 4, embedding=True, vision=True, head=True))
    second, vision, norm = stage.decoder.layers[1], stage.vision, stage.decoder.norm
    assert isinstance(vision, VisionTransformer)
    assert isinstance(second.mlp, MLP)
    assert norm is not None
    places = {
        EMBEDDING: stage.decoder.embedding,
        "model.norm.weight": norm.weight,
        "model.layers.3.mlp.down_proj.weight": second.mlp.down.weight,
        "model.layers.3.post_attention_layernorm.weight": second.mlp_norm.weight,
        "visual.blocks.1.norm2.bias": vision.blocks[1].norm2.bias,
        "visual.merger.mlp.2.bias": vision.merger[1].bias,
    }
    for name, tensor in places.items():
        assert tensor is not None
        assert torch.equal(tensor.to_dense(), source.tensor(name)), name  # dense: a weight may be packed


def test_without_a_spec_the_whole_model_is_loaded(tiny: Path) -> None:
    source = open_source(tiny)
    stage = load_source(source)
    assert stage.spec == make_plan(source.model_config, 1).stages[0]
    assert len(stage.decoder.layers) == 6


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_checkpoint_is_cast_on_loading(dtype: str, tiny: Path) -> None:
    source = open_source(tiny)
    stage = load_source(source, dtype=dtype)
    assert stage.dtype == parse_dtype(dtype)
    assert {tensor.dtype for tensor in tensors_in((stage.decoder, stage.vision))} == {parse_dtype(dtype)}
    embedding = stage.decoder.embedding
    assert embedding is not None
    assert torch.equal(embedding, source.tensor(EMBEDDING).to(parse_dtype(dtype)))


def test_progress_rises_to_its_total(source: Source) -> None:
    folder = prepare(source, 2)
    for load in (
        lambda told: load_chunk(folder / "model_finisher.safetensors", progress=told),
        load_whole(source),
    ):
        seen: list[tuple[int, int]] = []
        load(lambda _what, done, total, seen=seen: seen.append((done, total)))
        done, totals = [at for at, _ in seen], {total for _, total in seen}
        assert len(totals) == 1
        assert done == sorted(done)
        assert done[-1] == totals.pop()


def load_whole(source: Source) -> Any:
    return lambda told: load_source(source, progress=told)


# chunks that are not what they should be


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x01
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 7, 8, 40, 90, 400, 5000, 200_001, -1])
def test_one_flipped_bit_anywhere_is_noticed_and_the_chunk_and_remedy_named(position: int, source: Source) -> None:
    path = prepare(source, 2) / "model_finisher.safetensors"
    flip(path, position)
    with pytest.raises(CheckpointError, match=r"model_finisher\.safetensors.*run `mdi prepare` again"):
        load_chunk(path)


def test_damage_in_the_numbers_is_called_damage(source: Source) -> None:
    path = prepare(source, 2) / "model_finisher.safetensors"
    flip(path, -1000)
    with pytest.raises(CheckpointError, match="is damaged: its checksum is not the manifest's"):
        load_chunk(path)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_chunk_is_damaged(length: int, source: Source) -> None:
    path = prepare(source, 2) / "model_finisher.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_chunk(path)


def test_a_chunk_of_another_plan_is_not_called_damaged(source: Source) -> None:
    other, folder = prepare(source, 3), prepare(source, 2)
    shutil.copy(other / "model_starter.safetensors", folder / "model_starter.safetensors")
    with pytest.raises(CheckpointError, match=r"another plan, dtype, quantisation or node.*run `mdi prepare` again"):
        load_chunk(folder / "model_starter.safetensors")


def test_a_chunk_of_another_dtype_beside_the_manifest_is_refused(source: Source, tmp_path: Path) -> None:
    shutil.copytree(prepare(source, 2, dtype="bfloat16"), tmp_path / "bfloat16")
    folder = prepare(source, 2)
    shutil.copy(tmp_path / "bfloat16" / "model_starter.safetensors", folder / "model_starter.safetensors")
    with pytest.raises(CheckpointError, match="another plan, dtype, quantisation or node"):
        load_chunk(folder / "model_starter.safetensors")


def test_the_chunk_of_another_node_is_refused(source: Source) -> None:
    folder = prepare(source, 4)
    shutil.copy(folder / "model_secondary0.safetensors", folder / "model_secondary1.safetensors")
    with pytest.raises(CheckpointError, match="another plan, dtype, quantisation or node"):
        load_chunk(folder / "model_secondary1.safetensors")


def test_asking_for_another_dtype_than_the_chunk_s_says_how_to_get_it(source: Source) -> None:
    path = prepare(source, 2) / "model_starter.safetensors"
    with pytest.raises(CheckpointError, match=r"in float32, not bfloat16: run `mdi prepare --dtype bfloat16`"):
        load_chunk(path, dtype="bfloat16")
    assert load_chunk(path, dtype="float32").dtype == torch.float32


def test_a_missing_chunk_and_a_missing_manifest_are_named(source: Source) -> None:
    folder = prepare(source, 2)
    with pytest.raises(CheckpointError, match=r"no chunk .*model_secondary0\.safetensors"):
        load_chunk(folder / "model_secondary0.safetensors")
    (folder / FILE_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json.*keep its folder together"):
        load_chunk(folder / "model_starter.safetensors")


def test_a_renamed_chunk_is_refused_with_the_names_there_are(source: Source) -> None:
    folder = prepare(source, 2)
    (folder / "model_starter.safetensors").rename(folder / "starter.safetensors")
    with pytest.raises(
        CheckpointError, match=r"starter\.safetensors is not in .*model_starter\.safetensors, model_fin"
    ):
        load_chunk(folder / "starter.safetensors")


@pytest.mark.parametrize("change", ["one missing", "one too many", "another shape", "another dtype"])
def test_a_chunk_with_a_right_checksum_but_wrong_tensors_is_refused(change: str, source: Source) -> None:
    folder = prepare(source, 2)
    manifest = Manifest.read(folder)
    entry = manifest.chunks[1]
    specs = stage_specs(source.model_config, entry.spec, manifest.dtype)
    if change == "one missing":
        del specs["model.norm.weight"]
    if change == "one too many":
        specs["model.norm.bias"] = TensorSpec((64,), "float32")
    if change == "another shape":
        specs["model.norm.weight"] = TensorSpec((65,), "float32")
    if change == "another dtype":
        specs["model.norm.weight"] = TensorSpec((64,), "float16")
    path, metadata = folder / entry.file, chunk_metadata(entry.role, manifest.plan_hash)
    sha256, size = write_safetensors(path, specs, (torch.zeros(spec.shape) for spec in specs.values()), metadata)
    content = json.loads((folder / FILE_NAME).read_text())
    content["chunks"][1] |= {"sha256": sha256, "size_bytes": size}
    (folder / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not hold the tensors of its layers"):
        load_chunk(path)


@pytest.mark.usefixtures("unpacked")
def test_a_chunk_holds_float32_norms_beside_bfloat16_weights(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = source.model_config.architecture
    family = FAMILIES[architecture]
    mixed = replace(family, read_config=lambda config: replace(family.read_config(config), norm_dtype="float32"))
    monkeypatch.setitem(FAMILIES, architecture, mixed)
    source = open_source(source.path)
    path = prepare(source, 2, dtype="bfloat16") / "model_finisher.safetensors"
    with safe_open(path, "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in dtypes if "norm" in name
    }
    loaded = load_chunk(path)
    [layer, *_], norm, head = loaded.decoder.layers, loaded.decoder.norm, loaded.decoder.lm_head
    assert norm is not None
    assert head is not None
    assert norm.weight.dtype == layer.mlp_norm.weight.dtype == torch.float32
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(norm.weight, source.tensor(FINAL_NORM).float())
    assert loaded.decoder.logits(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    data_bytes = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert stage_summary(source.model_config, loaded.spec, "bfloat16").size_bytes == data_bytes


def test_a_device_that_is_not_there_is_an_error_of_ours(tiny: Path) -> None:
    for device in ("cuda:99", "toaster"):
        with pytest.raises(ConfigError, match=f"no device '{device}'"):
            load_source(open_source(tiny), device=device)


def test_a_chunk_is_loaded_without_the_checkpoint_it_came_from(source: Source, tmp_path: Path) -> None:
    moved = Path(shutil.move(prepare(source, 2), tmp_path / "elsewhere"))
    shutil.rmtree(source.path)
    assert load_chunk(moved / "model_finisher.safetensors").spec.head


# memory


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def resident_bytes(path: Path) -> int:
    """How much of a file's mappings is in this process's memory, from /proc/self/smaps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    """Whether a tensor's numbers lie in the file itself and not in a copy."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(path.resolve()))
    return False


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 MB of text model in one bfloat16 file: 10 MB of them the tied embedding, 2 MB each layer."""
    config = tiny_text_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, vocab_size=20_000)
    return write_random_checkpoint(tmp_path_factory.mktemp("wide"), config, dtype="bfloat16")


@linux
def test_reading_a_stage_s_tensors_touches_its_bytes_and_no_others(wide: Path) -> None:
    source = open_source(wide)
    specs = stage_specs(source.model_config, StageSpec(3, 5), "bfloat16")
    tensors = [source.tensor(name) for name in specs]
    slack = len(tensors) * 2 * 65536  # the kernel maps up to 64 KiB around a page, here a header's and a tensor's
    assert resident_bytes(wide / "model.safetensors") < slack  # nothing is read before it is used
    assert all(tensor.float().abs().sum() > 0 for tensor in tensors)
    stage_bytes = sum(tensor.nbytes for tensor in tensors)
    assert 0.9 * stage_bytes < resident_bytes(wide / "model.safetensors") < stage_bytes + slack


@linux
@pytest.mark.parametrize("groups", [(1,), (1, 1), (2,)])
def test_of_the_embedding_only_rows_that_are_looked_up_are_resident(groups: tuple[int, ...], wide: Path) -> None:
    path = prepare(open_source(wide), sum(groups), groups=groups) / "model_starter.safetensors"
    stage = load_chunk(path)
    assert stage.decoder.embedding is not None
    assert is_mapped(stage.decoder.embedding, path)
    rows = stage.decoder.embed(torch.tensor([5, 19_000]))
    assert torch.equal(rows, open_source(wide).tensor(EMBEDDING)[[5, 19_000]])
    assert resident_bytes(path) < 20_000 * 256 * 2 / 4


@linux
def test_nothing_stays_mapped_when_a_stage_is_dropped(wide: Path) -> None:
    path = prepare(open_source(wide), 2) / "model_starter.safetensors"
    stage = load_chunk(path)
    del stage
    assert resident_bytes(path) == 0
    assert str(path.resolve()) not in Path("/proc/self/maps").read_text()


def test_the_checksum_is_of_the_file_as_any_tool_reads_it(source: Source) -> None:
    folder = prepare(source, 1)
    [chunk] = Manifest.read(folder).chunks
    assert hashlib.sha256((folder / chunk.file).read_bytes()).hexdigest() == chunk.sha256


def test_a_config_in_the_manifest_is_enough_to_run_a_vision_stage(tiny: Path) -> None:
    stage = load_chunk(prepare(open_source(tiny), 2) / "model_starter.safetensors")
    assert stage.vision is not None
    rows = torch.randn(16, tiny_patch_elements(), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeddings = result_of(stage.vision.encode_steps(rows, (1, 4, 4)))
    assert embeddings.shape == (4, tiny_config()["hidden_size"])


def result_of(steps: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    while True:
        try:
            next(steps)
        except StopIteration as done:
            embeddings: torch.Tensor = done.value
            return embeddings


def tiny_patch_elements() -> int:
    vision = tiny_config()["vision_config"]
    return int(vision["in_chans"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2)
