"""Muon, matrices of one shape at a time: a sixth of a training step goes to sixty small matrices one by one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
N_ITERATIONS = 5


class BatchedMuon(Muon):
    """torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"` and Nesterov momentum; its state is the same."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for parameters in _by_shape(group["params"]):
                self._step(group, parameters)

    def _step(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.grad))
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(buffer, group["momentum"]))
        share = 0.2 * max(parameters[0].shape) ** 0.5
        for parameter, update in zip(parameters, orthogonal(torch.stack(updates)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * share)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where this device computes in it, else float32: without, it takes ten times as long."""
    computes = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if computes else torch.float32


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal matrix nearest to each; [n, rows, columns], in `fast_dtype`.

    Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(fast_dtype(matrices.device))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(N_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _by_shape(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.shape].append(parameter)
    return list(groups.values())
