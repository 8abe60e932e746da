"""Files of a checkpoint's tokenizer: which counts, what is said of one that cannot be used, and what cannot fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.checkpoints import tiny_text_config
from testing.small_tokenizers import (
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    prefixless_tokenizer,
    write_tokenizer,
)
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, ProcessorMixin

from mdi import Engine
from mdi.checkpoint.bundled import SHIPPED
from mdi.core.errors import CheckpointError, PromptTooLongError
from mdi.core.messages import RawText, parse_messages
from mdi.media import MediaPolicy
from mdi.models.registry import read_config
from mdi.prompt.builder import PromptBuilder
from mdi.prompt.control_tokens import ControlTokens
from mdi.prompt.tokenizer import Tokenizer
from mdi.prompt.vocabulary import check_vocabulary

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 7031645\n"
)
QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint without its weights."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny", ignore=ignored))


def change(path: Path, **entries: Any) -> None:
    """Sets entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in (content | entries).items() if value is not None}))


def test_a_missing_tokenizer_is_refused_at_load(checkpoint: Path) -> None:
    """A6: the error names the file."""
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(checkpoint)


def test_a_missing_tokenizer_is_built_of_its_vocabulary(checkpoint: Path) -> None:
    """A6: transformers builds it of vocab.json and merges.txt."""
    description = json.loads((checkpoint / "tokenizer.json").read_text())
    expected = Tokenizer(checkpoint).encode_chat(parse_messages(QUESTION))
    (checkpoint / "vocab.json").write_text(json.dumps(description["model"]["vocab"]))
    (checkpoint / "merges.txt").write_text("#version: 0.2\n")
    (checkpoint / "tokenizer.json").unlink()
    added = {str(token.pop("id")): token for token in description["added_tokens"]}
    change(checkpoint / "tokenizer_config.json", added_tokens_decoder=added)
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    assert Tokenizer(checkpoint).encode_chat(parse_messages(QUESTION)) == expected
    assert theirs.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False) == expected


FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
]
DAMAGED = {"Git LFS pointer": POINTER, "cut": '{"model": {"vo', "list": "[1, 2]", "empty": "", "nul": "\0" * 50}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named(checkpoint: Path, file: str, damage: str) -> None:
    """A6, C3: with the remedy, in one line."""
    (checkpoint / file).write_text(DAMAGED[damage])
    with pytest.raises(CheckpointError, match=f"^{file}.*(download|git lfs pull)") as refused:
        Tokenizer(checkpoint)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", POINTER.encode()),
        ("chat_template.jinja", b"{% for message in messages %}{{ message.content }}"),
        ("chat_template.jinja", b"{{ message.content"),
        ("chat_template.jinja", b"\xff\xfe\x00"),
        ("chat_template.jinja", b""),
        ("additional_chat_templates/default.jinja", b"{% endfor %}"),
        ("chat_template.json", b'{"chat_template": 5}'),
        ("chat_template.json", b'{"template": "x"}'),
        ("processor_config.json", b'{"chat_template": "{% if %}"}'),
        ("tokenizer_config.json", b'{"chat_template": "{{ "}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}'),
        ("tokenizer_config.json", b'{"chat_template": 3.5}'),
    ],
)
def test_a_damaged_chat_template_is_refused_at_load(checkpoint: Path, file: str, content: bytes) -> None:
    """A6: with its file named."""
    if file == "tokenizer_config.json":
        content = json.dumps(json.loads((checkpoint / file).read_text()) | json.loads(content)).encode()
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{Path(file).parts[0]}.*download"):
        Tokenizer(checkpoint)


def without_text(description: dict[str, Any]) -> None:
    description["model"] |= {"vocab": {}, "merges": []}


def without_model(description: dict[str, Any]) -> None:
    del description["model"]


@pytest.mark.parametrize("damage", [without_text, without_model])
def test_a_tokenizer_without_a_vocabulary_is_refused(
    checkpoint: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    """A6: it would answer nothing."""
    description = json.loads((checkpoint / "tokenizer.json").read_text())
    damage(description)
    (checkpoint / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(checkpoint)


def test_a_token_beyond_the_embedding_is_refused_at_start(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """B1: before any weight is loaded, naming token and sizes."""
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))
    tokenizer = Backend.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|extra_{index}|>") for index in range(9)])
    tokenizer.save(str(path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"'<\|extra_8\|>' with id 272, but the model has 272 tokens"):
        Engine(path)


def test_an_embedding_with_more_rows_than_tokens_is_no_fault() -> None:
    """B1: published models have such."""
    config = replace(read_config(json.loads((SHIPPED / "config.json").read_text())), vocab_size=10**6)
    check_vocabulary(Tokenizer(SHIPPED).backend, config)


VISION = "{{ '<|im_start|>' }}{% for p in messages[0].content %}{{ p.text or '<|image_pad|>' }}{% endfor %}"
TEXT = "{{ '<|im_end|>' + messages[0].content }}"
PICTURE = [{"role": "user", "content": [{"type": "image", "image": "cup.png"}, {"type": "text", "text": "?"}]}]


def write_templates(checkpoint: Path, files: dict[str, str]) -> None:
    for file, template in files.items():
        (checkpoint / file).parent.mkdir(exist_ok=True)
        if file.endswith(".json"):
            change(checkpoint / file, chat_template=template)
        else:
            (checkpoint / file).write_text(template)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": TEXT, "chat_template.json": VISION},
        {"tokenizer_config.json": TEXT, "chat_template.jinja": VISION},
        {"tokenizer_config.json": TEXT, "processor_config.json": VISION},
        {"chat_template.jinja": TEXT, "chat_template.json": VISION},
        {"chat_template.json": TEXT, "processor_config.json": VISION},
        {"chat_template.jinja": TEXT, "processor_config.json": VISION},
        {"tokenizer_config.json": TEXT, "additional_chat_templates/default.jinja": VISION},
        {"chat_template.jinja": VISION, "additional_chat_templates/rag.jinja": TEXT},
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that transformers leaves open
def test_a_vision_model_has_the_template_of_its_processor(checkpoint: Path, files: dict[str, str]) -> None:
    """C1: as transformers' AutoProcessor reads it."""
    write_templates(checkpoint, files)
    template = ProcessorMixin.get_processor_dict(checkpoint)[0]["chat_template"]
    assert (template if isinstance(template, str) else template["default"]) == VISION
    expected = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
        PICTURE, chat_template=VISION, add_generation_prompt=True, return_dict=False
    )
    assert Tokenizer(checkpoint).encode_chat(parse_messages(PICTURE)) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": TEXT, "chat_template.json": VISION},
        {"tokenizer_config.json": VISION, "chat_template.jinja": TEXT},
        {"tokenizer_config.json": TEXT, "processor_config.json": VISION},
    ],
)
def test_a_text_model_has_the_template_of_its_tokenizer(checkpoint: Path, files: dict[str, str]) -> None:
    """C1: as transformers' AutoTokenizer reads it."""
    change(checkpoint / "config.json", vision_config=None, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    write_templates(checkpoint, files)
    expected = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )
    assert Tokenizer(checkpoint).encode_chat(parse_messages(QUESTION)) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_templates_that_contradict_each_other_are_refused(checkpoint: Path) -> None:
    """C1: transformers' processor refuses them, too."""
    write_templates(checkpoint, {"chat_template.json": VISION, "additional_chat_templates/rag.jinja": TEXT})
    with pytest.raises(ValueError, match="conflicting"):
        ProcessorMixin.get_processor_dict(checkpoint)
    with pytest.raises(CheckpointError, match=r"chat_template\.json and the folder additional_chat_templates"):
        Tokenizer(checkpoint)


LLAMA = "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] | trim }}{% endfor %}"
PRINTED = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
PARTS = """{% for message in messages %}<s>{% for part in message['content'] %}{% if part['type'] == 'text' %}\
{{ part['text'] }}{% else %}</s>{% endif %}{% endfor %}{% endfor %}"""
EITHER = "{% for m in messages %}{{ m.content if m.content is string else '</s>' + m.content[0].text }}{% endfor %}"
MIXED = """{% for message in messages %}{% if message.role == 'system' %}{{ '<s>' + message.content }}{% else %}\
{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("template", [LLAMA, PRINTED, PARTS, MIXED])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_text_parts_and_strings_are_the_same_to_a_template_that_reads_one_form(
    tmp_path: Path, template: str, role: str
) -> None:
    """C2: one that concatenates gets a string, one that goes through parts gets parts."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, byte_level_tokenizer(), template))
    user: list[dict[str, Any]] = [] if role == "user" else [{"role": "user", "content": "Go on."}]
    as_string = [{"role": role, "content": "hello"}, *user]
    as_parts = [{"role": role, "content": [{"type": "text", "text": "hello"}]}, *user]
    ids = tokenizer.encode_chat(parse_messages(as_string))
    assert ids == tokenizer.encode_chat(parse_messages(as_parts))
    text = tokenizer.backend.decode(ids)
    assert "hello" in text
    assert "type" not in text


def test_a_template_that_reads_both_forms_gets_what_was_sent(tmp_path: Path) -> None:
    """C2: nothing is changed where transformers' template has an opinion."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, byte_level_tokenizer(), EITHER))
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert (
        tokenizer.backend.decode(tokenizer.encode_chat(parse_messages(parts)), skip_special_tokens=False) == "</s>hello"
    )


def test_several_text_parts_become_lines(tmp_path: Path) -> None:
    """C2: for a template that reads strings."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, byte_level_tokenizer(), PRINTED))
    parts = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("one", "two")]}]
    assert tokenizer.backend.decode(tokenizer.encode_chat(parse_messages(parts))) == "one\ntwo"


LENGTH = 24
KINDS = {
    "byte-level": byte_level_tokenizer,
    "byte fallback": byte_fallback_tokenizer,
    "byte fallback without a prefix": prefixless_tokenizer,
    "metaspace": metaspace_tokenizer,
}
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
TRIMMED = "{% for message in messages %}{{ message.content.split('</think>')[-1] | trim }}{% endfor %}"


@pytest.fixture(scope="module")
def builders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], PromptBuilder]:
    """A builder for each kind of tokenizer and template, with a short sequence length."""
    config = read_config(tiny_text_config())
    return {
        (kind, template): PromptBuilder(
            config,
            Tokenizer(write_tokenizer(tmp_path_factory.mktemp("lengths"), make(), template)),
            None,
            MediaPolicy(),
            LENGTH,
        )
        for kind, make in KINDS.items()
        for template in (PLAIN, TRIMMED)
    }


LETTERS = st.sampled_from(
    ["the ring", "  ", "a", "\n", "e", "\u0301", "\u0323", "\u1100", "\u1161", "\u11a8", "日", "🎉"]
)
SHORT_TEXT = st.one_of(st.lists(LETTERS, max_size=LENGTH).map("".join), st.text(max_size=LENGTH))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    template=st.sampled_from([PLAIN, TRIMMED]),
    texts=st.lists(SHORT_TEXT, min_size=1, max_size=4),
)
def test_no_text_that_fits_is_refused_before_it_is_tokenised(
    builders: dict[tuple[str, str], PromptBuilder], kind: str, template: str, texts: list[str]
) -> None:
    """D1: the bound is below the number of tokens, whatever the template drops."""
    builder = builders[kind, template]
    chat = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    n_tokens = len(builder._tokenizer.encode_chat(parse_messages(chat)))
    if 0 < n_tokens < LENGTH:
        assert len(builder.build(chat).token_ids) == n_tokens
    elif n_tokens:
        with pytest.raises(PromptTooLongError):
            builder.build(chat)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(list(KINDS)), text=st.one_of(SHORT_TEXT, st.text(max_size=200)))
def test_the_bound_is_no_more_than_the_number_of_tokens(
    builders: dict[tuple[str, str], PromptBuilder], kind: str, text: str
) -> None:
    """D1: for texts that are normalised, byte by byte or as words."""
    tokenizer = builders[kind, PLAIN]._tokenizer
    assert tokenizer.least_tokens(text, 10**9) <= len(tokenizer.encode(text))


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
@pytest.mark.parametrize("text", ["hello world " * 100_000, "日本語" * 100_000, "\u00e9" * 3_000_000, " x" * 2_000_000])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    builders: dict[tuple[str, str], PromptBuilder], kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D1: at submit, whether it is one text or many together, and also where it is an answer's."""
    builder = builders[kind, PLAIN]
    parts = [{"type": "text", "text": text[start::4]} for start in range(4)]
    prompts: list[Any] = [
        text,
        RawText(text),
        [{"role": "user", "content": text}],
        [{"role": "user", "content": parts}],
    ]
    monkeypatch.setattr(ControlTokens, "encode", pytest.fail)
    monkeypatch.setattr(Tokenizer, "encode", pytest.fail)
    for prompt in prompts:
        with pytest.raises(PromptTooLongError, match="at least"):
            builder.check(prompt)


def test_a_long_answer_is_refused_before_it_is_tokenised(
    builders: dict[tuple[str, str], PromptBuilder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D1: the template may drop it, so its rendered text is measured."""
    monkeypatch.setattr(ControlTokens, "_written", pytest.fail)
    chat = [
        {"role": "user", "content": "<"},
        {"role": "assistant", "content": "x" * 10**6},
        {"role": "user", "content": "?"},
    ]
    with pytest.raises(PromptTooLongError, match="at least"):
        builders["byte-level", PLAIN].build(chat)
