"""The library of kernels as a thing that builds, loads, tests itself and chooses its instruction set."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mdi.core.errors import ConfigError
from mdi.kernels import build
from mdi.kernels.library import UnusableError, library, load

# A library of three instruction sets of which the fastest fails its self-test.
FALSE = """
const char *mdi_sources(void) {{ return "{sources}"; }}
const char *mdi_instruction_sets(void) {{ return "scalar avx2 avx512 amx"; }}
int mdi_cpu_runs(const char *isa) {{ return isa[1] != 'm'; }}
void mdi_set_threads(int threads) {{ (void)threads; }}
const char *mdi_avx2_self_test(void) {{ return 0; }}
const char *mdi_avx512_self_test(void) {{ return "products"; }}
"""


@pytest.fixture(autouse=True)
def _nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MDI_CPU", raising=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout's library, elsewhere."""
    path = tmp_path_factory.mktemp("library") / build.LIBRARY.name
    shutil.copy(build.LIBRARY, path)
    shutil.copy(build.checksum_file(build.LIBRARY), build.checksum_file(path))
    return path


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("failing"), build.digest(build.this_machine()))


def compiled(folder: Path, sources: str) -> Path:
    path, program = folder / build.LIBRARY.name, folder / "false.c"
    program.write_text(FALSE.format(sources=sources))
    build.run([*build.find_compiler(build.this_machine()), *build.LINKED, "-fPIC", "-o", str(path), str(program)])
    build.checksum_file(path).write_text(build.checksum(path))
    return path


def test_the_library_of_this_checkout_is_loaded() -> None:
    found = library()
    assert found is not None
    assert found.isa in build.this_machine().instruction_sets
    assert load(build.LIBRARY).isa == found.isa


def test_a_library_that_is_built_is_not_built_again() -> None:
    before = build.LIBRARY.stat()
    assert build.build() == build.LIBRARY
    assert build.LIBRARY.stat().st_ino == before.st_ino


def test_kernels_that_fail_their_self_test_are_not_used(failing: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(failing).isa == "avx2"
    assert [record.message for record in caplog.records] == [
        "kernels: products of avx512 fail their self-test here; a lower instruction set is used"
    ]


def test_mdi_cpu_names_the_instruction_set(copy: Path, failing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDI_CPU", "scalar")
    assert load(copy).isa == "scalar"
    assert load(failing).isa == "scalar"
    monkeypatch.setenv("MDI_CPU", "avx2")
    assert load(failing).isa == "avx2"


@pytest.mark.parametrize("wanted", ["amx", "avx1024"])
def test_an_impossible_instruction_set_is_an_error_that_lists_the_possible(
    failing: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setenv("MDI_CPU", wanted)
    with pytest.raises(ConfigError, match=f"MDI_CPU={wanted}: this machine and library have scalar, avx2, avx512$"):
        load(failing)


def test_an_instruction_set_that_fails_its_self_test_cannot_be_chosen(
    failing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDI_CPU", "avx512")
    with pytest.raises(ConfigError, match="its products fail the self-test"):
        load(failing)


def test_a_missing_library_is_unusable(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match="not built"):
        load(tmp_path / "libmdi_kernels.so")


@pytest.mark.parametrize("kept", [0, 100, 5000, -1])
def test_a_library_that_is_cut_is_unusable(copy: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / copy.name
    path.write_bytes(copy.read_bytes()[:kept])
    shutil.copy(build.checksum_file(copy), build.checksum_file(path))
    with pytest.raises(UnusableError, match="damaged"):
        load(path)


def test_a_library_of_another_kind_of_machine_is_unusable(copy: Path, tmp_path: Path) -> None:
    path = tmp_path / copy.name
    content = bytearray(copy.read_bytes())
    content[18] ^= 0xFF  # e_machine of ELF; the file type of Mach-O is not far
    path.write_bytes(content)
    build.checksum_file(path).write_text(build.checksum(path))
    with pytest.raises(UnusableError, match="cannot be loaded"):
        load(path)


def test_a_library_of_other_sources_is_unusable(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match="built of other sources"):
        load(compiled(tmp_path, "0" * 64))


def test_without_a_library_one_line_says_what_is_lost(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from mdi.kernels import build, library\n"
        f"build.LIBRARY = Path({str(tmp_path)!r}, 'libmdi_kernels.so')\n"
        "assert library.library() is None and library.library() is None"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stderr.splitlines() == [
        "kernels: libmdi_kernels.so is not built; torch computes instead, more slowly: "
        "run `python -m mdi.kernels.build`"
    ]


def test_without_a_compiler_the_error_names_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "system_compiler", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(build.BuildError, match="install gcc or clang, or `pip install ziglang`, or set CC"):
        build.build(tmp_path / "libmdi_kernels.so")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="exit 3"):
        build.build(tmp_path / "libmdi_kernels.so", compiler=["sh", "-c", "exit 3"])
