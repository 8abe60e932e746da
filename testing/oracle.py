"""What transformers makes of a checkpoint's folder, file by file: the model, its tokenizer, its image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION_MODELS = {
    "Qwen2VLForConditionalGeneration": Qwen2VLForConditionalGeneration,
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VLForConditionalGeneration,
    "Qwen3VLForConditionalGeneration": Qwen3VLForConditionalGeneration,
}


class Oracle:
    """A checkpoint as transformers loads it, in the dtype that it takes. Raises whatever transformers raises."""

    def __init__(self, path: Path) -> None:
        [architecture] = json.loads((path / "config.json").read_text())["architectures"]
        model_class = VISION_MODELS.get(architecture, AutoModelForCausalLM)
        self.model = model_class.from_pretrained(path, local_files_only=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self._path = path

    @property
    def end_ids(self) -> set[int] | None:
        """The tokens that end an answer, where generation_config.json names some."""
        ids = self.model.generation_config.eos_token_id
        return None if ids is None else set(ids) if isinstance(ids, list) else {ids}

    def features(self, picture: Image.Image) -> dict[str, Any]:
        """Rows of pixels, float32 [patches, elements], and their grid."""
        processor = Qwen2VLImageProcessorPil.from_pretrained(self._path, local_files_only=True)
        return dict(processor(images=picture, return_tensors="pt"))

    def inputs(self, question: str, picture: Image.Image | None = None) -> dict[str, Any]:
        """What the model reads: a message of a picture, if there is one, and a question."""
        content: Any = question if picture is None else [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if picture is None:
            return {"input_ids": self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids}
        features, config = self.features(picture), self.model.config
        n_tokens = int(features["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
        text = text.replace("<|image_pad|>", "<|image_pad|>" * n_tokens)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        return {"input_ids": ids, "mm_token_type_ids": kinds, **features}

    @torch.inference_mode()
    def answer(self, question: str, picture: Image.Image | None = None, n_tokens: int = 8) -> list[int]:
        """The greedy answer, its end token included."""
        inputs = self.inputs(question, picture)
        found = self.model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
        return cast(list[int], found[0, inputs["input_ids"].shape[1] :].tolist())
