"""The library of kernels, built of this checkout's sources."""

from __future__ import annotations

import pytest

from mdi.kernels import build


@pytest.fixture(scope="session", autouse=True)
def _library_is_built() -> None:
    build.build()
