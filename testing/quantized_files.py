"""Checkpoints as AutoGPTQ and AutoAWQ write them, made of ordinary ones: weights are rounded to nearest, and packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs each four bits of a word hold


@dataclass(frozen=True)
class Packer:
    """What `quantization_config` says, and the tensors that go with it. group: -1 is all inputs."""

    method: str = "gptq"
    bits: int = 4
    group: int = 128
    symmetric: bool = True
    desc_act: bool = False
    second_format: bool = False

    def __str__(self) -> str:
        words = ["sym" if self.symmetric else "asym"] * (self.method == "gptq")
        words += ["act-order"] * self.desc_act + ["v2"] * self.second_format
        return " ".join([self.method, str(self.bits), f"group {self.group}", *words])

    @property
    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        shared = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            return shared | {"version": "gemm", "zero_point": True, "modules_to_not_convert": ["visual"]}
        kind = "gptq_v2" if self.second_format else "gptq"
        return shared | {"desc_act": self.desc_act, "sym": self.symmetric, "checkpoint_format": kind}

    def packed(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of a weight [outputs, inputs], by their last names, and what it is when it was packed."""
        inputs = weight.shape[1]
        groups = torch.arange(inputs) // (inputs if self.group == -1 else self.group)
        if self.desc_act:  # as if the Hessian's diagonal were these numbers
            importance = torch.rand(inputs, generator=torch.Generator().manual_seed(inputs))
            groups = groups[importance.argsort().argsort()]
        numbers, zeros, scales = self._rounded(weight.float(), groups)
        dequantised = (numbers - zeros[:, groups]).float() * scales.float()[:, groups]
        words = self._words_of_awq if self.method == "awq" else self._words
        minus = int(self.method == "gptq" and not self.second_format)
        made = {"scales": scales.t().contiguous(), "qzeros": words(zeros.t() - minus)}
        if self.method == "awq":
            return made | {"qweight": words(numbers.t())}, dequantised
        made["qweight"] = words(numbers).t().contiguous()  # along inputs
        return made | {"g_idx": groups.int()}, dequantised

    def _rounded(self, weight: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers int64 [outputs, inputs], zeros int64 and scales float16 [outputs, groups]."""
        most = 2**self.bits - 1
        made = weight.new_empty(2, len(weight), int(groups.max()) + 1)
        for group in range(made.shape[2]):
            part = weight[:, groups == group]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            if self.symmetric and self.method == "gptq":
                high = torch.maximum(high, -low)
                low = -high
            made[0, :, group] = (high - low) / most
            made[1, :, group] = -low
        scales = made[0].half()
        middle = torch.full_like(made[1], 2 ** (self.bits - 1))
        exact = (made[1] / scales.float()).round().clamp(1, most)  # zero 0 has no place in GPTQ's first format
        zeros = (middle if self.symmetric and self.method == "gptq" else exact).long()
        numbers = (weight / scales.float()[:, groups]).round().long() + zeros[:, groups]
        return numbers.clamp(0, most), zeros, scales

    def _words(self, numbers: Tensor) -> Tensor:
        """Of numbers that lie along the last dimension: int32 [rows, numbers / (32 / bits)]."""
        per_word = 32 // self.bits
        words = torch.zeros(len(numbers), numbers.shape[1] // per_word, dtype=torch.int64)
        for place in range(per_word):
            words |= numbers[:, place::per_word] << self.bits * place
        return words.to(torch.int32)  # the highest bit becomes the sign

    def _words_of_awq(self, numbers: Tensor) -> Tensor:
        eights = numbers.reshape(len(numbers), -1, 8)[..., AWQ_PLACES]
        return self._words(eights.flatten(1))


def in_decoder(name: str) -> bool:
    """Whether a weight is one that both methods quantise: those of the layers' products."""
    return ".layers." in name and name.endswith("_proj.weight")


def write_quantized(
    checkpoint: Path, path: Path, packer: Packer, chosen: Callable[[str], bool] = in_decoder
) -> dict[str, Tensor]:
    """Writes a checkpoint's packed copy. chosen: the weights that are packed.

    Returns all its weights as they are then, float32, by the names in the file.
    """
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": packer.config}))
    stored, exact = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(path / "model.safetensors").items():
        stored[name], exact[name] = weight, weight.float()
        if chosen(name):
            parts, exact[name] = packer.packed(stored.pop(name))
            stored |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    return exact
