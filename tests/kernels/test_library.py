"""The library of kernels as a thing that builds, loads and chooses its instruction set."""

from __future__ import annotations

import pytest

from mdi.core.errors import ConfigError
from mdi.kernels import build
from mdi.kernels.library import chosen, library


def test_the_library_of_this_checkout_is_loaded() -> None:
    found = library()
    assert found is not None
    assert found.isa in build.this_machine().instruction_sets


def test_mdi_cpu_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(["scalar", "avx2"]) == "avx2"
    monkeypatch.setenv("MDI_CPU", "scalar")
    assert chosen(["scalar", "avx2"]) == "scalar"


def test_an_impossible_instruction_set_is_an_error_that_lists_the_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDI_CPU", "avx512")
    with pytest.raises(ConfigError, match="avx512: this machine and library have scalar, avx2"):
        chosen(["scalar", "avx2"])
