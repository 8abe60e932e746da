"""Full attention in bfloat16 on this CPU: our kernel against torch's fused one, at the vision tower's shape.

python -m benchmarks.attention
"""

from __future__ import annotations

from statistics import median

import torch
from torch.nn import functional

from benchmarks.figures import in_turns, timed
from mdi.layers.attention import attend_fully

HEADS, HEAD_DIM = 16, 80


def main() -> None:
    print(f"{'patches':>8} {'fused ms':>9} {'here ms':>9} {'ratio':>6} {'error fused':>12} {'error here':>11}")
    for patches in (64, 256, 1024, 2048, 5120):
        qkv = torch.randn(patches, 3, HEADS, HEAD_DIM).bfloat16()
        queries, keys, values = qkv.permute(1, 2, 0, 3)

        def fused(q: torch.Tensor = queries, k: torch.Tensor = keys, v: torch.Tensor = values) -> torch.Tensor:
            return functional.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)

        def ours(qkv: torch.Tensor = qkv) -> torch.Tensor:
            out = torch.empty(len(qkv), HEADS * HEAD_DIM, dtype=qkv.dtype)
            for _ in attend_fully(qkv, [len(qkv)], out):
                pass
            return out

        found = in_turns({"fused": timed(fused), "here": timed(ours)}, 5 if patches < 2000 else 2)
        theirs_s, ours_s = map(median, found.values())
        exact = fused(queries.float(), keys.float(), values.float())
        errors = [float((out().float() - exact).norm() / exact.norm()) for out in (fused, ours)]
        ratio = f"{theirs_s / ours_s:5.2f}x"
        print(f"{patches:8} {theirs_s * 1e3:9.2f} {ours_s * 1e3:9.2f} {ratio} {errors[0]:12.4f} {errors[1]:11.4f}")


if __name__ == "__main__":
    main()
