"""A checkpoint's weights for other rotary frequencies: training goes on from what it knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

T, H, W = range(3)


def turns_otherwise(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two config.json in the hub's flat form give their rotary channels other frequencies or axes."""
    return _channels(old) != _channels(new)


def exchanged(weight: Tensor, old: Mapping[str, Any], new: Mapping[str, Any]) -> Tensor:
    """The weight or bias of a q_proj or k_proj ([heads * head_dim, ...]) with its rotary pairs in the order of `new`.

    Each pair of channels of `new` gets the weights of a pair that turned nearly as fast, on the same axis if there is
    one left. Scores stay as they were where the frequencies are equal.
    """
    order = torch.tensor(_order(old, new))
    n_pairs = len(order)
    heads = weight.view(-1, 2, n_pairs, *weight.shape[1:])
    return heads[:, :, order].reshape(weight.shape)


def _channels(config: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Axis and frequency of each rotary pair, in radians a position."""
    n_pairs = config["hidden_size"] // config["num_attention_heads"] // 2
    sections = config["rope_scaling"]["mrope_section"]
    axes = [axis for axis, length in zip((T, H, W), sections, strict=True) for _ in range(length)]
    return [(axis, config["rope_theta"] ** (-index / n_pairs)) for index, axis in enumerate(axes)]


def _order(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[int]:
    """For each pair of `new` the pair of `old` that it goes on from."""
    free = dict(enumerate(_channels(old)))
    order = []
    for axis, frequency in _channels(new):
        same = [index for index, (other, _) in free.items() if other == axis]
        chosen = min(same or free, key=lambda index: abs(math.log(free[index][1] / frequency)))
        del free[chosen]
        order.append(chosen)
    return order
