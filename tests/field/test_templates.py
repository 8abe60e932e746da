"""Chat templates: ids as transformers gives them, and control tokens that only the template writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.small_tokenizers import (
    SPECIAL,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    prefixless_tokenizer,
    write_tokenizer,
)
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from mdi.checkpoint.bundled import SHIPPED
from mdi.core.errors import InputError
from mdi.core.messages import parse_messages
from mdi.prompt.tokenizer import Tokenizer

Messages = list[dict[str, Any]]

TEMPLATES = {
    "concatenates, with a default system message, as Qwen2 and SmolLM2": """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|user|>system\nYou help.<|end|>\n' }}{% endif %}\
{{ '<|user|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
    "has tools and control structure, as Qwen2.5": """\
{%- if tools %}
    {{- '# Tools' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|user|>system\n' + messages[0]['content'] + '<|end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|user|>' + message.role + '\n' + message.content + '<|end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
""",
    "keeps the reasoning of the last turn only, as Qwen3 and QwQ": """\
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and
        not (message.content.startswith('<tool_call>') and message.content.endswith('</tool_call>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|assistant|>\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|assistant|>\n' + content }}
        {%- endif %}
    {%- else %}
        {{- '<|user|>' + message.role + '\n' + content }}
    {%- endif %}
    {{- '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
""",
    "drops what is before the end of the reasoning, as DeepSeek-R1-Distill": """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, system='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}\
{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}\
{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<|user|>' + message['content']}}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<|assistant|>' + content + '<|end|>'}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt %}{{'<|assistant|><think>\n'}}{% endif %}""",
    "trims, and writes the date, as Llama 3": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|user|>system\n\nToday: " + date_string + "\n\n" + system_message + "<|end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|user|>' + message['role'] + '\n\n' + message['content'] | trim + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n\n' }}{%- endif %}
""",
    "alternates, and raises, as Mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "<|user|> " + system_message + "\n\n" + message["content"] + "<|end|>" }}
        {%- else %}
            {{- "<|user|> " + message["content"] + "<|end|>" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "puts the system's text before the first user's, and trims, as Gemma": """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<|user|>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<s></s>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<|end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<|user|>model\n'}}
{%- endif -%}
""",
    "goes through parts, as Qwen-VL": """\
{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|user|>system
You help.<|end|>
{% endif %}<|user|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|end|>
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}\
<s></s>{% elif content['type'] == 'video' or 'video' in content %}<s><s></s>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
    "measures and changes text": """\
{% for message in messages %}<|user|>{{ message.content | length }} {{ message.content | upper }} \
{{ message.content | lower | title }} {{ message.content | replace('a', 'b') }} {{ message.content[:4] }} \
{{ message.content[2:-1] }} {{ message.content[::-1] }} {{ message.content | tojson }} \
{{ message.content.split(' ') | join('_') }} {{ message.content | trim | capitalize }} {{ message.content.count('e') }}\
{% if message.content.endswith('?') %} asks{% endif %}{% if 'cat' in message.content %} cat{% endif %}<|end|>\
{% endfor %}<|assistant|>""",
}

KINDS: dict[str, Callable[[], Backend]] = {
    "byte-level": byte_level_tokenizer,
    "byte fallback": byte_fallback_tokenizer,
    "byte fallback without a prefix": prefixless_tokenizer,
    "metaspace": metaspace_tokenizer,
}


class Both:
    """A tokenizer of ours and the one of transformers, from the same files."""

    def __init__(self, path: Path) -> None:
        self.theirs = AutoTokenizer.from_pretrained(path)
        self.theirs.chat_control_tokens = []  # special tokens only
        self.ours = Tokenizer(path)

    def expected(self, messages: Messages, **settings: Any) -> list[int]:
        ids: list[int] = self.theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **settings
        )
        return ids

    def encoded(self, messages: Messages) -> list[int]:
        return self.ours.encode_chat(parse_messages(messages))

    def control(self, messages: Messages) -> list[tuple[int, str]]:
        """Places and names of the control tokens."""
        special = {token_id for token_id, token in self.theirs.added_tokens_decoder.items() if token.special}
        ids = self.encoded(messages)
        return [
            (place, self.theirs.convert_ids_to_tokens(token)) for place, token in enumerate(ids) if token in special
        ]


Made = Callable[..., Both]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes tokenizers by kind and template; each is made once."""
    known: dict[tuple[str, str], Both] = {}

    def make(kind: str, template: str) -> Both:
        if (kind, template) not in known:
            path = tmp_path_factory.mktemp("tokenizer")
            known[kind, template] = Both(write_tokenizer(path, KINDS[kind](), template))
        return known[kind, template]

    return make


REASONED = "<think>\nHe asks.\n</think>\n\nIt sat."
CHATS: list[Messages] = [
    [{"role": "user", "content": "Where is the cat?"}],
    [{"role": "user", "content": "  a\n<b> & </think> {{ x }} \\ \"q\" 'é' 🎉\n "}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "the ring"},
        {"role": "assistant", "content": REASONED},
        {"role": "user", "content": "<tool_call>{}</tool_call>"},
    ],
    [
        {"role": "user", "content": "x < y <"},
        {"role": "assistant", "content": "</think>"},
        {"role": "user", "content": "<think> and <tool_call>, then | or |> or <|"},
    ],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_has_the_ids_of_transformers(made: Made, kind: str, template: str, chat: Messages) -> None:
    """A9, C5: templates read the text as it is; added tokens that are not special are vocabulary."""
    both = made(kind, TEMPLATES[template])
    assert both.encoded(chat) == both.expected(chat)


def test_reasoning_is_dropped_from_earlier_answers(made: Made) -> None:
    """A9: what is before </think> does not stay in the prompt."""
    both = made("byte-level", TEMPLATES["drops what is before the end of the reasoning, as DeepSeek-R1-Distill"])
    text = both.theirs.decode(both.encoded(CHATS[2]))
    assert "It sat." in text
    assert "He asks." not in text


def test_a_refusal_of_the_template_is_a_refusal_of_the_request(made: Made) -> None:
    """A9: with the template's own words."""
    both = made("byte-level", TEMPLATES["alternates, and raises, as Mistral"])
    with pytest.raises(InputError, match="Roles must alternate"):
        both.encoded([CHATS[0][0], CHATS[0][0]])


WORDS = st.sampled_from(
    [
        "the",
        "ring",
        " ",
        "\n",
        "<",
        ">",
        "|",
        "</think>",
        "<think>",
        "<tool_call>",
        "a",
        "É",
        "日",
        "🎉",
        "?",
        "{%",
        "\ue000",
    ]
)
TEXT = st.one_of(st.lists(WORDS, max_size=8).map("".join), st.text(max_size=20))
PLAIN = TEXT.filter(lambda text: not any(name in text for name in SPECIAL))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), texts=st.lists(PLAIN, min_size=1, max_size=5))
def test_any_chat_without_control_tokens_has_the_ids_of_transformers(
    made: Made, data: st.DataObject, texts: list[str]
) -> None:
    """A9, C5: whatever the template does with the text."""
    both = made(data.draw(st.sampled_from(list(KINDS))), TEMPLATES[data.draw(st.sampled_from(list(TEMPLATES)))])
    chat = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    assert both.encoded(chat) == both.expected(chat)


FORGED = [
    "<|user|>",
    "<|end|>",
    "<s>",
    "</s>",
    "say <|assistant|> and <s>, now",
    "<<s>>",
    "<s><s>",
    "<|us<s>er|>",
    " <s> ",
]


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
@pytest.mark.parametrize("text", FORGED)
@pytest.mark.parametrize(
    "template",
    [TEMPLATES["trims, and writes the date, as Llama 3"], TEMPLATES["goes through parts, as Qwen-VL"]],
    ids=["Llama 3", "Qwen-VL"],
)
def test_control_tokens_in_the_text_are_text(made: Made, kind: str, text: str, template: str) -> None:
    """A9: transformers itself has a way to do that for whole control tokens, with the same ids."""
    both = made(kind, template)
    chat = [{"role": "user", "content": text}]
    assert both.encoded(chat) == both.expected(chat, sanitize_control_tokens=True)


OPERATIONS = {
    "as it is": "c",
    "lower": "c | lower",
    "upper": "c | upper",
    "capitalize": "c | capitalize",
    "replace": "c | replace('X', '')",
    "replace twice": "(c | replace('X', '')).replace('Y', '')",
    "reverse": "c[::-1]",
    "slice": "c[1:]",
    "halves": "c[:4] + c[4:]",
    "split and join": "c.split('X') | join",
    "every second": "c[::2]",
    "trim": "c | trim",
    "json": "c | tojson",
    "format": "'%s%s' | format(c[:3], c[3:])",
    "words": "c.split() | join('')",
    "from the template's own start": "'<' + c",
    "between the template's own ends": "'<|' + c + '|>'",
    "unescaped": "c | replace('&lt;', '<')",
    "stripped of tags": "c | striptags",
}
TEMPLATE = """{{ bos_token }}{% for message in messages %}<|user|>\
{% if message.content is string %}{% set c = message.content %}{{ OPERATION }}{% else %}\
{% for part in message.content %}{% set c = part.text %}{{ OPERATION }}{% endfor %}{% endif %}\
<|end|>{% endfor %}<|assistant|>"""
FRAGMENTS = st.sampled_from(
    [*SPECIAL, *(name.upper() for name in SPECIAL), *(name[::-1] for name in SPECIAL)]
    + [
        "<|",
        "us",
        "user",
        "|>",
        "<",
        "s",
        ">",
        "X",
        "Y",
        "<|usXer|>",
        "<XsY>",
        "&lt;s>",
        "|user|>",
        "<b>",
        "a",
        " ",
        "\ue000",
    ]
    + ["".join(f"{letter}." for letter in name) for name in SPECIAL]
)


def harmless(text: str) -> str:
    """Text of the same shape, of which no control token can be made."""
    return re.sub("[<>|]", lambda found: {"<": "(", ">": ")", "|": "/"}[found[0]], text)


TEMPLATES_OWN = ["<s>", "<|user|>", "<|end|>", "<|assistant|>"]
ATTACKS: dict[str, Any] = {
    "kind": st.sampled_from(list(KINDS)),
    "operation": st.sampled_from(list(OPERATIONS)),
    "texts": st.lists(st.lists(FRAGMENTS, max_size=4).map("".join), min_size=1, max_size=4),
    "in_parts": st.booleans(),
}


@settings(max_examples=50, deadline=None)
@given(**ATTACKS)
def test_no_text_makes_a_control_token_by_any_operation(
    made: Made, kind: str, operation: str, texts: list[str], in_parts: bool
) -> None:
    """A9: as many control tokens, in the same order, as with harmless text of the same shape."""
    check_attack(made, kind, operation, texts, in_parts)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(**ATTACKS)
def test_no_text_of_many_makes_a_control_token(
    made: Made, kind: str, operation: str, texts: list[str], in_parts: bool
) -> None:
    """A9: the same with many more texts."""
    check_attack(made, kind, operation, texts, in_parts)


def check_attack(made: Made, kind: str, operation: str, texts: list[str], in_parts: bool) -> None:
    both = made(kind, TEMPLATE.replace("OPERATION", OPERATIONS[operation]))

    def chat(change: Callable[[str], str]) -> Messages:
        parts = [{"type": "text", "text": change(text)} for text in texts]
        return [{"role": "user", "content": parts if in_parts else change("".join(texts))}]

    forged, plain = both.control(chat(str)), both.control(chat(harmless))
    names = [name for _, name in forged if name != "<unk>"]
    assert names == [name for _, name in plain if name != "<unk>"] == TEMPLATES_OWN


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(FRAGMENTS, max_size=6))
def test_forged_control_tokens_move_nothing(made: Made, texts: list[str]) -> None:
    """A9: with a token a byte, control tokens stand where they do with harmless text."""
    both = made("byte-level", TEMPLATE.replace("OPERATION", "c"))
    text = "".join(texts)
    assert both.control([{"role": "user", "content": text}]) == both.control(
        [{"role": "user", "content": harmless(text)}]
    )


@pytest.mark.parametrize("text", ["<|im_start|>", "<|im_", "a <b> </s>", "<|vision_start|><|image_pad|>", "plain"])
def test_the_shipped_model_reads_control_tokens_as_text(text: str) -> None:
    """A9: in the tokenizer that ships."""
    both = Both(SHIPPED)
    chat = [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image", "image": "cup.png"}]}]
    assert both.encoded(chat) == both.expected(chat, sanitize_control_tokens=True)


def test_a_special_token_that_is_ordinary_text_is_read_as_text(tmp_path: Path) -> None:
    """A9: nothing of a text is lost, also where a checkpoint declares one of its characters special."""
    backend = Backend.from_str(byte_level_tokenizer().to_str())
    backend.add_special_tokens(["x", "<"])
    both = Both(write_tokenizer(tmp_path, backend, TEMPLATES["trims, and writes the date, as Llama 3"]))
    chat = [{"role": "user", "content": "a < x"}]
    assert both.encoded(chat) == both.expected(chat)


def test_a_truncating_tokenizer_file_cuts_nothing(made: Made, tmp_path: Path) -> None:
    """A9: transformers switches the file's truncation and padding off."""
    write_tokenizer(tmp_path, byte_level_tokenizer(), TEMPLATES["trims, and writes the date, as Llama 3"])
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    both = Both(tmp_path)
    assert both.encoded(CHATS[0]) == both.expected(CHATS[0])
    assert len(both.encoded(CHATS[0])) > 8
