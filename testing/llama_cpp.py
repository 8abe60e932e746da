"""llama.cpp on a GGUF file, through the `xllamacpp` package where that is installed: what others make of a file."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self


class LlamaCpp:
    """A llama.cpp server of one model on this machine's CPU. mmproj: the file with its vision tower."""

    def __init__(self, model: Path, mmproj: Path | None = None, context: int = 2048) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.warmup, params.use_jinja, params.no_extra_bufts = False, True, True  # as stored, not repacked
        if mmproj:
            params.mmproj.path, params.mmproj_use_gpu = str(mmproj), False
        self._server = xllamacpp.Server(params)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._server

    def answer(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> str:
        """Greedy. messages: as for `Engine.chat`, with images as paths."""
        body = {"messages": [_with_data(message) for message in messages], "temperature": 0, "max_tokens": max_tokens}
        return str(self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def continuation(self, token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Greedy tokens after these."""
        body = {"prompt": list(token_ids), "n_predict": max_tokens, "temperature": 0, "return_tokens": True}
        return tuple(self._post("/completion", body | {"ignore_eos": False})["tokens"])

    def tokens(self, text: str) -> tuple[int, ...]:
        """Of a text, without those that the tokenizer adds; control tokens in it are text."""
        return tuple(self._post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"])

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            made: dict[str, Any] = json.load(answer)
        return made


def _with_data(message: dict[str, Any]) -> dict[str, Any]:
    """Images as data URLs, in OpenAI's form."""
    if isinstance(message["content"], str):
        return message
    return message | {"content": [_part(part) for part in message["content"]]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    data = base64.b64encode(Path(part["image"]).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
