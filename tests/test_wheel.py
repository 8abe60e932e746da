"""The wheel: it is one of this platform, has the library of kernels inside, and computes with it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
COMPUTES = """
import torch, mdi
from mdi.kernels.library import library
from mdi.kernels.packed import PackedWeight, product
print(mdi.__file__, library().path)
weight, x = torch.randn(33, 64), torch.randn(3, 64)
torch.testing.assert_close(product(PackedWeight.pack(weight), x), x @ weight.T)
"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, **environment})
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(380)
def test_a_wheel_of_this_platform_computes_with_kernels(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), ".", MDI_WHEEL="")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stem.split("-")[2:] == ["py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")]
    installed = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel))
    package, library = run(sys.executable, "-c", COMPUTES, PYTHONPATH=str(installed)).split()
    assert Path(package).is_relative_to(installed)
    assert Path(library).is_relative_to(installed)
