"""The benchmarks' short modes end well and print their figures. The figures are not judged here."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from benchmarks import slow_links
from benchmarks.gguf_file import gguf_file
from gguf.quants import dequantize
from testing.checkpoints import tiny_config
from testing.hosts import why_not
from torch import Tensor

from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.group import Rank
from mdi.planning.hardware import LinkSpeed
from mdi.rpc.group_join import LinkListener, Member

WHY_NO_HOSTS = why_not()
SOAKED = ("lost requests: 0", "recovery time", "nothing")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "fullsize --shape tiny --peers transformers --formats bf16 --rounds 1 --json FILE --folder FOLDER",
            ("decode", "prefill", "image", "loading", "beyond the chunk"),
        ),
        (
            "groups --shape tiny --formats bf16 --turns 1 --answer 8 --works tokens samples --folder FOLDER",
            ("8 of 8 are equal", "3 samples; 2 ranks", "3 samples; layers"),
        ),
        (
            "plans --shape tiny --turns 1 --answer 4 --links 5 --json FILE --folder FOLDER",
            ("group; this machine", "one; 5 ms, 1 Gb/s", "predicted"),
        ),
        ("media --runs 1", ("ratio",)),
        ("links --rounds 2 --json FILE", ("our link", "of the bare stream's rate")),
        ("streams --tiny --only image --folder FOLDER", ("image in the context", "encoded in")),
        ("gateway --short", ("us of CPU an event", "slow", "came in time")),
        ("page --short", ("first paint", "dropped")),
        ("masks", ("once a server", "1,000 choices")),
        ("moe --layers 1 --streams 1 2", ("experts read", "dense")),
        ("mixed --requests 30", ("lost requests: 0; mixed up: 0", "ready afterwards: True")),
        ("memory --requests 150 --plot PLOT", ("bytes a request", "node 1")),
        ("agents --agents 8 --tokens 800", ("answers that differ from those alone: 0 of 8",)),
        ("on_ray --tiny --turns 1 --folder FOLDER", ("decode, streams: 4", "without Ray")),
        ("faults --faults 1 --constrained --groups 2,2", SOAKED),
        pytest.param(
            "faults --manual --faults 1",
            SOAKED,
            marks=pytest.mark.skipif(WHY_NO_HOSTS is not None, reason=str(WHY_NO_HOSTS)),
        ),
    ],
    ids=[
        "fullsize",
        "groups",
        "plans",
        "media",
        "links",
        "streams",
        "gateway",
        "page",
        "masks",
        "moe",
        "mixed",
        "memory",
        "agents",
        "on ray",
        "faults constrained, in groups",
        "faults manual",
    ],
)
def test_a_benchmark_runs_in_its_short_mode(command: str, words: tuple[str, ...], tmp_path: Path) -> None:
    places = {"FOLDER": str(tmp_path), "FILE": str(tmp_path / "figures.json"), "PLOT": str(tmp_path / "memory.png")}
    module, *arguments = command.split()
    filled = [places.get(argument, argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *filled], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)
    assert ("FILE" in command) == (tmp_path / "figures.json").exists()


def test_slow_links_give_what_was_sent_and_not_before_it_can_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exchanges of 9,000 bytes a shard, in two pieces each, at 1 MB/s and 60 ms there and back; and logits."""
    file = tmp_path / "line"
    file.touch()
    monkeypatch.setenv(slow_links.VARIABLE, str(file))
    slow_links.Line(file).speed = LinkSpeed(rtt_s=0.06, bytes_per_s=1e6)
    shares = (Rank(0, 2, 3), Rank(2, 3, 3))
    listener = LinkListener(None, "127.0.0.1")
    members = [Member("starter"), Member("finisher", "127.0.0.1", listener.port)]
    whole = torch.arange(3 * 3 * 1500, dtype=torch.float32).view(3, 3, 1500).to(torch.bfloat16)

    def times(index: int) -> tuple[float, float, Tensor]:
        link = slow_links.SlowLink.join(index, members, shares, listener if index else None, None, 1, 20.0)
        partials = torch.zeros_like(whole)
        own = slice(link.rank.first_shard, link.rank.last_shard)
        began_s = time.monotonic()
        for _ in range(2):
            partials[own] = whole[own]
            link.send(partials, slice(0, 1))
            link.send(partials, slice(1, 3))
            link.receive(partials, 3)
        link.gather(whole[0])
        ended_s = time.monotonic()
        link.exchange(torch.zeros(3, 1, 1))  # both are done
        link.close()
        return began_s, ended_s, partials

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(times, range(2))
    assert torch.equal(first[2], whole)
    assert torch.equal(second[2], whole)
    exchanged_s = second[0] + 2 * 0.03 + 0.009 + 0.018  # the first rank's two shards follow the second one's one
    assert second[1] >= exchanged_s
    assert first[1] >= exchanged_s + 0.03 + 0.009


@pytest.mark.parametrize(("kind", "error"), [("BF16", 0.0), ("Q8_0", 0.01), ("Q4_0", 0.12)])
def test_a_gguf_file_has_the_weights_of_the_checkpoint(kind: str, error: float, tmp_path: Path) -> None:
    source = open_source(write_random_checkpoint(tmp_path, tiny_config(), dtype="bfloat16"))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file(tmp_path, kind)).tensors}
    assert len(tensors) == 2 + 6 * 12  # embedding and norm, six layers; the head is tied, and no vision tower
    for name, new in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("model.layers.5.self_attn.k_proj.bias", "blk.5.attn_k.bias"),
    ):
        written = dequantize(tensors[new].data, tensors[new].tensor_type)
        weights = source.tensor(name).float().numpy()
        assert np.linalg.norm(written - weights) <= error * np.linalg.norm(weights)
