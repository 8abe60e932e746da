"""JSON of answers: on one line for every reader."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.responses import JSONResponse

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
NEEDS_ESCAPE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def json_text(content: Any) -> str:
    """JSON without line ends of any kind: many clients split streams at Unicode's as well, as `str.splitlines` does.

    Halves of surrogate pairs, which have no UTF-8, are escaped, too.
    """
    text = ENCODER.encode(content)
    return text if text.isascii() else NEEDS_ESCAPE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class JsonAnswer(JSONResponse):
    """An answer in JSON: see `json_text`."""

    def render(self, content: Any) -> bytes:
        return json_text(content).encode()
