"""Chunks hold exactly the checkpoint's numbers, and appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdi.checkpoint.manifest import FILE_NAME, Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.safetensors import SINGLE
from mdi.checkpoint.source import Source, open_source
from mdi.core.dtypes import dtype_name, parse_dtype
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.tensors import TensorSpec
from mdi.models.weights import EMBEDDING, LM_HEAD, stage_specs
from mdi.planning.plan import make_plan

Weights = dict[str, torch.Tensor]


def chunks_of(folder: Path) -> list[Weights]:
    """The chunks in the manifest's order, read by the safetensors library."""
    return [load_file(folder / chunk.file) for chunk in Manifest.read(folder).chunks]


def stored(source: Source) -> Weights:
    return {name: source.tensor(name) for name in source.names()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("n_nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["tiny", "sharded", "text_only"])
def test_the_chunks_together_are_the_checkpoint_bit_for_bit(
    name: str, n_nodes: int, request: pytest.FixtureRequest
) -> None:
    source = open_source(request.getfixturevalue(name))
    expected = stored(source)
    chunks = chunks_of(prepare(source, n_nodes))
    assert len(chunks) == n_nodes
    assert set().union(*chunks) == expected.keys()
    for chunk in chunks:
        assert all(bits(tensor) == bits(expected[held]) for held, tensor in chunk.items())


@pytest.mark.parametrize("n_nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["tiny", "sharded", "text_only"])
def test_a_chunk_holds_its_stage_and_nothing_else(name: str, n_nodes: int, request: pytest.FixtureRequest) -> None:
    source = open_source(request.getfixturevalue(name))
    plan = make_plan(source.model_config, n_nodes)
    for spec, chunk in zip(plan.stages, chunks_of(prepare(source, n_nodes)), strict=True):
        held = {name: TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in chunk.items()}
        assert held == stage_specs(source.model_config, spec, source.model_config.dtype)


def test_a_tied_matrix_is_on_the_first_and_on_the_last_node(tiny: Path) -> None:
    held = [EMBEDDING in chunk for chunk in chunks_of(prepare(open_source(tiny), 3))]
    assert held == [True, False, True]


def test_an_untied_head_is_on_the_last_node_only(sharded: Path) -> None:
    chunks = chunks_of(prepare(open_source(sharded), 3))
    assert [EMBEDDING in chunk for chunk in chunks] == [True, False, False]
    assert [LM_HEAD in chunk for chunk in chunks] == [False, False, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_are_cast_as_torch_casts_them(dtype: str, tiny: Path) -> None:
    source = open_source(tiny)
    for chunk in chunks_of(prepare(source, 2, dtype=dtype)):
        assert all(bits(tensor) == bits(source.tensor(name).to(parse_dtype(dtype))) for name, tensor in chunk.items())


def test_chunks_have_the_names_of_their_roles_and_lie_in_the_checkpoint_s_folder(source: Source) -> None:
    folder = prepare(source, 4)
    assert folder == source.path / "chunks" / "4nodes"
    assert {path.name for path in folder.iterdir()} == {
        "model_starter.safetensors",
        "model_secondary0.safetensors",
        "model_secondary1.safetensors",
        "model_finisher.safetensors",
        "manifest.json",
    }


def test_the_manifest_says_what_is_there(source: Source) -> None:
    folder = prepare(source, 3, dtype="bfloat16", layers=(1, 2, 3))
    manifest = Manifest.read(folder)
    assert manifest.dtype == "bfloat16"
    assert manifest.model == "copy"
    assert manifest.config == source.config
    assert manifest.plan == make_plan(source.model_config, 3, (1, 2, 3))
    for chunk in manifest.chunks:
        content = (folder / chunk.file).read_bytes()
        assert (chunk.sha256, chunk.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))


def test_preparing_twice_gives_the_same_bytes(source: Source) -> None:
    first = {path.name: path.read_bytes() for path in prepare(source, 2).iterdir()}
    assert {path.name: path.read_bytes() for path in prepare(source, 2).iterdir()} == first


def test_plan_and_dtype_change_the_plan_hash_and_nothing_else_does(source: Source) -> None:
    def identity(*layers: int, dtype: str) -> str:
        return Manifest.read(prepare(source, len(layers), layers=layers, dtype=dtype)).plan_hash

    first = identity(3, 3, dtype="float32")
    assert identity(3, 3, dtype="float32") == first
    assert len({first, identity(2, 4, dtype="float32"), identity(3, 3, dtype="float16")}) == 3


def test_progress_rises_to_the_number_of_bytes_written(source: Source) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = prepare(source, 2, progress=lambda *report: seen.append(report))
    written = [(done, total) for what, done, total in seen if what == "preparing chunks"]
    done, totals = [at for at, _ in written], {total for _, total in written}
    n_bytes = sum(tensor.nbytes for chunk in chunks_of(folder) for tensor in chunk.values())
    assert totals == {n_bytes}
    assert done == sorted(set(done))
    assert done[-1] == n_bytes


# what must not look finished


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_prepare_leaves_nothing(error: type[BaseException], source: Source) -> None:
    with pytest.raises(error):
        prepare(source, 2, progress=failing_half_way(error))
    assert not list((source.path / "chunks").iterdir())


def test_an_interrupted_prepare_leaves_the_earlier_chunks_as_they_were(source: Source) -> None:
    folder = prepare(source, 2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        prepare(source, 2, dtype="float16", progress=failing_half_way(KeyboardInterrupt))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list((source.path / "chunks").iterdir()) == [folder]


class failing_half_way:  # noqa: N801 - used like a function
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, _what: str, done: int, total: int) -> None:
        if done > total / 2:
            raise self.error


KILLED_HALF_WAY = """
import os, signal, sys
from pathlib import Path
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import Source, open_source
kill = lambda what, done, total: done > total / 2 and os.kill(os.getpid(), signal.SIGKILL)
prepare(open_source(Path(sys.argv[1])), 2, progress=kill)
"""


def test_a_killed_prepare_looks_unfinished_and_the_next_one_clears_its_remains(source: Source) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED_HALF_WAY, str(source.path)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    [remains] = (source.path / "chunks").iterdir()
    assert remains.name.startswith(".2nodes-")
    assert list(remains.glob("*.safetensors"))
    assert not (remains / FILE_NAME).exists()
    folder = prepare(source, 2)
    assert list((source.path / "chunks").iterdir()) == [folder]


def test_a_prepare_that_is_still_running_is_not_cleared_away(source: Source) -> None:
    def run_another(what: str, done: int, total: int) -> None:
        if what == "preparing chunks" and done == total:
            prepare(source, 2, dtype="float16")

    assert Manifest.read(prepare(source, 2, progress=run_another)).dtype == "float32"
    assert len(chunks_of(source.path / "chunks" / "2nodes")) == 2


# what cannot be prepared


def change_weights(path: Path, **changes: torch.Tensor | None) -> Source:
    weights: dict[str, torch.Tensor | None] = {**load_file(path / SINGLE), **changes}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path / SINGLE)
    return open_source(path)


NAME = "model.layers.3.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(own_copy: Path) -> None:
    with pytest.raises(CheckpointError, match=f"lacks the tensor {NAME}"):
        prepare(change_weights(own_copy, **{NAME: None}), 2)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(own_copy: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{NAME} has shape \[64, 128\].* asks for \[128, 64\]"):
        prepare(change_weights(own_copy, **{NAME: torch.zeros(64, 128)}), 2)


def test_a_tensor_of_integers_is_not_mistaken_for_weights(own_copy: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{NAME} is stored as I8"):
        prepare(change_weights(own_copy, **{NAME: torch.zeros(128, 64, dtype=torch.int8)}), 2)


def test_a_checkpoint_that_cannot_be_prepared_leaves_no_folder(own_copy: Path) -> None:
    with pytest.raises(CheckpointError):
        prepare(change_weights(own_copy, **{NAME: None}), 2)
    assert not (own_copy / "chunks").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"the disk has 0\.0 GB free: make room"):
        prepare(source, 2)
    assert not list((source.path / "chunks").iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(source: Source) -> None:
    (source.path / "chunks").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        prepare(source, 2)


def test_a_disk_that_fills_up_meanwhile_is_an_error_of_ours(source: Source) -> None:
    def fill(_what: str, done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        prepare(source, 2, progress=fill)
    assert not list((source.path / "chunks").iterdir())


def test_more_nodes_than_layers_and_unknown_dtypes_are_refused(source: Source) -> None:
    with pytest.raises(ConfigError, match="7 nodes are more than the model's 6 layers"):
        prepare(source, 7)
    with pytest.raises(CheckpointError, match="dtype 'int3' is not supported"):
        prepare(source, 2, dtype="int3")


# the manifest as a file


def edit_manifest(folder: Path, **entries: object) -> None:
    content = json.loads((folder / FILE_NAME).read_text())
    (folder / FILE_NAME).write_text(json.dumps({**content, **entries}))


@pytest.mark.parametrize("entries", [{"colour": "red"}, {"version": 1}, {"dtype": "float16"}, {"chunks": []}])
def test_a_manifest_that_was_changed_is_refused(entries: dict[str, object], source: Source) -> None:
    folder = prepare(source, 2)
    edit_manifest(folder, **entries)
    with pytest.raises(CheckpointError, match="damaged or of another version: run `mdi prepare` again"):
        Manifest.read(folder)


def test_a_manifest_whose_chunks_lose_a_layer_is_refused(source: Source) -> None:
    folder = prepare(source, 2)
    chunks = json.loads((folder / FILE_NAME).read_text())["chunks"]
    chunks[0]["last_layer"] -= 1
    edit_manifest(folder, chunks=chunks)
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.read(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_manifest_that_is_no_json_object_is_refused(content: bytes, source: Source) -> None:
    folder = prepare(source, 2)
    (folder / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.read(folder)
