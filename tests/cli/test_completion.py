"""Shell completion: what is completed, how quickly, and in a real bash and zsh."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from testing.processes import ENVIRONMENT
from testing.terminal import terminal

from mdi.cli.completion import MOST_FOLDERS

PROGRAMS = Path(sys.executable).parent
PATH = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
BELL, EMPTY_LINE = "\x07", "\x15"  # the second is Ctrl-U
Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(tmp_path: Path) -> Complete:
    """What the shell is told for the last word of a line."""
    for name in ("models/owner/small", "models/other/deep/er", "mine", "has blank", ".hidden", "checkpoints/owner/big"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "models" / "readme").touch()

    def complete(line: str) -> list[str]:
        environment = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_MDI_COMPLETE": "complete_bash"}
        words = [str(PROGRAMS / "mdi")]
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT | environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    return complete


def test_commands_and_options_are_completed_also_after_those_that_are_rewritten(complete: Complete) -> None:
    assert complete("mdi ser") == ["serve", "service"]
    assert complete("mdi cache r") == ["rm"]
    assert complete("mdi serve bundled --n-no") == ["--n-nodes"]
    assert complete("mdi serve bundled --served_model_name a b --n-no") == ["--n-nodes"]
    assert complete("mdi serve --config nowhere.yaml --max-model") == ["--max-model-len"]
    assert complete("mdi serve bundled -tp two --n-no") == ["--n-nodes"]


def test_values_are_completed_where_there_are_only_some(complete: Complete) -> None:
    assert complete("mdi serve bundled --dtype b") == ["bfloat16"]
    assert complete("mdi ask bundled hello -q ") == ["int8", "int8-32", "int4", "none"]
    assert complete("mdi serve bundled --ssl-certfile ") == []  # the shell's own: files


def test_checkpoints_are_completed_by_name_and_by_folder(complete: Complete) -> None:
    assert complete("mdi serve b") == ["bundled"]
    assert "random:qwen2-vl-2b" in complete("mdi plan ran")
    assert complete("mdi serve own") == ["owner/big"]
    assert complete("mdi serve --ckpt-folder models own") == ["owner/small"]
    assert complete("mdi serve --ckpt mi") == ["mine"]
    assert complete("mdi serve ./mi") == ["./mine"]
    assert complete("mdi serve models/ow") == ["models/owner/small"]
    assert complete("mdi serve models/other/") == ["models/other/deep/er"]
    assert complete("mdi serve .h") == [".hidden"]
    assert complete("mdi serve ha") == []
    assert complete("mdi serve nowhere/x") == []
    named = [name for name in complete("mdi serve ") if not name.startswith("random:")]
    assert named == ["bundled", "mine", "owner/big"]


def test_it_answers_at_once_without_torch_and_beside_many_folders(complete: Complete, tmp_path: Path) -> None:
    for number in range(2 * MOST_FOLDERS):
        (tmp_path / f"folder{number}").mkdir()
    complete("mdi serve ")  # compiles modules
    began = time.monotonic()
    complete("mdi serve ")
    assert time.monotonic() - began < 5  # ten times what it takes: other tests run beside this one
    words = [sys.executable, "-X", "importtime", str(PROGRAMS / "mdi")]
    environment = ENVIRONMENT | {"COMP_WORDS": "mdi serve ", "COMP_CWORD": "2", "_MDI_COMPLETE": "complete_bash"}
    imported = subprocess.run(words, env=environment, capture_output=True, text=True).stderr
    assert "mdi.cli.completion" in imported
    assert not re.search(r"\| +(torch|numpy|transformers|mdi\.engine)$", imported, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_it_is_installed_into_a_shell_and_completes_there(shell: str, tmp_path: Path) -> None:
    (tmp_path / f".{shell}rc").write_text("PS1='type: '\n")
    environment = {"HOME": str(tmp_path), "PATH": PATH, "SHELL": shell}
    with terminal([shell, "-i"], tmp_path, **environment) as shown:
        shown.type("mdi --install-completion; exit\r")
        shown.read_until(f"{shell} completion installed in")
        assert shown.process.wait(20) == 0
    (tmp_path / "cert.pem").touch()
    with terminal([shell, "-i"], tmp_path, **environment) as shown:
        shown.read_until("type: ")
        for line, completed in (
            ("mdi \t", BELL),  # in zsh, the first one of a shell only loads the completion
            ("mdi chat bun\t", "mdi chat bundled"),
            ("mdi chat bundled --n-no\t", "--n-nodes"),
            ("mdi ser\t\t\t", "service"),
            ("mdi serve bundled --dtype bf\t", "bfloat16"),
            ("mdi serve bundled --ssl-certfile ce\t", "cert.pem"),
        ):
            shown.type(f"{EMPTY_LINE}{line}")
            shown.read_until(completed)
