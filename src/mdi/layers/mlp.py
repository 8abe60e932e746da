"""A decoder layer's MLP: SwiGLU or GeGLU (arXiv:2002.05202), or a mixture of experts that each are one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mdi.core.group import InputShards
from mdi.core.tensors import GetTensor, Unquantized
from mdi.kernels.experts import PackedExperts
from mdi.layers.linear import Linear, PackedLinear, add_partials


class Product(Protocol):
    """What a residual is added to: a product, or several in turn."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""

    def add_to(self, residual: Tensor, x: Tensor, shards: InputShards | None = None) -> Tensor:
        """residual + y, as `Linear.add_to`."""

    def partials(self, x: Tensor, shards: InputShards, out: Tensor) -> None:
        """As `Linear.partials`."""


class MLP:
    """down(activation(gate(x)) * up(x)). gate and up are one product: their weights are read in one pass."""

    def __init__(
        self, get: GetTensor, name: str, hidden_size: int, inner_size: int, activation: str = "swiglu"
    ) -> None:
        """activation: swiglu or geglu, as `Linear` has them.

        The tensors are `NAME.gate_proj.weight`, `NAME.up_proj.weight` and `NAME.down_proj.weight`.
        """
        gate_up = {f"{name}.gate_proj": inner_size, f"{name}.up_proj": inner_size}
        self.gate_up = Linear.load(get, gate_up, hidden_size, activation=activation)
        self.down = Linear.load(get, {f"{name}.down_proj": hidden_size}, inner_size)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, hidden_size] -> the same."""
        return self.down(self.gate_up(x))

    def add_to(self, residual: Tensor, x: Tensor, shards: InputShards | None = None) -> Tensor:
        """residual + y. shards: of the inner width, see `Linear.add_to`."""
        return self.down.add_to(residual, self.gate_up(x), shards)

    def partials(self, x: Tensor, shards: InputShards, out: Tensor) -> None:
        """As `Linear.partials`."""
        self.down.partials(self.gate_up(x), shards, out)


class Experts:
    """The sum of the MLPs that a router chooses for each row, each times its share.

    Shares are the softmax of the router's logits in float32, rounded to the dtype of x (transformers,
    `modeling_qwen3_moe.py`). Of equal ones the first expert is chosen. Outputs are added in float32, the largest share
    first. The router is not quantised.
    """

    def __init__(
        self,
        get: GetTensor,
        name: str,
        hidden_size: int,
        inner_size: int,
        *,
        count: int,
        per_token: int,
        normalised: bool,
        activation: str = "swiglu",
    ) -> None:
        """normalised: whether the shares of a row's experts add up to 1. activation: as of `MLP`.

        The tensors are `NAME.gate.weight` of the router and those of each MLP, which is called `NAME.experts.INDEX`.
        """
        self.per_token, self.normalised = per_token, normalised
        self.router = Linear.load(Unquantized(get, get.dtype), {f"{name}.gate": count}, hidden_size)
        sizes = hidden_size, inner_size
        self.mlps = [MLP(get, f"{name}.experts.{index}", *sizes, activation) for index in range(count)]
        self.packed = self._pack()

    def _pack(self) -> PackedExperts | None:
        """For the kernel of whole mixtures; None where not all weights are packed for kernels."""
        linears = [self.router, *(mlp.gate_up for mlp in self.mlps), *(mlp.down for mlp in self.mlps)]
        packed = [linear.packed for linear in linears if isinstance(linear, PackedLinear)]
        if len(packed) < len(linears):
            return None
        router, gate_up, down = packed[0], packed[1 : len(self.mlps) + 1], packed[len(self.mlps) + 1 :]
        return PackedExperts(router, gate_up, down, per_row=self.per_token, normalised=self.normalised)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, hidden_size] -> the same."""
        return self.packed(x) if self.packed else self._mixed(x).to(x.dtype)

    def add_to(self, residual: Tensor, x: Tensor, shards: InputShards | None = None) -> Tensor:
        """residual + y. shards: of each expert's inner width. The sum over a row's experts is rounded for each."""
        if self.packed:
            return self.packed(x, residual, shards)
        if shards is None:
            return self._mixed(x).add_(residual).to(residual.dtype)
        partials = x.new_empty(shards.count, *x.shape)
        self.partials(x, shards, partials)
        return add_partials(partials, residual)

    def partials(self, x: Tensor, shards: InputShards, out: Tensor) -> None:
        """The sums over a row's experts for each shard. out: contiguous [shards, rows, hidden_size]."""
        if self.packed:
            self.packed.partials(x, shards, out)
        else:
            out.copy_(self._mixed(x, shards))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's experts, and their shares: int64 [rows, per_token], float32 [rows, per_token]."""
        shares, chosen = torch.softmax(self.router(x), -1, dtype=torch.float32).sort(
            dim=-1, descending=True, stable=True
        )
        shares, chosen = shares[:, : self.per_token], chosen[:, : self.per_token]
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return chosen, shares.to(x.dtype).float()

    def _mixed(self, x: Tensor, shards: InputShards | None = None) -> Tensor:
        """float32 [rows, hidden_size], or [shards, rows, hidden_size]. Each expert computes the rows that chose it."""
        chosen, shares = self.choose(x)
        parts = x.new_empty(shards.count if shards else 1, *chosen.shape, x.shape[1])
        for index in sorted(set(chosen.flatten().tolist())):
            rows, places = torch.where(chosen == index)
            made, mlp = x.new_empty(len(parts), len(rows), x.shape[1]), self.mlps[index]
            if shards:
                mlp.partials(x[rows], shards, made)
            else:
                made[0] = mlp(x[rows])
            parts[:, rows, places] = made
        mixed = torch.zeros_like(parts[:, :, 0], dtype=torch.float32)
        for place in range(self.per_token):
            mixed.addcmul_(parts[:, :, place], shares[:, place, None])
        return mixed if shards else mixed[0]
