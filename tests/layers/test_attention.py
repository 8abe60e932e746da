from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mdi.layers import attention
from mdi.layers.attention import attend_fully


@pytest.mark.parametrize("tokens", [4, 100, 257])
@pytest.mark.parametrize("scores", [2**20, 2**12, 1])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_attention_in_blocks_is_attention(
    tokens: int, scores: int, dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores)
    queries, keys, values = torch.randn(3, 6, tokens, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys += 8  # a common part of all keys: it does not change the softmax, but would change the rounding
    exact = functional.scaled_dot_product_attention(queries.double(), keys.double(), values.double())
    out = torch.empty(tokens, 6, 16, dtype=dtype)
    for _ in attend_fully(queries, keys.clone(), values, out):
        pass
    assert (out.transpose(0, 1).double() - exact).norm() < error * exact.norm()
