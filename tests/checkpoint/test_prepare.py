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
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdi.checkpoint import fingerprint
from mdi.checkpoint import prepare as prepare_module
from mdi.checkpoint.manifest import FILE_NAME, Manifest
from mdi.checkpoint.prepare import Chunks, chunk_folder, prepare, prepared
from mdi.checkpoint.safetensors import SINGLE
from mdi.checkpoint.source import Source, open_source
from mdi.core.dtypes import dtype_name, parse_dtype
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.group import Rank
from mdi.core.tensors import TensorSpec
from mdi.models.decoder import EMBEDDING, FINAL_NORM, LM_HEAD
from mdi.models.weights import stage_specs
from mdi.planning.plan import Plan, make_plan

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


def test_the_manifest_says_which_shards_each_rank_has(source: Source) -> None:
    manifest = Manifest.read(prepare(source, 3, groups=(2, 1), shards=4))
    assert manifest.plan == make_plan(source.model_config, 3, groups=(2, 1), shards=4)
    assert [chunk.rank for chunk in manifest.chunks] == [Rank(0, 2, 4), Rank(2, 4, 4), None]


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
from mdi.checkpoint import fingerprint
from mdi.checkpoint import prepare as prepare_module
from mdi.checkpoint.locks import Hold
from mdi.checkpoint.prepare import Chunks, chunk_folder, prepare, prepared
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
    with pytest.raises(CheckpointError, match=f"lack the tensor {NAME} that config.json asks for"):
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


# chunks that are found again


def name(chunks: Chunks) -> str:
    """Of the folder of chunks that are not needed any more."""
    chunks.close()
    return chunks.folder.name


def overwrite(source: Source, **changes: torch.Tensor) -> Source:
    return change_weights(source.path, **{FINAL_NORM: torch.rand(64), **changes})


def test_chunks_are_written_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name(prepared(source, 2)) == "2nodes"
    monkeypatch.setattr(prepare_module, "SafetensorsWriter", None)
    monkeypatch.setattr(fingerprint, "hash_file", None)  # nor is the checkpoint read
    assert name(prepared(source, 2)) == "2nodes"
    assert name(prepared(source, 2, layers=(3, 3), dtype="float32")) == "2nodes"


def test_other_layers_and_dtypes_are_written_beside(source: Source) -> None:
    for _ in range(2):
        assert name(prepared(source, 2)) == "2nodes"
        assert name(prepared(source, 2, dtype="bfloat16")) == "2nodes-bfloat16"
        assert name(prepared(source, 2, layers=(4, 2))) == "2nodes-float32-4-2"
        assert name(prepared(source, 2, layers=(4, 2), dtype="float16")) == "2nodes-float16-4-2"
        assert name(prepared(source, 2, vision_node=True)) == "2nodes-vision"
        assert len(list((source.path / "chunks").iterdir())) == 5


def test_what_was_prepared_in_the_usual_place_is_taken_by_whom_all_is_right(source: Source) -> None:
    prepare(source, 2, dtype="bfloat16", layers=(1, 5))
    with closing(prepared(source, 2)) as chunks:
        assert (chunks.folder.name, chunks.manifest.dtype, chunks.manifest.plan.layers) == (
            "2nodes",
            "bfloat16",
            (1, 5),
        )


def test_layers_are_measured_only_when_chunks_are_written(source: Source) -> None:
    measured: list[None] = []

    def measure() -> Plan:
        measured.append(None)
        return make_plan(source.model_config, 2, (5, 1))

    for _ in range(2):
        with closing(prepared(source, 2, measure=measure)) as chunks:
            assert chunks.manifest.plan.layers == (5, 1)
    prepared(source, 2, layers=(2, 4), measure=measure).close()
    assert len(measured) == 1


def test_chunks_of_groups_are_never_taken_for_those_of_a_layer_split_nor_of_other_groups(source: Source) -> None:
    for _ in range(2):
        assert name(prepared(source, 4, groups=(2, 2))) == "4nodes-groups-2-2"
        assert name(prepared(source, 4)) == "4nodes"
        assert name(prepared(source, 4, groups=(1, 1, 1, 1))) == "4nodes"
        assert name(prepared(source, 4, groups=(3, 1))) == "4nodes-groups-3-1"
        assert name(prepared(source, 4, groups=(2, 2), shards=4)) == "4nodes-groups-2-2-float32-shards4"
    assert len(list((source.path / "chunks").iterdir())) == 4


def test_groups_that_a_measurement_chose_are_found_again_where_any_plan_will_do(source: Source) -> None:
    chosen = make_plan(source.model_config, 2, groups=(2,))

    def measure() -> Plan:
        return chosen

    for _ in range(2):
        with closing(prepared(source, 2, measure=measure)) as chunks:
            assert chunks.manifest.plan == chosen
    with closing(prepared(source, 2)) as chunks:
        assert chunks.manifest.plan.groups == (1, 1)


def test_other_weights_of_the_same_size_are_noticed_with_one_line(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    before = prepared(source, 2)
    before.close()
    source = overwrite(source)
    with closing(prepared(source, 2)) as chunks:
        assert chunks.manifest.digest != before.manifest.digest
        assert torch.equal(load_file(chunks.file("finisher"))[FINAL_NORM], source.tensor(FINAL_NORM))
    [message] = caplog.messages
    assert "are made of other weights than are there now: preparing them again" in message


def test_a_changed_config_is_noticed(source: Source) -> None:
    prepared(source, 2).close()
    config = source.path / "config.json"
    config.write_text(json.dumps({**source.config, "rope_theta": 5000.0}))
    with closing(prepared(open_source(source.path), 2)) as chunks:
        assert chunks.manifest.config["rope_theta"] == 5000.0


def test_the_same_weights_written_again_keep_their_chunks(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = prepared(source, 2)
    chunks.close()
    os.utime(source.path / SINGLE, (1, 1))
    monkeypatch.setattr(prepare_module, "SafetensorsWriter", None)
    with closing(prepared(source, 2)) as again:
        assert again.manifest.digest == chunks.manifest.digest
    monkeypatch.setattr(fingerprint, "hash_file", None)  # the new time was noted
    prepared(source, 2).close()
    assert not caplog.messages


def test_chunks_of_an_older_version_are_prepared_again(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    manifest = prepare(source, 2) / FILE_NAME
    content = json.loads(manifest.read_text())
    del content["source"]
    manifest.write_text(json.dumps({**content, "version": 1}))
    assert name(prepared(source, 2)) == "2nodes"
    assert Manifest.read(manifest.parent).source
    [message] = caplog.messages
    assert "are damaged or of another version: preparing them again" in message


def test_chunks_in_use_are_not_replaced(source: Source) -> None:
    first = prepared(source, 2)
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    source = overwrite(source)
    with pytest.raises(CheckpointError, match=r"2nodes' is in use by a running server: stop it first"):
        prepare(source, 2)
    second = prepared(source, 2)
    assert second.folder.name == "2nodes-float32"
    source = overwrite(source)
    third = prepared(source, 2)
    assert third.folder.name.startswith("2nodes-float32-")
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before
    assert len({chunks.manifest.digest for chunks in (first, second, third)}) == 3
    for chunks in (first, second, third):
        chunks.close()
    assert name(prepared(source, 2)) == third.folder.name


def test_of_two_that_prepare_the_same_the_second_takes_what_the_first_wrote(source: Source) -> None:
    others: list[Chunks] = []

    def run_another(what: str, done: int, total: int) -> None:
        if what == "preparing chunks" and done == total and not others:
            others.append(prepared(source, 2))

    with closing(prepared(source, 2, progress=run_another)) as chunks:
        assert chunks.folder == others[0].folder
        assert [path.name for path in (source.path / "chunks").iterdir()] == ["2nodes"]
    others[0].close()


def test_a_checkpoint_that_changes_meanwhile_is_not_split(source: Source) -> None:
    def change(what: str, done: int, total: int) -> None:
        if what == "preparing chunks" and done == total:
            os.utime(source.path / SINGLE, (1, 1))

    with pytest.raises(CheckpointError, match="was changed while its chunks were written: start again"):
        prepare(source, 2, progress=change)
    assert not list((source.path / "chunks").iterdir())


def test_impossible_layers_are_refused_before_anything_is_read(source: Source) -> None:
    with pytest.raises(ConfigError, match="add up to 5, but the model has 6"):
        prepared(source, 2, layers=(3, 2))
    assert not chunk_folder(source.path, 2).exists()
