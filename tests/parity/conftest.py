"""The oracle: small random models of transformers, saved as it saves them, and ours loaded from that."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mdi.core.tensors import Unquantized
from mdi.models.config import StageSpec
from mdi.models.registry import family_of, read_config
from mdi.models.stage import Stage
from mdi.models.weights import load_stage

IMAGE, VIDEO, VISION_START, VISION_END = 250, 251, 252, 253


def qwen2_vl_config(**text: Any) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config={
            "vocab_size": 256,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            **text,
        },
        vision_config={"depth": 3, "embed_dim": 80, "num_heads": 2, "hidden_size": 96, "initializer_range": 0.1},
        tie_word_embeddings=True,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


@pytest.fixture(scope="session")
def oracle() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(qwen2_vl_config()).eval()
    with torch.no_grad():  # random norms and biases, so that a forgotten one shows
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "ln_q" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="session")
def checkpoint(oracle: Qwen2VLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2-vl")
    oracle.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_oracle() -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).eval()


def load_stages(path: Path, *boundaries: int, dtype: torch.dtype = torch.float32, n_slots: int = 8) -> list[Stage]:
    """The checkpoint as stages cut at the given layers: none for one stage of everything."""
    config = read_config(json.loads((path / "config.json").read_text()))
    hub_name = family_of(config.architecture).hub_name
    weights = {hub_name(name): tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    cuts = [0, *boundaries, config.n_layers]
    stages = []
    for first, last in pairwise(cuts):
        spec = StageSpec(first, last, embedding=first == 0, vision=first == 0, head=last == config.n_layers)
        loaded = load_stage(config, spec, torch.device("cpu"), Unquantized(lambda name, *_: weights[name], dtype))
        stages.append(Stage(loaded, n_slots=n_slots, sequence_length=512))
    return stages
