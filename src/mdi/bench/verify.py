"""The same prompt through transformers and through this system, and the difference. Each side does all its own work.

transformers renders, tokenises, preprocesses and computes by itself; here the model runs as `n_nodes` stages in this
process, exactly as nodes would run them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdi.checkpoint.generation import end_ids
from mdi.checkpoint.loader import load_source
from mdi.checkpoint.processing import patch_spec, video_spec
from mdi.checkpoint.source import Source
from mdi.core.batch import Batch, Slice, TokenSampling, Visual
from mdi.layers.rope import Grid, MediaSpan, prompt_positions
from mdi.media import MediaPolicy, decode_image, fetch, open_video
from mdi.models.stage import Stage
from mdi.planning.plan import make_plan
from mdi.prompt.builder import Prompt, PromptBuilder
from mdi.prompt.tokenizer import Tokenizer

CHUNK = 512
GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
ANY_FILE = MediaPolicy(media_dir=None, any_file=True)


@dataclass(frozen=True)
class Report:
    """What came out. differences: per prompt position, the largest absolute logit difference over the vocabulary.

    relative: the largest difference over the largest logit. cosine: of all logits. token ids: greedy answers.
    """

    same_prompt: bool
    differences: tuple[float, ...]
    relative: float
    cosine: float
    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    @property
    def first_difference(self) -> int | None:
        """Index of the first differing token; None where the answers are equal."""
        pairs = zip(self.ours, self.theirs, strict=False)
        unequal = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
        if unequal is None and len(self.ours) != len(self.theirs):
            return min(len(self.ours), len(self.theirs))
        return unequal


def verify(
    source: Source, messages: Sequence[dict[str, Any]], *, dtype: str, n_nodes: int = 1, max_tokens: int = 16
) -> Report:
    """Runs both and compares. Memory: both models at once, in `dtype`."""
    with torch.inference_mode():
        oracle = Oracle(source, dtype)
        (their_ids, their_logits), theirs = oracle.read(messages), oracle.answer(messages, max_tokens)
        prompt = _prompt(source, messages, max_tokens)
        our_logits, ours = _through_stages(source, prompt, dtype, n_nodes, max_tokens)
    same_prompt = list(prompt.token_ids) == their_ids
    if not same_prompt:
        return Report(False, (), float("inf"), 0.0, ours, theirs)
    difference = (our_logits - their_logits).abs()
    return Report(
        same_prompt=True,
        differences=tuple(difference.max(-1).values.tolist()),
        relative=float(difference.max() / their_logits.abs().max()),
        cosine=float(torch.cosine_similarity(our_logits.flatten(), their_logits.flatten(), dim=0)),
        ours=ours,
        theirs=theirs,
    )


def _prompt(source: Source, messages: Sequence[dict[str, Any]], max_tokens: int) -> Prompt:
    config = source.model_config
    spec = patch_spec(source.path) if config.vision else None
    room = config.max_positions - max_tokens
    builder = PromptBuilder(config, Tokenizer(source.path), spec, ANY_FILE, room, video_spec(source.path))
    return builder.build(messages)


def _through_stages(
    source: Source, prompt: Prompt, dtype: str, n_nodes: int, max_tokens: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Logits of the prompt, float32 [tokens, vocab_size], and the greedy answer."""
    length = len(prompt.token_ids)
    plan = make_plan(source.model_config, n_nodes)
    stages = [
        Stage(
            load_source(source, spec, dtype=dtype, device="cpu"),
            n_slots=1,
            sequence_length=length + max_tokens,
        )
        for spec in plan.stages
    ]
    hidden = stages[0].embed(torch.tensor(prompt.token_ids), _encode_media(stages[0], prompt))
    logits = []
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        batch = Batch(start, (Slice(0, start, end - start),), prompt.positions[:, start:end])
        logits.append(_last_logits(stages, batch, hidden[start:end]).float())
    answer = [int(logits[-1][-1].argmax())]
    ends = end_ids(source)
    while len(answer) < max_tokens and answer[-1] not in ends:
        index = length + len(answer) - 1
        positions = torch.full((3, 1), index + prompt.delta)
        hidden = stages[0].embed(torch.tensor(answer[-1:]))
        answer.append(int(_last_logits(stages, Batch(index, (Slice(0, index, 1),), positions), hidden)[-1].argmax()))
    return torch.cat(logits), tuple(answer)


def _last_logits(stages: Sequence[Stage], batch: Batch, hidden: Tensor) -> Tensor:
    for stage in stages[:-1]:
        hidden = stage.forward(batch, hidden)
    return stages[-1].logits(batch, hidden)


def _encode_media(stage: Stage, prompt: Prompt) -> list[Visual]:
    visuals = []
    for media in prompt.media:
        steps = stage.encode_steps(torch.from_numpy(media.patches.rows), media.patches.grid)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                visuals.append(Visual(media.span.start, done.value))
                break
    return visuals


class Oracle:
    """The same checkpoint in transformers: its tokenizer, image processor and model, loaded once.

    Videos are the exception: transformers cuts them only with torchvision, and since release 5 gives them other
    positions than Qwen2-VL was trained with, so their rows and positions are made here. Memory: the model in `dtype`.
    """

    def __init__(self, source: Source, dtype: str = "float32") -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

        config = AutoConfig.from_pretrained(source.path)
        family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        self._dtype = getattr(torch, dtype)
        self._model = family.from_pretrained(source.path, dtype=self._dtype, local_files_only=True).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
        self._path, self._config = source.path, source.model_config
        self._processor = _their_processor(source.path) if source.model_config.vision else None

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
    def generate(self, prompts: Sequence[Sequence[dict[str, Any]]], n_tokens: int, note: Callable[..., Tensor]) -> int:
        """Greedy answers of exactly so many tokens to prompts of one length, as one batch; that length.

        note: a stopping criterion, called after every step. Images only, and as many in every prompt.
        """
        each = [self._inputs(messages) for messages in prompts]
        inputs = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        self._model.generate(
            **inputs,
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            top_k=None,
            top_p=None,
            temperature=None,
            stopping_criteria=[note],
        )
        return inputs["input_ids"].shape[1]

    def text(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> str:
        """The greedy answer as text."""
        return str(self._tokenizer.decode(self.answer(messages, max_tokens), skip_special_tokens=True))

    def _without_cache(self, inputs: dict[str, Tensor], max_tokens: int) -> tuple[int, ...]:
        """`generate` makes its own positions; here every step reads the whole prompt again, at those handed over."""
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
        media = [(part["type"], *self._rows(part)) for part in parts if part["type"] != "text"]
        for kind, _, grid in media:
            text = text.replace(f"<|{kind}_pad|>", f"<|{kind}_here|>" * (math.prod(grid) // 4), 1)
        text = text.replace("_here|>", "_pad|>")
        inputs = {"input_ids": self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]}
        for kind, rows, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if found := [(values, grid) for name, values, grid in media if name == kind]:
                inputs[rows] = torch.cat([values for values, _ in found]).to(self._dtype)
                inputs[grids] = torch.tensor([grid for _, grid in found])
        if media:
            image, video = (inputs["input_ids"].eq(token or -1).int() for token in self._pads)
            inputs["mm_token_type_ids"] = image + 2 * video
        if "video_grid_thw" in inputs:
            inputs["position_ids"] = self._positions(inputs["input_ids"][0].tolist(), [grid for _, _, grid in media])
        return inputs

    @property
    def _pads(self) -> tuple[int | None, int | None]:
        return self._config.image_token_id, self._config.video_token_id

    def _rows(self, part: dict[str, Any]) -> tuple[Tensor, Grid]:
        if part["type"] == "video":
            video = open_video(part["video"], ANY_FILE, video_spec(self._path), patch_spec(self._path)).patches()
            return torch.from_numpy(video.rows), video.grid
        assert self._processor is not None
        features = self._processor(images=decode_image(fetch(part["image"], ANY_FILE), ANY_FILE), return_tensors="pt")
        frames, rows, columns = features["image_grid_thw"][0].tolist()
        return features["pixel_values"], (frames, rows, columns)

    def _positions(self, ids: list[int], grids: Sequence[Grid]) -> Tensor:
        """int64 [3, 1, tokens], by the rule of transformers 4."""
        spans: list[MediaSpan] = []
        start = 0
        for grid in grids:
            start = next(index for index in range(start, len(ids)) if ids[index] in self._pads)
            spans.append(MediaSpan(start, grid, merge_size=2))
            start += spans[-1].length
        return prompt_positions(len(ids), spans)[0][:, None]


def _their_processor(path: Path) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    spec = patch_spec(path)
    return Qwen2VLImageProcessorPil.from_pretrained(
        path, size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    )
