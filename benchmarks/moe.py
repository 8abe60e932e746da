"""Decoding with experts against decoding without, in one run: layers of the shape of Qwen3-30B-A3B.

    python -m benchmarks.moe [--layers 4] [--threads 2] [--streams 1 4 16] [--format int4]

The dense layers have the same attention, and an MLP as wide as the experts of one token together. A rate is the bytes
of weights that a step reads, over its median time; of experts those count that so many tokens choose at random. Steps
of both alternate, each with new hidden states, behind a context of 256 tokens. The last column is a part of the rate
at which this machine reads memory, in the same run.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from benchmarks.roofline import Roofline
from mdi.checkpoint.published import QWEN3_30B_A3B
from mdi.core.batch import Batch, Slice
from mdi.core.quantization import QUANTIZATIONS, ModelQuantization, QuantizedTensor
from mdi.kernels.library import library
from mdi.kernels.threads import set_threads
from mdi.layers.quantize import quantize
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.registry import read_config
from mdi.models.stage import Stage
from mdi.models.weights import load_stage
from mdi.planning.predict import stage_summary

STEPS = 40
CONTEXT = 256
BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class RandomWeights:
    """A `GetTensor` of random weights. format_name: of matrices; None leaves them as they are."""

    format_name: str | None
    dtype: torch.dtype = BFLOAT16

    def __call__(self, name: str, shape: tuple[int, ...], _dtype: str | None = None, /) -> Tensor:
        return torch.ones(shape, dtype=BFLOAT16) if "norm" in name else torch.randn(shape).to(BFLOAT16) / 45

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
        weight = self(name, shape)
        return quantize(weight, QUANTIZATIONS[self.format_name]) if self.format_name else weight


class Layers:
    """Layers of a config with random weights."""

    def __init__(self, config: ModelConfig, format_name: str | None, most_streams: int) -> None:
        self.config, self.formats = config, ModelQuantization(format_name, format_name)
        self.spec = StageSpec(0, config.n_layers)
        loaded = load_stage(config, self.spec, torch.device("cpu"), RandomWeights(format_name), self.formats)
        self._stage = Stage(loaded, n_slots=most_streams, sequence_length=CONTEXT + 64)

    def step_s(self, streams: int) -> float:
        """Seconds of a decode step of so many streams."""
        slices = tuple(Slice(slot, CONTEXT, 1) for slot in range(streams))
        batch = Batch(0, slices, torch.full((3, streams), CONTEXT))
        hidden = torch.randn(streams, self.config.hidden_size).to(BFLOAT16)
        before_s = time.perf_counter()
        self._stage.run(batch, hidden)
        return time.perf_counter() - before_s

    def step_bytes(self, streams: int) -> float:
        """Of the weights that such a step reads."""
        return stage_summary(self.config, self.spec, "bfloat16", quantization=self.formats, streams=streams).step_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--format", choices=["none", *QUANTIZATIONS], default="int4")
    options = parser.parse_args()
    loaded = library()
    assert loaded is not None, "build the library first: python -m mdi.kernels.build"
    set_threads(options.threads, "cpu")
    mixed = read_config(QWEN3_30B_A3B | {"num_hidden_layers": options.layers})
    assert mixed.experts
    dense = replace(mixed, experts=None, intermediate_size=mixed.experts.per_token * mixed.experts.inner_size)
    format_name = None if options.format == "none" else options.format
    both = {
        name: Layers(config, format_name, max(options.streams))
        for name, config in (("experts", mixed), ("dense", dense))
    }
    print(f"{loaded.isa}, {options.threads} threads, {options.layers} layers, {options.format}")
    print("layers   streams  experts read  ms a step  MB a step  GB/s  part of the read")
    read_rate = Roofline(options.threads).read_rate()
    for streams in options.streams:
        spent: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(STEPS):
            for name, layers in both.items():
                spent[name].append(layers.step_s(streams))
        for name, layers in both.items():
            step_s, step_bytes = median(spent[name]), layers.step_bytes(streams)
            experts = mixed.experts.distinct(streams) if layers.config.experts else 0
            print(
                f"{name:8} {streams:7} {experts:13.1f} {step_s * 1e3:10.2f} {step_bytes / 1e6:10.1f} "
                f"{step_bytes / step_s / 1e9:5.1f} {step_bytes / step_s / read_rate:10.2f}"
            )


if __name__ == "__main__":
    main()
