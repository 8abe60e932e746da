"""Models whose numbers leave the range of float16: the request fails and says why, and no other notices."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.checkpoints import tiny_config

from mdi import Engine, SamplingParams
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.batch import Batch, Slice, TokenSampling
from mdi.core.errors import NumbersError
from mdi.core.tensors import Unquantized
from mdi.layers.rope import text_positions
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.models.stage import Stage
from mdi.models.weights import load_stage
from tests.gateway.conftest import serving

MARK = "!"  # the token that makes the numbers overflow
LAYER = 4  # where: with two nodes at the second one
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
CAUSE = "the numbers of this request overflowed in float16, so the model has no answer; serve it with --dtype bfloat16"
SHARED = "The same beginning of a prompt, long enough to be worth keeping for the next one. " * 2


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layer `LAYER` overflows for what has anything in channel 0: the token MARK, and all images."""
    folder = tmp_path_factory.mktemp("models") / "overflowing"
    write_random_checkpoint(folder, tiny_config(tie_word_embeddings=False), dtype="float16")
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
        if name.startswith(f"model.layers.{LAYER}.mlp.") and name.endswith(("gate_proj.weight", "up_proj.weight")):
            weight[0] = 0
            weight[0, 0] = 1000
    weights["model.embed_tokens.weight"][:, 0] = 0
    weights["model.embed_tokens.weight"][ord(MARK), 0] = 100
    weights["visual.merger.mlp.2.bias"][0] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engine(overflowing: Path) -> Iterator[Engine]:
    with Engine(overflowing, n_nodes=2, dtype="float16", sequence_length=512, max_sequences=3) as engine:
        yield engine


def image_of(photograph: bytes) -> Any:
    return [{"role": "user", "content": [{"type": "image", "image": photograph}, {"type": "text", "text": "What?"}]}]


@pytest.mark.slow
def test_only_the_request_that_overflows_fails(engine: Engine, photograph: bytes) -> None:
    """A8: the others go on with the tokens they would have had, and every slot serves the next request as before."""
    questions = [SHARED + f"Number {number}" for number in range(6)]
    alone = [engine.chat(question, GREEDY) for question in questions]
    with ThreadPoolExecutor(9) as pool:
        wrong = [pool.submit(engine.chat, SHARED + MARK * n, GREEDY) for n in (1, 2, 300 - len(SHARED))]
        right = [pool.submit(engine.chat, question, GREEDY) for question in questions]
        wrong += [pool.submit(engine.chat, image_of(photograph), GREEDY.model_copy(update={"n": 3}))]
    for request in wrong:
        with pytest.raises(NumbersError, match=CAUSE):
            request.result()
    assert [answer.result().token_ids for answer in right] == [answer.token_ids for answer in alone]
    assert [engine.chat(question, GREEDY).token_ids for question in questions] == [a.token_ids for a in alone]
    assert engine.error is None


@pytest.mark.slow
def test_the_reason_reaches_the_client(engine: Engine) -> None:
    """A8: as an error of class 500, or as an event of the stream."""
    messages = [{"role": "user", "content": f"Hello{MARK}"}]
    chat: dict[str, Any] = {"model": "overflowing", "messages": messages, "max_tokens": 4}
    with serving(engine) as server:
        answer = server.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 500
        assert CAUSE in answer.json()["error"]["message"]
        streamed = server.post("/v1/chat/completions", json=chat | {"stream": True})
        assert CAUSE in streamed.text
        assert streamed.status_code == 500 or "data: " in streamed.text
        plain = server.post("/generate", json={"prompt": f"Hello{MARK}", "max_tokens": 4})
        assert plain.status_code == 500
        assert CAUSE in plain.json()["detail"]
        assert server.post("/generate", json={"prompt": "Hello", "max_tokens": 4}).status_code == 200


def loaded(folder: Path) -> Stage:
    config = read_config(tiny_config(tie_word_embeddings=False))
    weights = load_file(folder / "model.safetensors")
    spec = StageSpec.everything(config)
    made = load_stage(
        config, spec, torch.device("cpu"), Unquantized(lambda name, *_: weights[name].clone(), torch.float16)
    )
    return Stage(made, n_slots=2, sequence_length=300)


SAMPLING = TokenSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, sample=0, position=0)


def test_a_slice_that_overflows_is_named_and_leaves_the_rest_of_its_batch_and_the_next_user_of_its_slot_alone(
    overflowing: Path,
) -> None:
    """A8: in the middle of a prefill as well, before another sequence can take over its prefix."""
    stage, clean, bad = loaded(overflowing), list(range(40, 140)), [*range(40, 80), ord(MARK), *range(81, 140)]

    def run(*parts: tuple[int, list[int]]) -> Any:
        slices = tuple(Slice(slot, 0, len(ids), (SAMPLING,) if slot == 0 else ()) for slot, ids in parts)
        positions = torch.cat([text_positions(0, len(ids)) for _, ids in parts], dim=1)
        batch = Batch(7, slices, positions)
        hidden = stage.embed(torch.tensor([token_id for _, ids in parts for token_id in ids]))
        return stage.sample(batch, stage.run(batch, hidden))

    alone = run((0, clean))
    assert alone.overflowed == ()
    together = run((1, bad), (0, clean))
    assert together == replace(alone, overflowed=(0,))
    assert run((0, bad)).overflowed == (0,)
    assert run((0, clean)) == alone
