"""Qwen3-VL through whole engines: images and videos give the answers of transformers, however layers are split.

Features of images pass links, stay in caches, and are there again after a node is lost.
"""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import skimage
from PIL import Image
from testing.checkpoints import tiny_deepstack_config
from testing.manual_cluster import NODES, ManualCluster, on_loopback
from testing.videos import encoded, numbered
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.bench.peers import Transformers
from mdi.bench.verify import verify
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.quantization import UNQUANTIZED, ModelQuantization

GREEDY = SamplingParams(temperature=0, max_tokens=8)
Chats = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three layers: on three nodes, features of two pass a link. Large weights make answers of many tokens."""
    path = tmp_path_factory.mktemp("qwen3-vl") / "model"
    return write_random_checkpoint(path, tiny_deepstack_config(num_hidden_layers=3), std=0.5, seed=1)


@pytest.fixture(scope="module")
def chats(photograph: bytes) -> Chats:
    """Of words, photographs, of which one has more tokens than a prefill chunk, and videos, of which one has an odd
    number of frames."""
    image = {"type": "image", "image": photograph}
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.coffee()).resize((830, 740)).save(buffer, "PNG")
    large = {"type": "image", "image": buffer.getvalue()}
    media: dict[str, list[dict[str, Any]]] = {
        "text": [],
        "image": [image],
        "images": [image, {"type": "text", "text": "and"}, large, image],
        "video": [{"type": "video", "video": encoded(numbered(30), fps=10)}],
        "odd video": [{"type": "text", "text": "Look: "}, {"type": "video", "video": encoded(numbered(25), fps=9)}],
        "both": [image, {"type": "video", "video": encoded(numbered(8), fps=3)}],
    }
    text = {"type": "text", "text": "What is at hand?"}
    return {name: [{"role": "user", "content": [*parts, text]}] for name, parts in media.items()}


@pytest.mark.parametrize("name", ["text", "image", "images", "video", "odd video", "both"])
def test_logits_and_tokens_are_those_of_transformers(name: str, checkpoint: Path, chats: Chats) -> None:
    report = verify(open_source(checkpoint), chats[name], dtype="float32", n_nodes=3, max_tokens=8)
    assert report.same_prompt
    assert report.relative < 1e-4
    assert report.ours == report.theirs


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_with_experts_answers_are_the_same_on_one_node_and_on_three(
    quantization: str | None, chats: Chats, tmp_path: Path
) -> None:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = tiny_deepstack_config(num_hidden_layers=3, model_type="qwen3_vl_moe_text", **experts)
    family = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    path = write_random_checkpoint(tmp_path / "model", config | family, std=0.5, seed=1)
    answers = []
    for n_nodes in (1, 3):
        with Engine(path, dtype="bfloat16", quantization=quantization, n_nodes=n_nodes) as engine:
            answers.append([engine.chat(chats[name], GREEDY).token_ids for name in ("image", "both")])
    assert answers[0] == answers[1]
    assert len(answers[0][0]) == GREEDY.max_tokens


@pytest.mark.parametrize("n_nodes", [1, 3])
def test_engines_give_the_same_answers(n_nodes: int, checkpoint: Path, chats: Chats) -> None:
    theirs = Transformers(open_source(checkpoint))
    with Engine(checkpoint, dtype="float32", n_nodes=n_nodes, sequence_length=2048) as engine:
        running = {name: engine.submit(chat, GREEDY) for name, chat in chats.items()}
        for name, stream in running.items():
            assert stream.completion().token_ids == theirs.answer(chats[name], 8), name


FORMATS = [None, ModelQuantization("int8", "int8", "int8"), ModelQuantization("int4", "int8", "int4")]


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_in_every_format_logits_are_close_to_transformers(
    quantization: ModelQuantization | None, checkpoint: Path, chats: Chats
) -> None:
    dtype = "float32" if quantization else "bfloat16"
    report = verify(
        open_source(checkpoint),
        chats["both"],
        dtype=dtype,
        quantization=quantization or UNQUANTIZED,
        n_nodes=3,
        max_tokens=4,
    )
    assert report.same_prompt
    assert report.cosine > 0.999


def test_features_stay_in_caches_and_prefixes(checkpoint: Path, chats: Chats) -> None:
    """With slots of their own, and with one that is taken over; images are cut in two by prefill chunks."""
    theirs = Transformers(open_source(checkpoint))
    with Engine(checkpoint, dtype="float32", n_nodes=3, sequence_length=2048, max_sequences=2) as engine:
        for name in ("images", "both", "image"):
            messages = list(chats[name])
            for _ in range(2):
                answer = engine.chat(messages, GREEDY)
                assert answer.token_ids == theirs.answer(messages, 8)
                messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]
        vision = engine._loop._vision
        assert (vision.misses, vision.hits) == (2 + 3, 2 * 8 - 5)  # two images, three grids of a video
        assert answer.usage.cached_tokens > 100


@pytest.mark.slow
def test_a_lost_node_leaves_the_tokens_as_they_are(checkpoint: Path, chats: Chats) -> None:
    """Each node is killed once, while streams with images and a video run: their prompts are computed again."""
    params = SamplingParams(temperature=1, seed=5, max_tokens=150, ignore_eos=True)
    names = ("images", "video", "both")
    with Engine(checkpoint, dtype="float32", n_nodes=3, sequence_length=2048, vision_cache_bytes=0) as engine:
        expected = [engine.chat(chats[name], params).token_ids for name in names]
        for victim in ("secondary0", "finisher"):
            recoveries = engine.recovery.recoveries
            streams = [engine.submit(chats[name], params) for name in names]
            wait_for(lambda: _written(engine) >= [5, 5, 5])
            os.kill(next(node.pid for node in engine.nodes() if node.name == victim), signal.SIGKILL)
            assert [stream.completion().token_ids for stream in streams] == expected
            assert engine.recovery.recoveries > recoveries


def _written(engine: Engine) -> list[int]:
    """Tokens of the answers so far, the fewest first."""
    live = list(engine._loop._live)
    return sorted(len(sample.generated) for request in live for sample in request.sequences)


@pytest.mark.slow
def test_images_can_be_encoded_on_a_node_of_its_own(checkpoint: Path, chats: Chats, tmp_path: Path) -> None:
    theirs = Transformers(open_source(checkpoint))
    with ManualCluster(tmp_path, on_loopback(*NODES, "vision")) as nodes:
        nodes.start_all()
        with Engine(
            checkpoint,
            nodes_config=nodes.config,
            wait_s=100,
            certs=nodes.certs("starter"),
            encryption=nodes.encrypted,
            dtype="float32",
            sequence_length=2048,
        ) as engine:
            for name in ("images", "both"):
                assert engine.chat(chats[name], GREEDY).token_ids == theirs.answer(chats[name], 8)
