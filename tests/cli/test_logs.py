"""--log-format json: all of standard error is JSON, an object a line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from testing.processes import ENVIRONMENT, Process, mdi

PROGRAM = """
import logging, sys, threading, warnings
from mdi.cli.logs import LogFormat, set_up_logs
set_up_logs(LogFormat.JSON, access=True)
"""
WRITTEN = """
warnings.warn("old")
logging.getLogger("mdi.x").warning("two\\nlines of %s", "ü\u2028")
logging.getLogger("mdi.x").info("not shown")
logging.getLogger("mdi.access").info("%(status)d", {"status": 200, "error": None, "path": object})
sys.stderr.write("half ")
print("a line", "another", sep="\\n", file=sys.stderr)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise ValueError("the end")
"""


def written_by(program: str) -> list[dict[str, Any]]:
    """The objects on standard error of a program that logs JSON."""
    done = subprocess.run([sys.executable, "-c", PROGRAM + program], capture_output=True, text=True, env=ENVIRONMENT)
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_what_a_process_writes_is_an_object_a_line() -> None:
    warning, lines, access, half, another, thread, end = written_by(WRITTEN)
    assert (warning["logger"], warning["level"]) == ("py.warnings", "WARNING")
    assert "UserWarning: old" in warning["message"]
    assert lines | {"time": ""} == {
        "time": "",
        "level": "WARNING",
        "logger": "mdi.x",
        "message": "two\nlines of ü\u2028",
    }
    assert access["message"] == "200"
    assert (access["status"], access["error"], access["path"]) == (200, None, "<class 'object'>")
    assert [half["message"], another["message"]] == ["half a line", "another"]
    assert (thread["level"], thread["logger"]) == ("CRITICAL", "mdi")
    assert thread["exception"].endswith("ZeroDivisionError: division by zero")
    assert end["exception"].startswith("Traceback (most recent call last):\n")
    assert end["exception"].endswith("ValueError: the end")


def test_times_are_utc() -> None:
    [line] = written_by("print('x', file=sys.stderr)")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)


def test_where_standard_error_is_closed_the_program_goes_on() -> None:
    program = PROGRAM + "import os; os.close(2); print('x' * 99999, file=sys.stderr); print('done')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == "done\n"


def test_a_server_of_two_nodes_logs_json_from_its_start_to_its_end() -> None:
    options = ("--n-nodes", "2", "--port", "0", "--log-format", "json", "--uvicorn-log-level", "info")
    process = Process(["serve", "bundled", *options])
    try:
        assert process.popen.stdout
        [url] = re.findall(r"http://\S+", process.popen.stdout.readline())
        chat = {"model": "bundled", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        httpx.post(f"{url}/v1/chat/completions", json=chat, headers={"x-request-id": "mine"}, timeout=60)
        httpx.get(f"{url}/none")
        process.wait_for_line('"/none"')
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(60) == 0
    finally:
        process.kill()
    lines = [json.loads(line) for line in process.lines]
    assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
    assert [line["node"] for line in lines if "node" in line] == ["starter", "finisher"]
    assert any(line["logger"] == "uvicorn.error" for line in lines)
    asked, missing = [line for line in lines if line["logger"] == "mdi.access"]
    assert asked["message"].startswith('127.0.0.1 "POST /v1/chat/completions" 200 ')
    given = {name: asked[name] for name in ("client", "method", "path", "status", "key", "completion_tokens", "id")}
    assert given == {
        "client": "127.0.0.1", "method": "POST", "path": "/v1/chat/completions", "status": 200, "key": "-",
        "completion_tokens": 3, "id": "mine",
    }  # fmt: skip
    assert asked["prompt_tokens"] > 3
    assert 0 < asked["seconds"] < 60
    assert (missing["path"], missing["status"], missing["error"]) == ("/none", 404, None)


def test_a_node_that_cannot_start_says_why_as_json(tmp_path: Path) -> None:
    done = mdi("secondary", "--chunk", tmp_path / "model_finisher.safetensors", "--log-format", "json")
    assert done.returncode == 2
    listens, error = [json.loads(line) for line in done.stderr.splitlines()]
    assert "node finisher listens at 127.0.0.1:" in listens["message"]
    assert (error["level"], error["logger"]) == ("ERROR", "mdi")
    assert "there is no chunk" in error["message"]


def test_another_format_is_refused() -> None:
    done = mdi("secondary", "--log-format", "xml")
    assert done.returncode == 2
    assert "'xml' is not one of 'text', 'json'" in " ".join(done.stderr.split())
