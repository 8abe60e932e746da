"""Qwen3-VL with experts against transformers: logits and greedy tokens, experts in the layout of the hub's files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from mdi.checkpoint.loader import load_source
from mdi.checkpoint.source import open_source
from mdi.core.errors import CheckpointError
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.models.stage import Stage
from tests.parity.test_model import greedy_tokens, logits_of, relative_difference
from tests.parity.test_qwen3_vl import CUTS, N_LAYERS, PROMPTS, small_model

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [1]}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def oracle() -> Qwen3VLMoeForConditionalGeneration:
    dense = small_model().config
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(
        text_config=dense.text_config.to_dict() | EXPERTS | {"model_type": "qwen3_vl_moe_text"},
        vision_config=dense.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"},
        tie_word_embeddings=True,
        image_token_id=dense.image_token_id,
        video_token_id=dense.video_token_id,
        vision_start_token_id=dense.vision_start_token_id,
        vision_end_token_id=dense.vision_end_token_id,
    )
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or name.endswith(("mlp.gate.weight", "_proj")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def checkpoint(oracle: Qwen3VLMoeForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3-vl-moe")
    oracle.save_pretrained(path)
    return path


def stages_of(path: Path, *boundaries: int) -> list[Stage]:
    stages = []
    for first, last in pairwise([0, *boundaries, N_LAYERS]):
        spec = StageSpec(first, last, embedding=first == 0, vision=first == 0, head=last == N_LAYERS)
        loaded = load_source(open_source(path), spec, dtype="float32")
        stages.append(Stage(loaded, n_slots=8, sequence_length=512))
    return stages


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_transformers(
    name: str, cuts: tuple[int, ...], oracle: Qwen3VLMoeForConditionalGeneration, checkpoint: Path
) -> None:
    prompt = PROMPTS[name]
    with torch.no_grad():
        theirs = oracle(**prompt.oracle_inputs(), use_cache=False).logits[0]
    assert relative_difference(logits_of(stages_of(checkpoint, *cuts), prompt), theirs) < 1e-4


def test_greedy_tokens_are_those_of_transformers_in_a_mixed_batch(
    oracle: Qwen3VLMoeForConditionalGeneration, checkpoint: Path
) -> None:
    prompts = [PROMPTS[name] for name in ("text", "three images", "a video")]
    answers = []
    for prompt in prompts:
        with torch.no_grad():
            made = oracle.generate(**prompt.oracle_inputs(), max_new_tokens=8, do_sample=False)[0]
        answers.append(made[len(prompt.ids) :].tolist())
    for cuts in ((), (1, 2)):
        assert greedy_tokens(stages_of(checkpoint, *cuts), prompts, 8) == answers


def test_files_have_the_experts_of_a_layer_transposed_or_not(checkpoint: Path, tmp_path: Path) -> None:
    stored = load_file(checkpoint / WEIGHTS)
    fused = {name: weight for name, weight in stored.items() if name.endswith(("gate_up_proj", "down_proj"))}
    assert {tuple(weight.shape) for weight in fused.values()} == {(6, 128, 96), (6, 96, 64)}  # outputs before inputs
    turned = {name: weight.transpose(1, 2).contiguous() if name in fused else weight for name, weight in stored.items()}
    save_file(turned, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    ours, other = open_source(checkpoint), open_source(tmp_path)
    experts = [name for name in ours.names() if ".experts." in name]
    assert len(experts) == 3 * 6 * 3
    assert ours.names() == other.names()
    for name in experts:
        assert ours.spec(name) == other.spec(name)
        assert torch.equal(ours.tensor(name), other.tensor(name))
    theirs = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)  # reads both, too
    layer = theirs.model.language_model.layers[2].mlp.experts
    assert torch.equal(other.tensor("model.layers.2.mlp.experts.5.up_proj.weight"), layer.gate_up_proj[5, 64:])
    assert torch.equal(other.tensor("model.layers.2.mlp.experts.5.down_proj.weight"), layer.down_proj[5])


def test_the_experts_of_the_decoders_own_part_count(oracle: Qwen3VLMoeForConditionalGeneration) -> None:
    config = oracle.config.to_dict() | {"architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    experts = read_config(config).experts
    assert experts
    assert (experts.count, experts.per_token, experts.normalised, experts.layers) == (6, 2, True, (0, 2, 3))
    text = config["text_config"]
    with pytest.raises(CheckpointError, match=r"num_experts_per_tok is 7, but num_experts is 6"):
        read_config(config | {"text_config": text | {"num_experts_per_tok": 7}})
    with pytest.raises(CheckpointError, match=r"text_config.moe_intermediate_size"):
        read_config(config | {"text_config": text | {"moe_intermediate_size": 0}})
