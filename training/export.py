"""A trained student as a folder in Hugging Face layout: what is bundled with the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from mdi.media.patches import CLIP_MEAN, CLIP_STD
from training.chat_template import CHAT_TEMPLATE
from training.layout import MERGE, PATCH, TEMPORAL
from training.model import Student, hub_config
from training.rotary import exchanged, turns_otherwise
from training.samples import MAX_PIXELS, MIN_PIXELS


def export(student: Student, tokenizer: Path, folder: Path) -> None:
    """Writes weights in bfloat16 under the hub's names, configs, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _hub_name(name): tensor.to(torch.bfloat16).contiguous()
        for name, tensor in student.hf.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = hub_config()
    Tokenizer.from_file(str(tokenizer)).save(str(folder / "tokenizer.json"))
    cut = {
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    _write(folder / "config.json", config)
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "pad_token_id": config["bos_token_id"],
            "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
            "do_sample": False,
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            **cut,
        },
    )
    _write(
        folder / "video_preprocessor_config.json",
        {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
            **cut,
        },
    )
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )


def load(student: Student, folder: Path, tokenizer: Tokenizer) -> None:
    """Gives a student the weights that `export` wrote; the heads that are thrown away stay as they are.

    tokenizer: the student's. A token that the checkpoint does not know begins as the mean of those it knows it by.
    A checkpoint with other rotary frequencies gives its channels to those that turn nearly as fast.
    """
    tensors = load_file(folder / "model.safetensors")
    before, config = json.loads((folder / "config.json").read_text()), hub_config()
    if turns_otherwise(before, config):
        for name, tensor in tensors.items():
            if re.search(r"^model\.layers\..*\.[qk]_proj\.", name):
                tensors[name] = exchanged(tensor, before, config)
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        for name, tensor in student.hf.state_dict().items():
            if name != "lm_head.weight":  # tied to the embeddings
                stored = tensors[_hub_name(name)]
                tensor[: len(stored)] = stored
        embeddings = student.hf.get_input_embeddings().weight
        for text, index in tokenizer.get_vocab().items():
            if known.id_to_token(index) != text:
                spelled = tokenizer.decode([index], skip_special_tokens=False)
                embeddings[index] = embeddings[known.encode(spelled, add_special_tokens=False).ids].mean(0)


def _hub_name(name: str) -> str:
    """From where transformers keeps a parameter to where the hub's files have it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
