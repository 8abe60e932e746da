"""Whether a tokenizer and a model belong together: every token has a row in the embedding."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend

from mdi.core.errors import CheckpointError
from mdi.models.config import ModelConfig

MEDIA_TOKENS = {"<|image_pad|>": "image_token_id", "<|video_pad|>": "video_token_id"}


def check_vocabulary(backend: Backend, config: ModelConfig) -> None:
    """Raises CheckpointError, naming token and sizes, for a token that the model lacks or takes for another one."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise CheckpointError("the tokenizer has no tokens: download tokenizer.json again")
    text, token_id = max(vocabulary.items(), key=lambda entry: entry[1])
    if token_id >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has the token {text!r} with id {token_id}, but the model has {config.vocab_size} tokens "
            "(vocab_size in config.json): download tokenizer and weights again, from one place"
        )
    if config.vision is None:
        return
    for text, entry in MEDIA_TOKENS.items():
        found, expected = vocabulary.get(text), getattr(config, entry)
        if found is not None and found != expected:
            raise CheckpointError(
                f"config.json: {entry} is {expected}, but the tokenizer has {text} with id {found}: "
                "download both again, from one place"
            )
