"""What clients send to OpenAI's routes: every form of it means what it means elsewhere, or is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.checkpoints import tiny_text_config
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2VLForConditionalGeneration

from mdi import Engine
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.messages import RawText
from mdi.media import MediaPolicy
from tests.gateway.conftest import RealServer, serving

FRANCE = "The capital of France is"
PREFIX = "<|fim_prefix|>def f(x):\n    <|fim_suffix|>\n<|fim_middle|>"


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Iterator[RealServer]:
    """Serves a tiny Qwen2-VL."""
    with Engine(tiny_checkpoint, sequence_length=512, max_sequences=4, media=MediaPolicy(remote=False)) as engine:  # noqa: SIM117
        with serving(engine) as server:
            yield server


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model whose tokenizer starts every text with a BOS token, and knows tokens for fill-in-the-middle."""
    path = write_random_checkpoint(tmp_path_factory.mktemp("raw") / "llama-like", tiny_text_config())
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, name in enumerate(("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")):
        tokenizer["added_tokens"].append({"id": 259 + number, "content": name, **special})
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def theirs(model: Any, tokenizer: Any, ids: Sequence[int], n_tokens: int) -> str:
    """The greedy answer of transformers to token ids."""
    with torch.no_grad():
        out = model.generate(torch.tensor([list(ids)]), max_new_tokens=n_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def test_a_completion_continues_exactly_its_prompt(tiny: RealServer, tiny_checkpoint: Path) -> None:
    """A14, C7: strings, lists of strings, token ids and lists of them, with the text and the usage of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    first, second = tokenizer(FRANCE).input_ids, tokenizer("x = <|im_end|> 7").input_ids
    assert 258 in second  # names of special tokens are those tokens
    expected = [theirs(model, tokenizer, ids, 12) for ids in (first, second)]
    for prompt, texts, n_tokens in (
        (FRANCE, expected[:1], len(first)),
        ([FRANCE, "x = <|im_end|> 7"], expected, len(first) + len(second)),
        (first, expected[:1], len(first)),
        ([first, second], expected, len(first) + len(second)),
        ([FRANCE, second], expected, len(first) + len(second)),
        ([float(token) for token in first], expected[:1], len(first)),
    ):
        answer = tiny.client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)  # type: ignore[arg-type]
        assert [choice.text for choice in answer.choices] == texts
        assert answer.usage
        assert answer.usage.prompt_tokens == n_tokens


def test_a_raw_text_has_the_special_tokens_that_its_tokenizer_gives_it(llama_like: Path) -> None:
    """A14: a BOS token is added, and the tokens of fill-in-the-middle are recognised, as transformers does."""
    tokenizer = AutoTokenizer.from_pretrained(llama_like)
    model = Qwen2ForCausalLM.from_pretrained(llama_like).eval()
    with Engine(llama_like, sequence_length=256) as engine:
        for text in (FRANCE, PREFIX, "", "é\u0301 <|im_start|>"):
            ids = tokenizer(text).input_ids
            assert ids[0] == 256
            with serving(engine) as server:
                answer = server.client.completions.create(model="llama-like", prompt=text, max_tokens=12, temperature=0)
            assert answer.usage
            assert answer.usage.prompt_tokens == len(ids)
            assert answer.choices[0].text == theirs(model, tokenizer, ids, 12)
    assert tokenizer(PREFIX).input_ids[1] == tokenizer.convert_tokens_to_ids("<|fim_prefix|>")


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([5, 999], "prompt[1]"),
        ([5, -1], "prompt[1]"),
        ([[5], [6, 272]], "prompt[1][1]"),
        ([5, 262], "prompt"),
        ("a <|image_pad|> b", "prompt"),
        ([5, True], "prompt[1]"),
        ([5, 1.5], "prompt[1]"),
        ([5, "a"], "prompt[1]"),
        (["a", 5], "prompt[1]"),
        ([["a"]], "prompt[0][0]"),
        ([[]], "prompt[0]"),
        ([], "prompt"),
        ("", "prompt"),
        (["a", ""], "prompt"),
        ([[1]] * 65, "prompt"),
        ([7] * 512, "prompt"),
        ("\ud800", "prompt"),
        (["a", "\ud800"], "prompt[1]"),
        (None, "prompt"),
        (7, "prompt"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_prompt_that_is_none_is_refused_by_its_place(tiny: RealServer, prompt: Any, field: str) -> None:
    """C7: an id beyond the vocabulary, a placeholder of media, and what is no prompt at all."""
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 2})
    answer = tiny.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_a_plain_prompt_of_the_guide_is_still_one_user_message(tiny: RealServer) -> None:
    """A14: /generate keeps the chat template; only OpenAI's completions continue a text."""
    asked = {"max_tokens": 12, "temperature": 0}
    chat = tiny.post("/generate/multimodal", json={"messages": [{"role": "user", "content": FRANCE}], **asked})
    assert tiny.post("/generate", json={"prompt": FRANCE, **asked}).json() == chat.json()
    assert tiny.engine.chat(RawText(FRANCE)).text != chat.json()["samples"][0]
