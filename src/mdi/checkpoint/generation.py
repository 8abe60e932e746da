"""How a checkpoint generates by default: sampling settings and the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mdi.checkpoint.json_file import read_json
from mdi.checkpoint.source import Source
from mdi.core.errors import CheckpointError, InputError
from mdi.core.sampling import SamplingParams

GENERATION_CONFIG = "generation_config.json"


def generation_defaults(path: Path) -> SamplingParams:
    """The sampling defaults of the checkpoint in this folder, from generation_config.json.

    Greedy where the file does not ask for sampling; a repetition penalty holds for both, as in transformers.
    Raises CheckpointError for values out of range.
    """
    config = read_json(path / GENERATION_CONFIG, optional=True)
    try:
        return _sampling(config)
    except InputError as error:
        raise CheckpointError(f"{GENERATION_CONFIG}: {error}: download it again, or mend it") from None


def _sampling(config: dict[str, Any]) -> SamplingParams:
    penalty = config.get("repetition_penalty")
    if not config.get("do_sample", False):
        return SamplingParams(temperature=0.0, repetition_penalty=penalty)
    return SamplingParams(
        temperature=config.get("temperature", 1.0),
        top_k=config.get("top_k", 50),
        top_p=config.get("top_p", 1.0),
        min_p=config.get("min_p"),
        repetition_penalty=penalty,
    )


def end_ids(source: Source) -> frozenset[int]:
    """Tokens that end an answer, from generation_config.json or else config.json."""
    generation = read_json(source.path / GENERATION_CONFIG, optional=True)
    for config in (generation, source.config, source.config.get("text_config", {})):
        ids = config.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
