"""Exit codes, error texts, and what the command line imports before a command runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mdi.cli import app as cli
from mdi.core.errors import InputError, LinkError, MDIError

IMPORTED = """
import sys
from mdi.cli.app import main
try:
    main()
finally:
    print(*sys.modules, sep="\\n", file=sys.stderr)
"""
SLOW = {"torch", "transformers", "mdi.engine"}


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["certs", "init"]], ids=" ".join)
def test_help_and_certificates_do_not_import_torch(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    imported = set(done.stderr.split())
    assert "mdi.cli.serve" in imported
    assert not imported & SLOW


def test_an_error_shows_names_as_they_were_typed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the bundled model is copied to a folder here
    monkeypatch.setattr(sys, "argv", ["mdi", "ask", "bundled", "x", "--image", "no [/x] :cat:.png"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "'no [/x] :cat:.png'" in capfd.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(InputError("x", "prompt"), 2), (LinkError("x", "finisher"), 1)])
def test_only_what_the_caller_can_mend_ends_with_2(error: MDIError, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
