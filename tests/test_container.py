"""The Containerfile, without an engine to build it: its stages, who runs, and that its commands exist here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer

from mdi.cli.app import app

REPOSITORY = Path(__file__).parents[1]
LINES = re.sub(r"\\\n\s*", "", (REPOSITORY / "Containerfile").read_text()).splitlines()
STEPS = [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in LINES if line and not line.startswith("#")]


def values(instruction: str) -> list[str]:
    return [value for name, value in STEPS if name == instruction]


def test_the_image_is_small_and_its_process_is_not_root() -> None:
    build, final = values("FROM")
    assert build.split()[0] == final
    assert final.endswith("-slim")
    [copied] = [value for value in values("COPY") if value.startswith("--from")]
    assert copied == "--from=build /opt/mdi /opt/mdi"  # no source, no compiler
    [user] = values("USER")
    assert user.isdecimal()
    assert int(user) > 0
    assert [name for name, _ in STEPS].index("USER") > [name for name, _ in STEPS].index("RUN")
    [install] = [value for value in values("RUN") if "pip install" in value]
    assert install.endswith("https://download.pytorch.org/whl/cpu /source")
    assert "--no-cache-dir" in install


def test_its_command_and_its_health_check_are_those_of_the_server() -> None:
    [entry], [command], [check] = values("ENTRYPOINT"), values("CMD"), values("HEALTHCHECK")
    assert json.loads(entry) == ["mdi"]
    name, *words = json.loads(command)
    serve = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    given = serve.make_context("serve", words).params
    assert (given["model"], given["host"], given["port"]) == ("bundled", "0.0.0.0", 8000)
    assert f"http://127.0.0.1:{given['port']}/health" in check
    compile(json.loads(check.split("CMD ", 1)[1])[2], "HEALTHCHECK", "exec")


def test_what_is_built_here_is_not_copied_into_the_image() -> None:
    ignored = (REPOSITORY / ".containerignore").read_text().split()
    assert {".git", ".venv", "checkpoints"} <= set(ignored)
