"""The files that a checkpoint's tokenizer is made of, its chat template in Jinja apart."""

from __future__ import annotations

from pathlib import Path

from mdi.checkpoint.json_file import read_file, read_json

TOKENIZER = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"  # what older checkpoints have in its place
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def check_tokenizer_files(path: Path) -> None:
    """Raises CheckpointError, with the remedy, for a file that is missing or cannot be read.

    Libraries that load tokenizers name neither, and make an empty tokenizer where the files are missing.
    """
    in_parts = all((path / name).exists() for name in (VOCABULARY, MERGES))
    read_json(path / TOKENIZER, optional=in_parts)
    for name in (VOCABULARY, *OTHERS):
        read_json(path / name, optional=True)
    read_file(path / MERGES, optional=True)
