"""Variants of the decoder that no family has yet, against the model of transformers that has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mdi.models.config import ModelConfig
from mdi.models.registry import FAMILIES, Family
from tests.parity.conftest import load_stages
from tests.parity.test_model import Prompt, logits_of, relative_difference

TEXT = list(range(1, 40))


def test_norms_of_queries_and_keys_need_a_flag_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
    )
    oracle = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs = oracle(torch.tensor([TEXT]), use_cache=False).logits[0]
    oracle.save_pretrained(tmp_path)
    family = Family(lambda config: ModelConfig.from_hf(config, qk_norm=True), "qwen3")
    monkeypatch.setitem(FAMILIES, "Qwen3ForCausalLM", family)
    for cuts in ((), (2,)):
        assert relative_difference(logits_of(load_stages(tmp_path, *cuts), Prompt(TEXT)), theirs) < 1e-4
