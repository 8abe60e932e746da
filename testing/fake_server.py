"""`python -m testing.fake_server SETTINGS`: the HTTP server as a process, in front of a scripted engine.

SETTINGS: those of `GatewayConfig` as JSON. Every answer is "so far", and then never ends.
"""

from __future__ import annotations

import json
import sys

from mdi.core.config import GatewayConfig
from mdi.gateway.server import bind, serve
from testing.fakes import HOLD, FakeEngine, piece

if __name__ == "__main__":
    engine = FakeEngine()
    engine.says(piece("so far"), HOLD)
    serve(engine, bind("127.0.0.1", 0), GatewayConfig(**json.loads(sys.argv[1])))
