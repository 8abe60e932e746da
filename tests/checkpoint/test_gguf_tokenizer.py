"""SentencePiece tokenizers of GGUF files: token by token those of transformers, and of llama.cpp on the same file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from testing.checkpoints import tiny_text_config
from testing.gguf_files import write_gguf
from testing.llama_cpp import LlamaCpp
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizerFast

from mdi.checkpoint.gguf import gguf_folder
from mdi.checkpoint.gguf_tokenizer import write_tokenizer
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.errors import CheckpointError

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANY_TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("etaoin shrdlu\n\t▁é日🎉")), max_size=40)


@cache
def trained() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a text in the repository, in the order in which they were found."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    made = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(made["vocab"], key=made["vocab"].get)
    return pieces, [tuple(pair) for pair in made["merges"]]


def entries(**changes: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes a tokenizer.model: a piece's score is its place, negative."""
    pieces, _ = trained()
    kinds = [2, 3, 3] + [6] * len(BYTES) + [1] * (len(pieces) - len(SPECIAL) - len(BYTES))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0 if kind != 1 else -float(index) for index, kind in enumerate(kinds)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        **changes,
    }


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("ours")
    write_tokenizer(folder, entries())
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@cache
def theirs() -> LlamaTokenizerFast:
    pieces, merges = trained()
    return LlamaTokenizerFast({piece: index for index, piece in enumerate(pieces)}, merges, legacy=True)


@TEXTS
@given(text=ANY_TEXT)
@example(text="Three nodes, on this machine.")
def test_tokens_are_those_of_transformers(text: str, ours: Tokenizer) -> None:
    """Of texts that begin with no space: transformers 5 puts none before those, sentencepiece does."""
    text = text.lstrip(" ▁")
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs()(text, add_special_tokens=False).input_ids
    assert ours.encode(text).ids == [1, *ids]
    assert ours.decode(ids, skip_special_tokens=False) == theirs().decode(ids)


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_are_those_of_llama_cpp(prefix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = write_random_checkpoint(
        tmp_path / "llama", tiny_text_config("llama", num_hidden_layers=1, vocab_size=len(trained()[0]))
    )
    changes = entries(**{"tokenizer.ggml.add_space_prefix": prefix})
    file = write_gguf(checkpoint, tmp_path / "llama.gguf", "F16", **changes)
    made = Tokenizer.from_file(str(gguf_folder(file) / "tokenizer.json"))
    texts = ["Three nodes, on this machine.", " two  spaces ", "日本 é 🎉", "a\nb\tc", "▁", "x" * 50]
    with LlamaCpp(file) as peer:
        for text in texts:
            assert tuple(made.encode(text, add_special_tokens=False).ids) == peer.tokens(text), text


def test_the_end_of_a_turn_ends_answers_of_gemma(tmp_path: Path) -> None:
    """Files need not name it. Spaces are as they are in the text: Gemma puts none before it."""
    pieces, _ = trained()
    place = len(pieces)
    grown = entries(**{"tokenizer.ggml.add_space_prefix": False})
    grown["tokenizer.ggml.tokens"] = [*pieces, "<end_of_turn>", "\n\n"]
    grown["tokenizer.ggml.token_type"] += [3, 4]
    grown["tokenizer.ggml.scores"] += [0.0, 0.0]
    write_tokenizer(tmp_path, grown)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [2, place]}
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = made.encode(" a\n\n  b<end_of_turn>", add_special_tokens=False).ids
    assert ids[-1] == place
    assert place + 1 in ids
    assert made.decode(ids[:-1], skip_special_tokens=False) == " a\n\n  b"
    assert made.decode(made.encode("a b").ids) == "a b"


def test_without_scores_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no score for each piece"):
        write_tokenizer(tmp_path, entries(**{"tokenizer.ggml.scores": [0.0]}))
