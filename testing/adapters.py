"""Random LoRA adapters, written as PEFT's `save_pretrained` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_adapter(path: Path, shapes: Mapping[str, tuple[int, int]], *, rank: int = 4, **entries: Any) -> Path:
    """shapes: of the weights that it changes, [outputs, inputs], by their modules' names in transformers' model.

    entries: replace those of adapter_config.json. Ranks are those of its patterns for names that end in a key.
    """
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/base",
        "r": rank,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        **entries,
    }
    generator, tensors = torch.Generator().manual_seed(7), {}
    for name, (outputs, inputs) in shapes.items():
        ranks = [own for end, own in config["rank_pattern"].items() if name.endswith(end)] or [rank]
        for half, shape in (("lora_A", (ranks[0], inputs)), ("lora_B", (outputs, ranks[0]))):
            tensors[f"base_model.model.{name}.{half}.weight"] = torch.randn(shape, generator=generator) * 0.05
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path
