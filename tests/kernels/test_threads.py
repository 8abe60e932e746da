"""Threads belong to the pool or to torch, never to both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mdi.core.cores import default_threads
from mdi.kernels import threads
from mdi.kernels.threads import compute_threads, computes_with, set_threads, torch_threads


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    ours, theirs = compute_threads(), torch.get_num_threads()
    yield
    set_threads(ours, "cpu")
    torch.set_num_threads(theirs)


def test_with_kernels_the_pool_has_the_threads_and_torch_one() -> None:
    set_threads(3, "cpu")
    assert (compute_threads(), torch.get_num_threads()) == (3, 1)
    assert computes_with().endswith("kernels, 3 threads")
    set_threads(None, "cpu")
    assert (compute_threads(), torch.get_num_threads()) == (default_threads(), 1)


def test_without_kernels_and_on_other_devices_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads(1, "cpu")
    set_threads(3, "cuda")
    assert computes_with("cuda:0") == f"torch {torch.__version__} on cuda:0"
    assert (compute_threads(), torch.get_num_threads()) == (1, 3)
    monkeypatch.setattr(threads, "library", lambda: None)
    set_threads(2, "cpu")
    assert (compute_threads(), torch.get_num_threads()) == (2, 2)
    assert computes_with() == f"torch {torch.__version__}, 2 threads"


def test_torch_gets_the_cores_for_models_of_others() -> None:
    set_threads(1, "cpu")
    with torch_threads():
        assert torch.get_num_threads() == default_threads()
    assert torch.get_num_threads() == 1
