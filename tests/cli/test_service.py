"""`mdi service`: units that systemd understands, with the command as it was typed, and nothing written over."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from testing.units import read_unit

from mdi.cli import app as cli
from mdi.cli.systemd import quoted
from mdi.rpc.authority import create_authority, create_node

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze (Debian: systemd)")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a nodes-config for this machine alone, a file of keys, and a checkpoint by its looks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.delenv("ENABLE_ENCRYPTION", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    nodes = {"starter": place(5000), "secondary": [place(5001), place(5002)], "spare": [place(5003)]}
    (tmp_path / "nodes.json").write_text(json.dumps({"nodes": nodes}))
    (tmp_path / "keys").write_text("me: {key: 0123456789abcdef0123456789abcdef}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def place(port: int, addr: str = "127.0.0.1") -> dict[str, object]:
    return {"addr": addr, "communication": {"port": port}}


def service(words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command that runs in this process."""
    monkeypatch.setattr(sys, "argv", ["mdi", "service", *shlex.split(words)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize(
    ("words", "name", "command"),
    [
        (
            "serve model --nodes-config nodes.json --max-model-len 1k --api_keys keys --served-model-name a 'b c'",
            "mdi-server",
            "serve FOLDER/model --nodes-config FOLDER/nodes.json --ckpt-folder FOLDER/checkpoints "
            "--served-model-name a --served-model-name 'b c' --api-keys FOLDER/keys --sequence-length 1000",
        ),
        (
            "serve --ckpt model --config options.yaml --no-access-log --drain-timeout 5",
            "mdi-server",
            "serve --nodes-config FOLDER/nodes.json --ckpt-folder FOLDER/checkpoints --drain-timeout 5.0 "
            "--no-access-log --ckpt FOLDER/model --config FOLDER/options.yaml",
        ),
        ("secondary --nodes-config nodes.json 0", "mdi-secondary0", "secondary 0 --nodes-config FOLDER/nodes.json"),
        (
            "secondary --nodes-config nodes.json 1 --cache-folder cache --dtype bfloat16",
            "mdi-finisher",
            "secondary 1 --nodes-config FOLDER/nodes.json --cache-folder FOLDER/cache --dtype bfloat16",
        ),
        ("secondary --nodes-config nodes.json --spare 0", "mdi-spare0", None),
    ],
    ids=["serve", "options in a file", "a secondary", "the last node", "a spare"],
)
@pytest.mark.parametrize("kind", ["", "--user "], ids=["system", "user"])
def test_a_unit_runs_the_command_as_it_was_typed_with_absolute_paths(
    kind: str, words: str, name: str, command: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "options.yaml").write_text("nodes-config: nodes.json\nport: 8001\n")
    assert service(f"{kind}--to units {words}", monkeypatch) == 0
    file = folder / "units" / f"{name}.service"
    unit = read_unit(file)
    assert unit.command[:3] == [sys.executable, "-m", "mdi"]
    if command:
        assert unit.command[3:] == shlex.split(command.replace("FOLDER", str(folder)))
    assert unit.one("User") == ("" if kind else getpass.getuser())
    assert (unit.one("Restart"), unit.one("StartLimitIntervalSec"), unit.one("KillMode")) == ("always", "0", "mixed")
    if ANALYZE:
        check(file, "--user" if kind else "--system")


def check(file: Path, manager: str) -> None:
    """systemd finds nothing wrong with a unit, and the system's own are well confined."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(file.parent)}
    done = subprocess.run(["systemd-analyze", manager, "verify", file], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    limit = "--threshold=30" if manager == "--system" else "--threshold=70"
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", limit, file], capture_output=True, text=True
    )
    assert rated.returncode == 0, rated.stdout


@needs_systemd
@pytest.mark.parametrize(
    "word", ["a b", 'say "x"', "50 %", "%h", "$HOME ${HOME}", "a\\b", "a\nb", "ä", ";", "'", "", "-x"]
)
def test_systemd_reads_every_word_as_it_was(word: str, tmp_path: Path) -> None:
    file = tmp_path / "words.service"
    file.write_text(
        f"[Service]\nExecStart=/bin/echo {quoted(word, variables=True)}\nEnvironment={quoted('X=' + word)}\n"
    )
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_unit(file).command == ["/bin/echo", word]


def test_a_unit_is_not_written_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert service("--to . serve model", monkeypatch) == 0
    written = (file := folder / "mdi-server.service").read_text()
    assert service("--to . serve model", monkeypatch) == 0
    assert service("--to . serve model --port 9000", monkeypatch) == 2
    assert "is there already, and differs: --force replaces it" in capfd.readouterr().err
    assert file.read_text() == written
    assert service("--to . --force serve model --port 9000", monkeypatch) == 0
    assert "--port 9000" in file.read_text()
    assert service("--to . --name other serve model", monkeypatch) == 0
    assert sorted(path.name for path in folder.glob("*.service")) == ["mdi-server.service", "other.service"]
    assert service("--print serve model", monkeypatch) == 0
    assert capfd.readouterr().out.endswith(written)


def test_encryption_comes_along_and_a_low_port_is_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_authority(folder / "certs")
    create_node(folder / "certs", "starter")
    create_node(folder / "certs", "secondary1")
    monkeypatch.setenv("ENABLE_ENCRYPTION", "1")
    assert service("--to . serve model --nodes-config nodes.json --port 443", monkeypatch) == 0
    server = read_unit(folder / "mdi-server.service")
    assert server.environment["ENABLE_ENCRYPTION"] == "1"
    assert f"--certs {folder}/certs" in " ".join(server.command)
    assert server.one("AmbientCapabilities") == server.one("CapabilityBoundingSet") == "CAP_NET_BIND_SERVICE"
    assert service("--to . secondary 1 --nodes-config nodes.json", monkeypatch) == 0
    node = read_unit(folder / "mdi-finisher.service")
    assert (node.one("AmbientCapabilities"), node.one("CapabilityBoundingSet")) == ("", "")


def test_a_driver_of_ray_meets_the_cluster_of_its_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert service("--to . serve model --ray auto --replicas 2 --port 8000", monkeypatch) == 0
    unit = read_unit(file := folder / "mdi-server.service")
    assert unit.one("PrivateTmp") == "no"
    assert "-/tmp/ray" in unit.one("ReadWritePaths").split()
    assert unit.command[-2:] == ["--replicas", "2"]
    if ANALYZE:
        check(file, "--system")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "COMMAND"),
        ("ask model x", "a service runs `mdi serve ...` or `mdi secondary ...`, not 'ask'"),
        ("serve model --prot 80", "No such option"),
        ("serve model --port x", "integer"),
        ("serve", "name one checkpoint"),
        ("serve model --api-key s3cret", "write MDI_API_KEY=... into the service's environment file"),
        ("serve model --api-keys nowhere", "nowhere cannot be read"),
        ("serve model --nodes-config nowhere.json", "cannot be read"),
        ("serve model --nodes-config far.json", "set ENABLE_ENCRYPTION=1"),
        ("secondary 0 --nodes-config far.json", "sudo ENABLE_ENCRYPTION=1 mdi service"),
        ("secondary 7 --nodes-config nodes.json", "no node 7 after the starter"),
        ("secondary 0 --nodes-config nodes.json --cache-folder keys", "the cache folder 'keys' cannot be made"),
        ("--run-as no-such-user serve model", "there is no user 'no-such-user'"),
        ("--user --run-as root serve model", "leave --run-as out"),
        ("--name a/b serve model", "is no name of a unit"),
        ("--to keys serve model", "cannot be written"),
    ],
)
def test_what_would_not_start_is_refused_when_the_unit_is_written(
    words: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = {"nodes": {"starter": place(5000), "secondary": [place(5001, "192.0.2.1")]}}
    (folder / "far.json").write_text(json.dumps(nodes))
    to = "" if words.startswith("--to") else "--to . "
    assert service(to + words, monkeypatch) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert list(folder.glob("*.service")) == []
