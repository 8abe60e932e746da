"""Normalisation layers. They return the dtype of their input; on CPUs kernels compute them in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from mdi.core.tensors import GetTensor
from mdi.kernels import norms as kernels


class RMSNorm:
    """Root mean square norm over the last dimension (arXiv:1910.07467)."""

    def __init__(
        self,
        get: GetTensor,
        name: str,
        size: int,
        eps: float,
        dtype: str | None = None,
        *,
        offset: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        """dtype: of the weight; None is the stage's own.

        offset, scale: the weight is (stored + offset) * scale, in float32, in which the norm is then computed.
        """
        stored = get(f"{name}.weight", (size,), dtype)
        changed = (offset, scale) != (0, 1) and not stored.is_meta  # of those torch would import its compiler
        self.exact = (stored.float() + offset) * scale if changed else stored.float()
        self.weight = self.exact if changed else stored
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[.., size] -> the same."""
        if kernels.compute(x):
            return kernels.rms_norm(x, self.exact, self.eps)
        return self._normed(x).to(x.dtype)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + y, rounded once where the norm is computed in float32. residual: like x."""
        if kernels.compute(x):
            return kernels.rms_norm(x, self.exact, self.eps, residual)
        return (residual + self._normed(x)).to(residual.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        """In the weight's dtype."""
        return torch.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class LayerNorm:
    """LayerNorm over the last dimension, with weight and bias (arXiv:1607.06450)."""

    def __init__(self, get: GetTensor, name: str, size: int, eps: float) -> None:
        self.weight = get(f"{name}.weight", (size,))
        self.bias = get(f"{name}.bias", (size,))
        self.exact = self.weight.float(), self.bias.float()
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        if kernels.compute(x):
            return kernels.layer_norm(x, *self.exact, self.eps)
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
