"""Models of GPTQ and AWQ against transformers with the numbers that their weights stand for, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.quantized_files import Packer, write_quantized
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2VLForConditionalGeneration

from mdi.checkpoint.loader import load_chunk, load_source
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.models.stage import Stage
from tests.parity.conftest import qwen2_vl_config
from tests.parity.test_model import Prompt, greedy_tokens, logits_of, relative_difference

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.06,
    "bos_token_id": None,
    "eos_token_id": None,
}
TEXT = list(range(1, 80))
PROMPT = Prompt(TEXT)
WITH_IMAGE = Prompt(TEXT[:5], (1, 8, 12), TEXT[:9])
PACKERS = [
    Packer(),
    Packer(desc_act=True, symmetric=False, group=32),
    Packer(bits=8, desc_act=True),
    Packer("awq"),
]


def made(family: str) -> Any:
    torch.manual_seed(3)
    if family == "qwen2-vl":
        config = qwen2_vl_config(**{**SIZES, "num_hidden_layers": 4})
        config.vision_config.hidden_size = 128
        return Qwen2VLForConditionalGeneration(config)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)) if family == "qwen2" else LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.fixture(scope="module", params=["qwen2", "llama", "qwen2-vl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=PACKERS, ids=str)
def packed(request: pytest.FixtureRequest, family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A packed checkpoint, and transformers' model of the same numbers."""
    folder, model = tmp_path_factory.mktemp("packed"), made(family)
    model.save_pretrained(folder / "plain")
    exact = write_quantized(folder / "plain", folder / "packed", request.param)
    assert any(not torch.equal(exact[name], old) for name, old in load_file(folder / "plain/model.safetensors").items())
    save_exact(exact, folder / "plain")
    return folder / "packed", type(model).from_pretrained(folder / "plain", dtype=torch.float32).eval()


def save_exact(weights: dict[str, Tensor], path: Path) -> None:
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors", {"format": "pt"}
    )


def prompt_of(model: Any) -> Prompt:
    return WITH_IMAGE if isinstance(model, Qwen2VLForConditionalGeneration) else PROMPT


def theirs(model: Any) -> Tensor:
    prompt = prompt_of(model)
    inputs = prompt.oracle_inputs() if prompt is WITH_IMAGE else {"input_ids": torch.tensor([prompt.ids])}
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


def stages_of(path: Path, n_nodes: int, dtype: str) -> list[Stage]:
    """One node has no chunks, three have."""
    source = open_source(path)
    if n_nodes == 1:
        loaded = load_source(source, dtype=dtype, quantization=source.quantization)
        return [Stage(loaded, n_slots=8, sequence_length=512)]
    folder = prepare(source, n_nodes, dtype=dtype, quantization=source.quantization)
    chunks = Manifest.read(folder).chunks
    return [Stage(load_chunk(folder / chunk.file), n_slots=8, sequence_length=512) for chunk in chunks]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_of_one_node_and_of_three_are_those_of_the_dequantised_model(
    dtype: str, packed: tuple[Path, Any]
) -> None:
    path, model = packed
    alone, spread = (logits_of(stages_of(path, n_nodes, dtype), prompt_of(model)).float() for n_nodes in (1, 3))
    assert torch.equal(alone, spread)
    assert torch.cosine_similarity(alone.flatten(), theirs(model).flatten(), dim=0) > 0.999  # activations are int8


def test_without_kernels_they_are_within_1e_4(packed: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdi.layers.linear.library", lambda: None)
    path, model = packed
    for n_nodes in (1, 3):
        ours = logits_of(stages_of(path, n_nodes, "float32"), prompt_of(model))
        assert relative_difference(ours, theirs(model)) < 1e-4


def test_a_mixed_batch_has_the_tokens_of_each_prompt_alone(packed: tuple[Path, Any]) -> None:
    path, _ = packed
    prompts = [Prompt(TEXT), Prompt(TEXT[:7]), Prompt(TEXT[20:60])]
    together = greedy_tokens(stages_of(path, 1, "bfloat16"), prompts, 8)
    assert together == [greedy_tokens(stages_of(path, 3, "bfloat16"), [prompt], 8)[0] for prompt in prompts]
