"""How a checkpoint generates by default: sampling settings and the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mdi.checkpoint.json_file import read_json
from mdi.checkpoint.source import Source
from mdi.core.entries import Entries, TokenIds, check_ids
from mdi.core.errors import CheckpointError, ConfigError, InputError
from mdi.core.sampling import SamplingParams
from mdi.models.entries import CONFIG

GENERATION_CONFIG = "generation_config.json"
CHECKPOINTS, NO_DEFAULTS = "auto", "vllm"  # in place of a folder

NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "stop_strings": None,
    "top_h": None,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "token_healing": False,
    "guidance_scale": 1,
    "watermarking_config": None,
    "dola_layers": None,
}
"""Settings of transformers' `generate` that change an answer and are not computed here, with the value that is off."""


class EndEntries(Entries):
    """The tokens that end an answer, as generation_config.json and config.json name them."""

    eos_token_id: TokenIds = None


class GenerationEntries(Entries):
    """The entries of generation_config.json that are used; None is transformers' default."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampling(self) -> SamplingParams:
        """Greedy where the file does not ask for sampling; a repetition penalty holds for both, as in transformers."""
        if not self.do_sample:
            return SamplingParams(temperature=0.0, repetition_penalty=self.repetition_penalty)
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=50 if self.top_k is None else self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


def generation_defaults(path: Path, where: str = CHECKPOINTS) -> SamplingParams:
    """The sampling defaults of the checkpoint in this folder, from generation_config.json.

    where: "auto", "vllm" for none (tokens are drawn at temperature 1), or a folder with another such file. Raises
    CheckpointError, naming the file and the entry, for wrong values and for what is not computed here.
    """
    if where == NO_DEFAULTS:
        return SamplingParams(temperature=1.0)
    if where != CHECKPOINTS:
        path = Path(where)
        if not (path / GENERATION_CONFIG).is_file():
            raise ConfigError(f"there is no {GENERATION_CONFIG} in {where!r}: name a folder that has one, or auto")
    config = read_json(path / GENERATION_CONFIG, optional=True)
    for key, neutral in NEUTRAL.items():
        if config.get(key) not in (None, neutral):
            raise CheckpointError(f"{GENERATION_CONFIG}: {key} is set, which is not supported: remove it")
    try:
        return GenerationEntries.read(config, GENERATION_CONFIG).sampling()
    except InputError as error:
        raise CheckpointError(f"{GENERATION_CONFIG}: {error}: download it again, or mend it") from None


def end_ids(source: Source) -> frozenset[int]:
    """Tokens that end an answer, from generation_config.json or else config.json.

    Raises CheckpointError, naming the file, for anything but tokens of the model.
    """
    parts = [
        (GENERATION_CONFIG, read_json(source.path / GENERATION_CONFIG, optional=True)),
        (CONFIG, source.config),
        (CONFIG, source.config.get("text_config") or {}),
    ]
    for file, part in parts:
        entries = EndEntries.read(part, file)
        if entries.eos_token_id is not None:
            check_ids(entries, source.model_config.vocab_size, file)
            return frozenset(entries.eos_token_id)
    return frozenset()
