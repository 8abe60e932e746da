"""The same prompt through transformers and through this system, and the difference. Each side does all its own work.

transformers renders, tokenises, preprocesses and computes by itself; here the model runs as `n_nodes` stages in this
process, exactly as nodes would run them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdi.checkpoint.load import load_source
from mdi.checkpoint.plan import make_plan
from mdi.checkpoint.source import Source
from mdi.engine.engine import end_ids, patch_spec
from mdi.engine.prompt import Message, Prompt, PromptBuilder
from mdi.engine.tokenizer import Tokenizer
from mdi.media import MediaPolicy, decode_image, fetch
from mdi.model.batch import Batch, Draw, Slice, Visual
from mdi.pipeline.stage import Stage

CHUNK = 512
GREEDY = Draw(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
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
    source: Source, messages: Sequence[Message], *, dtype: str, n_nodes: int = 1, max_tokens: int = 16
) -> Report:
    """Runs both and compares. Memory: both models at once, in `dtype`."""
    with torch.inference_mode():
        their_ids, their_logits, theirs = _through_transformers(source, messages, dtype, max_tokens)
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


def _prompt(source: Source, messages: Sequence[Message], max_tokens: int) -> Prompt:
    config = source.model_config
    spec = patch_spec(source.path) if config.vision else None
    builder = PromptBuilder(config, Tokenizer(source.path), spec, ANY_FILE, config.max_positions - max_tokens)
    builder.check(messages)
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
    ends = end_ids(source.path, source.config)
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


def _through_transformers(
    source: Source, messages: Sequence[Message], dtype: str, max_tokens: int
) -> tuple[list[int], Tensor, tuple[int, ...]]:
    """Prompt ids, logits of the prompt (float32 [tokens, vocab_size]) and the greedy answer."""
    model, inputs = _their_model(source.path, dtype), _their_inputs(source, messages, dtype)
    logits = model(**inputs, use_cache=False).logits[0].float()
    output = model.generate(
        **inputs, max_new_tokens=max_tokens, do_sample=False, top_k=None, top_p=None, temperature=None
    )
    n_prompt = inputs["input_ids"].shape[1]
    return inputs["input_ids"][0].tolist(), logits, tuple(output[0, n_prompt:].tolist())


def _their_model(path: Path, dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(path)
    family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return family.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True).eval()


def _their_inputs(source: Source, messages: Sequence[Message], dtype: str) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    images = [decode_image(fetch(part["image"], ANY_FILE), ANY_FILE) for part in parts if part["type"] == "image"]
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    inputs: dict[str, Tensor] = {}
    if images:
        features = _their_processor(source.path)(images=images, return_tensors="pt")
        inputs["pixel_values"] = features["pixel_values"].to(getattr(torch, dtype))
        inputs["image_grid_thw"] = features["image_grid_thw"]
        for grid in features["image_grid_thw"]:
            text = text.replace("<|image_pad|>", "<|placeholder|>" * (int(grid.prod()) // 4), 1)
    ids = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"), return_tensors="pt", add_special_tokens=False)
    inputs["input_ids"] = ids["input_ids"]
    if images:
        inputs["mm_token_type_ids"] = (ids["input_ids"] == source.model_config.image_token_id).int()
    return inputs


def _their_processor(path: Path) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    spec = patch_spec(path)
    return Qwen2VLImageProcessorPil.from_pretrained(
        path, size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    )
