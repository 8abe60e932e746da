"""Peers that a model is compared with: transformers, in this process, with its own preprocessing and `generate`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdi.bench.measure import Run
from mdi.bench.scenario import Scenario
from mdi.checkpoint.processing import media_specs
from mdi.checkpoint.safetensors import SafetensorsSource, parts_on_hub
from mdi.checkpoint.source import Source
from mdi.core.quantization import UNQUANTIZED
from mdi.layers.rope import MediaSpan, prompt_positions
from mdi.media import MediaPolicy, Patches, PatchSpec, decode_image, fetch, open_video
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.registry import family_of
from mdi.prompt.assembly import media_span

MARKED_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
ANY_FILE = MediaPolicy(media_dir=None, any_file=True)


class Transformers:
    """A checkpoint in transformers, with its own tokenizer, image processor and model, loaded once.

    What transformers cannot load (a quantised one, say) is put into its model weight by weight, as it is read here.

    Videos are the exception: transformers cuts them only with torchvision, and release 5 gives them other positions
    than Qwen2-VL was trained with, and other marks than Qwen3-VL, so this class makes their rows, and positions or
    marks. Memory: the model in `dtype`.
    """

    def __init__(self, source: Source, dtype: str = "float32") -> None:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoTokenizer,
            GenerationConfig,
        )

        config = AutoConfig.from_pretrained(source.path)
        family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        self._dtype = getattr(torch, dtype)
        self._config = source.model_config
        if isinstance(source, SafetensorsSource) and source.quantization == UNQUANTIZED:
            self._model = family.from_pretrained(source.path, dtype=self._dtype, local_files_only=True).eval()
        else:
            vars(config).pop("quantization_config", None)
            self._model = family.from_config(config, dtype=self._dtype).eval()
            if (source.path / "generation_config.json").exists():
                self._model.generation_config = GenerationConfig.from_pretrained(source.path)
            self.replace((name, source.tensor(name)) for name in source.names())
        self._tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
        self._cut, self._video = media_specs(source)
        self._processor = _their_processor(source.path, self._cut) if self._cut else None

    def replace(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Puts other numbers in place of the checkpoint's. weights: with their names on the hub.

        A head that is given is no longer the embedding.
        """
        family = family_of(self._config.architecture)
        parameters = {
            on_hub: part.of(weight.data) if part else weight.data
            for name, weight in self._model.named_parameters()
            for on_hub, part in parts_on_hub(family.hub_name(name), tuple(weight.shape), self._config)
        }
        for name, weight in weights:
            if name == LM_HEAD and name not in parameters:
                self._model.lm_head.weight = torch.nn.Parameter(torch.empty_like(parameters[EMBEDDING]))
                parameters[name] = self._model.lm_head.weight.data
            parameters[name].copy_(weight.view_as(parameters[name]))

    @torch.inference_mode()
    def read(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], Tensor]:
        """Token ids of the prompt, and its logits: float32 [tokens, vocab_size]."""
        inputs = self._inputs(messages)
        return inputs["input_ids"][0].tolist(), self._model(**inputs, use_cache=False).logits[0].float()

    @torch.inference_mode()
    def answer(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> tuple[int, ...]:
        """Token ids of the greedy answer, the end token included."""
        inputs = self._inputs(messages)
        if "position_ids" in inputs:
            return self._without_cache(inputs, max_tokens)
        output = self._model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, top_k=None, top_p=None, temperature=None
        )
        return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())

    @torch.inference_mode()
    def run(self, scenario: Scenario, seed: int) -> Run:
        """From messages to tokens, as `measure` does it here; streams that start together are one batch."""
        prompts = scenario.prompts(seed)
        started_s = time.perf_counter()
        times_s: list[float] = []

        def record_time(_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            times_s.append(time.perf_counter() - started_s)
            return torch.zeros(scenario.streams, dtype=torch.bool)

        each = [self._inputs(messages) for messages in prompts]
        inputs = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        self._model.generate(
            **inputs,
            max_new_tokens=scenario.answer_tokens,
            min_new_tokens=scenario.answer_tokens,
            do_sample=False,
            top_k=None,
            top_p=None,
            temperature=None,
            stopping_criteria=[record_time],
        )
        return Run(scenario, inputs["input_ids"].shape[1], (tuple(times_s),) * scenario.streams)

    def text(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> str:
        """The greedy answer as text."""
        return str(self._tokenizer.decode(self.answer(messages, max_tokens), skip_special_tokens=True))

    def _without_cache(self, inputs: dict[str, Tensor], max_tokens: int) -> tuple[int, ...]:
        """A greedy answer at the given positions, which `generate` would replace. Every step reads the whole prompt."""
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        answer: list[int] = []
        while len(answer) < max_tokens and not (answer and answer[-1] in ends):
            token = self._model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
            answer.append(int(token))
            position = inputs["position_ids"].max() + 1
            inputs["input_ids"] = torch.cat((inputs["input_ids"], token), 1)
            inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(token)), 1)
            inputs["position_ids"] = torch.cat((inputs["position_ids"], position.expand(3, 1, 1)), 2)
        return tuple(answer)

    def _inputs(self, messages: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        media = [(part["type"], self._patches(part)) for part in parts if part["type"] != "text"]
        timed = self._config.vision is not None and self._config.vision.timestamps
        for kind, patches in media:
            if timed and kind == "video":
                text = text.replace(MARKED_VIDEO, _frames_by_time(patches), 1)
            text = text.replace(f"<|{kind}_pad|>", f"<|{kind}_here|>" * patches.n_tokens, 1)
        text = text.replace("_here|>", "_pad|>")
        inputs = {"input_ids": self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]}
        for kind, rows, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if found := [patches for name, patches in media if name == kind]:
                inputs[rows] = torch.cat([torch.from_numpy(patches.rows) for patches in found]).to(self._dtype)
                inputs[grids] = torch.tensor([patches.grid for patches in found])
        if media:
            image, video = (inputs["input_ids"].eq(token or -1).int() for token in self._pads)
            inputs["mm_token_type_ids"] = image + 2 * video
        if "video_grid_thw" in inputs and not timed:
            shown = [patches for _, patches in media]
            inputs["position_ids"] = self._positions(inputs["input_ids"][0].tolist(), shown)
        return inputs

    @property
    def _pads(self) -> tuple[int | None, int | None]:
        return self._config.image_token_id, self._config.video_token_id

    def _patches(self, part: dict[str, Any]) -> Patches:
        if part["type"] == "video":
            assert self._cut is not None
            return open_video(part["video"], ANY_FILE, self._video, self._cut).patches()
        assert self._processor is not None
        features = self._processor(images=decode_image(fetch(part["image"], ANY_FILE), ANY_FILE), return_tensors="pt")
        frames, rows, columns = features["image_grid_thw"][0].tolist()
        return Patches(features["pixel_values"].numpy(), (frames, rows, columns), digest=b"")

    def _positions(self, ids: list[int], media: Sequence[Patches]) -> Tensor:
        """int64 [3, 1, tokens], by the rule of transformers 4."""
        spans: list[MediaSpan] = []
        start = 0
        for patches in media:
            start = next(index for index in range(start, len(ids)) if ids[index] in self._pads)
            spans.append(media_span(start, patches, self._config))
            start += spans[-1].length
        return prompt_positions(len(ids), spans)[0][:, None]


def _frames_by_time(video: Patches) -> str:
    """What Qwen3VLProcessor of transformers 4.57 writes in place of a marked video."""
    pads = "<|video_here|>" * (video.n_tokens // video.grid[0])
    return "".join(f"<{time_s:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time_s in video.times_s)


def _their_processor(path: Path, spec: PatchSpec) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(
        path, size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    )
