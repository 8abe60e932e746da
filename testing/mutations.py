"""Random damage to the JSON files of a checkpoint. The result answers as transformers does, or is refused."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from PIL import Image

from mdi import Engine, SamplingParams
from mdi.core.errors import CheckpointError, InputError, PromptTooLongError
from testing.oracle import Oracle

CONFIG, IMAGES, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 4242\n"
)
QUESTION = "What is on this picture?"
GREEDY = SamplingParams(temperature=0, max_tokens=6)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""How far below the likeliest token ours may be, relative to the largest logit: rounding differs between the two."""

ODD: Sequence[Any] = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 14, 16, 64, 271, 272, 2**31, 2**63, 10**30, 10**400),
    *(0.0, 0.5, -0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf")),
    *("", "a", "none", "64", "true", "float16", "bfloat16", "gelu", "default", "\ud800"),
    *([], {}, [0], [None], [[]], [1, 2, 3], {"a": 1}, {"rope_theta": 10.0}),
)

EXTRAS: Mapping[str, Sequence[tuple[str, Any]]] = {
    CONFIG: (
        ("head_dim", 16),
        ("head_dim", 32),
        ("layer_types", ["full_attention", "full_attention"]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [2, 3, 3]}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("dtype", "bfloat16"),
        ("dtype", None),
        ("sliding_window", 3),
        ("max_window_layers", 1),
        ("attention_bias", False),
        ("quantization_config", {"quant_method": "gptq"}),
        ("pad_token_id", 5),
        ("per_layer_config", {"0": {"hidden_size": 32}}),
        ("text_config", None),
        ("text_config", {}),
        ("partial_rotary_factor", 0.5),
    ),
    "generation_config.json": (
        ("repetition_penalty", 1.2),
        ("num_beams", 2),
        ("no_repeat_ngram_size", 1),
        ("suppress_tokens", [12]),
        ("do_sample", True),
        ("temperature", 0.01),
        ("min_new_tokens", 4),
        ("stop_strings", ["a"]),
        ("max_new_tokens", 3),
    ),
    IMAGES: (
        ("size", {"shortest_edge": 784, "longest_edge": 3136}),
        ("size", {"min_pixels": 784, "max_pixels": 3136}),
        ("do_resize", False),
        ("do_normalize", False),
        ("do_rescale", False),
        ("do_convert_rgb", False),
        ("resample", 0),
        ("rescale_factor", 0.5),
    ),
}
"""Entries that the tiny checkpoints lack."""


@dataclass(frozen=True)
class Mutation:
    """A file with another content; None is no file. what: how it was made."""

    file: str
    content: bytes | None
    what: str


@st.composite
def mutations(draw: st.DrawFn, folder: Path) -> Mutation:
    """One change of one JSON file of a checkpoint."""
    files = sorted(path.name for path in folder.glob("*.json"))
    file = draw(st.sampled_from([CONFIG, CONFIG, *files, *([PROCESSOR] if IMAGES in files else [])]))
    content = _content(folder, file)
    raw = json.dumps(content, ensure_ascii=False).encode()
    kind = draw(st.sampled_from(["bytes", *["entry"] * 12, *["extra"] * (3 * (file in EXTRAS)), *["nest"] * 2]))
    if kind == "bytes":
        return draw(_byte_mutations(file, raw))
    if kind == "extra":
        key, value = draw(st.sampled_from(EXTRAS[file]))
        content[key] = value
        what = f"{key} = {value}"
    elif kind == "nest":
        what = draw(_moves(content))
    else:
        what = draw(_edits(content))
    return Mutation(file, json.dumps(content).encode(), what)


def _content(folder: Path, file: str) -> Any:
    if file == PROCESSOR:
        return {"image_processor": json.loads((folder / IMAGES).read_text())}
    return json.loads((folder / file).read_text())


@st.composite
def _byte_mutations(draw: st.DrawFn, file: str, raw: bytes) -> Mutation:
    kind = draw(st.sampled_from(["cut", "pointer", "gone", "empty", "byte", "encoding", "deep"]))
    where = draw(st.integers(0, len(raw) - 1))
    contents: dict[str, bytes | None] = {
        "cut": raw[:where],
        "pointer": POINTER,
        "gone": None,
        "empty": b"",
        "byte": raw[:where] + draw(st.binary(min_size=1, max_size=1)) + raw[where + 1 :],
        "encoding": b"\xff\xfe" + raw.decode().encode("utf-16-le"),
        "deep": b'{"a":' + b"[" * 20_000,
    }
    return Mutation(file, contents[kind], f"{kind} at {where}")


@st.composite
def _moves(draw: st.DrawFn, content: dict[str, Any]) -> str:
    """Entries go into a part, or those of a part go to the top."""
    part = draw(st.sampled_from(["text_config", "vision_config", "image_processor", "rope_parameters"]))
    if isinstance(content.get(part), dict) and draw(st.booleans()):
        content |= content.pop(part)
        return f"{part} to the top"
    keys = sorted(key for key in content if key not in ("architectures", "vision_config", part))
    chosen = keys if not keys or draw(st.booleans()) else draw(st.lists(st.sampled_from(keys), unique=True, min_size=1))
    inner = dict(content[part]) if isinstance(content.get(part), dict) else {}
    content[part] = inner | {key: content.pop(key) for key in chosen}
    return f"{chosen} into {part}"


@st.composite
def _edits(draw: st.DrawFn, content: Any) -> str:
    """One change of one entry, wherever it stands."""
    holder, key = content, draw(_keys(content))
    trail = [key]
    while _can_descend(holder[key]) and draw(st.booleans()):
        holder = holder[key]
        key = draw(_keys(holder))
        trail.append(key)
    value, where = holder[key], "/".join(map(str, trail))
    kind = draw(st.sampled_from(["delete", "replace", "replace", "near", "near", "wrap", "swap", "rename", "repeat"]))
    if kind == "delete":
        del holder[key]
        return f"{where} deleted"
    if kind == "swap":
        other = draw(_keys(holder))
        holder[key], holder[other] = holder[other], value
        return f"{where} and {other} swapped"
    if kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from([key.upper(), f"{key}s", f"_{key}"]))] = holder.pop(key)
        return f"{where} renamed"
    if kind == "repeat" and isinstance(value, list):
        holder[key] = draw(st.sampled_from([value * 2, value[::-1], value[:-1], value[1:]]))
    elif kind == "wrap":
        holder[key] = draw(st.sampled_from([[value], {"value": value}, str(value)]))
    elif kind == "near" and isinstance(value, (int, float)):
        holder[key] = draw(st.sampled_from(_near(value)))
    else:
        holder[key] = draw(st.sampled_from(ODD))
    return f"{where} = {str(holder[key])[:60]}"


def _keys(holder: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder)))


def _can_descend(value: Any) -> bool:
    return isinstance(value, (dict, list)) and len(value) > 0


def _near(value: float) -> list[Any]:
    near = [value + 1, value - 1, value * 2, -value, float(value), str(value), value / 2]
    return [*near, value // 2, value // 4, value * 3]


@contextmanager
def mutated(folder: Path, mutation: Mutation) -> Iterator[Path]:
    """A copy of a checkpoint with a mutation. Its other files are links."""
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(parent) / "model"
        copy.mkdir()
        for path in folder.iterdir():
            if path.is_file() and path.name != mutation.file:
                (copy / path.name).symlink_to(path)
        if mutation.content is not None:
            (copy / mutation.file).write_bytes(mutation.content)
        yield copy


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation. message: of the refusal."""

    kind: Literal["equal", "alone", "refused"]
    message: str = ""


def outcome_of(path: Path, mutation: Mutation, picture: Image.Image | None) -> Outcome:
    """Loads a mutated checkpoint and asks it for text and, where it sees, about a picture.

    "equal": the answers are transformers'; "alone": transformers cannot load or answer, and so says nothing.
    Raises AssertionError for a wrong answer or a refusal that does not name the file; lets every other error through.
    """
    try:
        with Engine(path) as engine:
            pictures = [None] if picture is None or not _sees(path) else [None, picture]
            answers = [our_answer(engine, shown) for shown in pictures]
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message, message
        assert any(name in message for name in (mutation.file, *_related(mutation.file))), message
        return Outcome("refused", message)
    return Outcome("equal" if _all_equal(path, pictures, answers) else "alone")


def our_answer(engine: Engine, picture: Image.Image | None) -> list[int] | InputError:
    """Ids of the greedy answer, or why there is none."""
    try:
        return list(engine.chat([{"role": "user", "content": _content_of(picture)}], GREEDY).token_ids)
    except InputError as error:
        return error


def _content_of(picture: Image.Image | None) -> Any:
    if picture is None:
        return QUESTION
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return [{"type": "image", "image": buffer.getvalue()}, {"type": "text", "text": QUESTION}]


def _sees(path: Path) -> bool:
    return "Qwen2VL" in (path / CONFIG).read_text()


def _related(file: str) -> tuple[str, ...]:
    """Files that a refusal may name in its place, where two contradict each other."""
    if file in ("tokenizer.json", "tokenizer_config.json"):
        return ("tokenizer", "chat template")
    if file in (IMAGES, PROCESSOR):
        return (IMAGES, PROCESSOR)
    return (IMAGES,) if file == CONFIG else ()


def _all_equal(path: Path, pictures: Sequence[Image.Image | None], answers: Sequence[list[int] | InputError]) -> bool:
    """Whether transformers answers at all. Raises AssertionError where it does, and otherwise than here."""
    try:
        oracle = Oracle(path)
        expected = [oracle.answer(QUESTION, picture, n_tokens=6) for picture in pictures]
    except Exception:
        return False
    for picture, ours, theirs in zip(pictures, answers, expected, strict=True):
        if isinstance(ours, PromptTooLongError):  # max_position_embeddings is the most that is accepted here
            continue
        assert not isinstance(ours, InputError), f"transformers answers, but here: {ours}"
        index = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if index is None:
            assert len(ours) == len(theirs) or oracle.end_ids is None, f"{ours}, transformers {theirs}"
            continue
        assert _nearly_likeliest(oracle, picture, theirs[:index], ours[index]), f"{ours}, transformers {theirs}"
    return True


@torch.inference_mode()
def _nearly_likeliest(oracle: Oracle, picture: Image.Image | None, answer: Sequence[int], token: int) -> bool:
    inputs = oracle.inputs(QUESTION, picture)
    more = torch.tensor([list(answer)], dtype=torch.int64)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], more), 1)
    if picture is not None:
        inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(more)), 1)
    logits = oracle.model(**inputs, use_cache=False).logits[0, -1].float()
    return bool(logits.max() - logits[token] <= TOLERANCE[oracle.model.dtype] * logits.abs().max())
