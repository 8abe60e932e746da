"""Messages to prompts: token ids, rotary positions and rows of patches. See `engine.preparation` for its threads."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mdi.core.errors import InputError, MediaError, PromptTooLongError
from mdi.core.messages import (
    Conversation,
    ImagePart,
    MediaPart,
    Message,
    PromptInput,
    RawText,
    TokenIds,
    VideoPart,
    parse_messages,
)
from mdi.core.template_settings import TemplateSettings
from mdi.core.tracing import Recorder
from mdi.media import MediaPolicy, Patches, PatchSpec, VideoSpec, Work, decode_image, fetch, image_patches, open_video
from mdi.models.config import ModelConfig
from mdi.prompt.assembly import Prompt, assemble
from mdi.prompt.tokenizer import Thoughts, Tokenizer

CheckedPrompt = str | RawText | TokenIds | Conversation
"""What a request asks, its messages typed and its token ids known to the model."""


@dataclass(frozen=True)
class Draft:
    """A prompt whose text is tokenised. media: what is still to be fetched and decoded, in order of appearance.

    field: the request's name for the prompt. thoughts: see `Prompt`.
    """

    token_ids: tuple[int, ...]
    media: tuple[MediaPart, ...]
    field: str
    thoughts: Thoughts | None = None


@dataclass(frozen=True)
class PixelRange:
    """A request's own limits on the area of images and of videos' frames, in pixels; None is the server's.

    Raises InputError below 1.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for field, pixels in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            if pixels is not None and pixels < 1:
                raise InputError(f"{field} must be at least 1, got {pixels}", field)

    def applied_to(self, part: MediaPart) -> MediaPart:
        """The part with these limits where it has none of its own."""
        return replace(
            part,
            min_pixels=self.min_pixels if part.min_pixels is None else part.min_pixels,
            max_pixels=self.max_pixels if part.max_pixels is None else part.max_pixels,
        )


COUNTED_TOKENS = 2**18  # longest prompt whose tokens are counted: about a second of tokenising


class PromptBuilder:
    """Turns messages into prompts that fit `sequence_length`. spec: None for a model that reads text only.

    recorder: notes how long media take. remedy: how the server takes longer prompts, if it can.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        spec: PatchSpec | None,
        policy: MediaPolicy,
        sequence_length: int,
        video: VideoSpec | None = None,
        recorder: Recorder | None = None,
        remedy: str = "raise the server's --sequence-length",
    ) -> None:
        self._config = config
        self._recorder = recorder or Recorder()
        self._tokenizer = tokenizer
        self._spec = spec
        self._video = video or VideoSpec()
        ids = (config.image_token_id, config.video_token_id)
        self._placeholders = {
            token: kind for token, kind in zip(ids, ("image", "video"), strict=True) if token is not None
        }
        self._policy = policy
        self._sequence_length = sequence_length
        self._or_remedy = f", or {remedy}" if remedy else ""
        self._counts = False

    def counting(self) -> PromptBuilder:
        """The same for prompts that nothing answers, which may be longer: of up to `COUNTED_TOKENS`."""
        counting = copy.copy(self)
        counting._sequence_length, counting._counts = max(self._sequence_length, COUNTED_TOKENS), True
        return counting

    def check(self, prompt: PromptInput) -> CheckedPrompt:
        """The prompt, its messages typed. Raises InputError for messages and token ids that this model cannot read.

        Nothing is fetched, decoded or tokenised here.
        """
        if isinstance(prompt, TokenIds):
            self._check_ids(prompt.ids)
            return prompt
        if isinstance(prompt, (str, RawText)):
            self._check_text(prompt if isinstance(prompt, str) else prompt.text, "prompt")
            return prompt
        given = prompt if isinstance(prompt, Conversation) else Conversation(prompt)
        messages = parse_messages(given.messages)
        self._check_text(_certain_text(messages), "messages")
        if not self._tokenizer.has_chat_template:
            raise InputError("this model has no chat template: send a plain prompt instead of messages", "messages")
        if self._spec is None and (parts := _media_parts(messages)):
            raise InputError(f"this model reads text only: send no {parts[0].kind}s", "messages")
        self._check_media(_media_parts(messages))
        return replace(given, messages=messages)

    def _check_text(self, text: str, field: str) -> None:
        """Raises PromptTooLongError for a text that cannot fit, before it is tokenised."""
        self._check_least(self._tokenizer.least_tokens(text, self._sequence_length), field)

    def _check_media(self, parts: Sequence[MediaPart]) -> None:
        """Raises InputError for more media, or frames of one video, than a request may have."""
        kinds = Counter(part.kind for part in parts)
        for name, most, given in (
            ("images and videos", self._policy.max_media, len(parts)),
            ("images", self._policy.max_images, kinds["image"]),
            ("videos", self._policy.max_videos, kinds["video"]),
        ):
            if most is not None and given > most:
                raise InputError(f"a request may have {most} {name}, and this one has {given}: send fewer", "messages")
        for part in parts:
            if isinstance(part.source, tuple):
                self._video.check_frames(len(part.source))

    def build(self, prompt: PromptInput, pixels: PixelRange = PixelRange()) -> Prompt:
        """Tokenises, fetches and decodes, in the caller's thread. Raises what `check`, `tokenise` and `complete` do."""
        return self.complete(self.tokenise(self.check(prompt), pixels), Work())

    def tokenise(self, prompt: CheckedPrompt, pixels: PixelRange = PixelRange()) -> Draft:
        """Renders and tokenises a checked prompt. A string is one user message where the model has a chat template.

        Raises InputError where the template drops media, and PromptTooLongError for a text that does not fit.
        """
        if isinstance(prompt, TokenIds):
            return Draft(prompt.ids, (), "prompt")
        if isinstance(prompt, RawText):
            token_ids = self._tokenizer.encode_raw(prompt.text, prompt.add_special_tokens)
            self._check_ids(token_ids)
            return Draft(tuple(token_ids), (), "prompt")
        if not isinstance(prompt, str):
            return self._tokenise_chat(prompt, pixels, "messages")
        if self._tokenizer.has_chat_template:
            return self._tokenise_chat(Conversation([Message("user", prompt)]), pixels, "prompt")
        token_ids = self._tokenizer.encode(prompt)
        self._check_length(len(token_ids), "prompt")
        return Draft(tuple(token_ids), (), "prompt")

    def _tokenise_chat(self, chat: Conversation, pixels: PixelRange, field: str) -> Draft:
        messages = parse_messages(chat.messages)
        token_ids = self._tokenizer.encode_chat(
            messages, _settings(chat), lambda text: self._check_text(text, field), chat.tools
        )
        self._check_length(len(token_ids), field)
        parts = _media_parts(messages)
        placed = [self._placeholders[token] for token in token_ids if token in self._placeholders]
        if placed != [part.kind for part in parts]:
            raise InputError("the model's chat template does not place these images and videos", "messages")
        placed_parts = tuple(pixels.applied_to(part) for part in parts)
        return Draft(tuple(token_ids), placed_parts, field, self._tokenizer.thoughts(token_ids))

    def complete(self, draft: Draft, work: Work) -> Prompt:
        """Fetches and decodes the media one after the other. `work` holds the memory of their rows.

        Raises MediaError for unusable media, PromptTooLongError for a prompt that does not fit (prompts are never cut)
        and AbandonedError when `work` is cancelled.
        """
        media: list[Patches] = []
        for part in draft.media:
            used = len(draft.token_ids) - len(media) + sum(patches.n_tokens for patches in media)
            media.append(self._load(part, self._sequence_length - used, work))
            work.keep(media[-1].rows.nbytes)
        prompt = replace(assemble(draft.token_ids, media, self._config, self._tokenizer), thoughts=draft.thoughts)
        self._check_length(len(prompt.token_ids), draft.field)
        return prompt

    def _load(self, part: MediaPart, room: int, work: Work) -> Patches:
        work.check()
        try:
            if isinstance(part, ImagePart):
                return self._load_image(part, room, work)
            return self._load_video(part, room, work)
        except MediaError as error:
            error.field = part.kind
            raise

    def _load_image(self, part: ImagePart, room: int, work: Work) -> Patches:
        assert self._spec is not None
        spec = self._spec.with_pixels(part.min_pixels, part.max_pixels)
        with self._recorder.span("fetch"):
            data = fetch(part.source, self._policy, work)
        with work.computing(), self._recorder.span("preprocess"):
            image = decode_image(data, self._policy, work)
            height, width = spec.resized(image.height, image.width)
            self._check_room("image", height * width // spec.factor**2, room, "lower max_pixels")
            return image_patches(image, spec)

    def _load_video(self, part: VideoPart, room: int, work: Work) -> Patches:
        assert self._spec is not None
        options = self._video.with_options(
            fps=part.fps,
            nframes=part.nframes,
            min_pixels=part.min_pixels,
            max_pixels=part.max_pixels,
            total_pixels=part.total_pixels,
        )
        with self._recorder.span("preprocess"):  # and fetch
            video = open_video(part.source, self._policy, options, self._spec, work)
            self._check_room("video", video.n_tokens, room, "lower max_pixels, total_pixels, fps or nframes")
            return video.patches()

    def _check_room(self, kind: str, n_tokens: int, room: int, remedy: str) -> None:
        """Raises PromptTooLongError, before any patch is made."""
        if n_tokens > room:
            raise PromptTooLongError(
                f"the {kind} takes {n_tokens} tokens, and {max(room, 0)} of the sequence length's "
                f"{self._sequence_length} are left: {remedy}{self._or_remedy}",
                "messages",
            )

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises InputError for ids that are no text of this model."""
        self._check_length(len(token_ids), "prompt")
        n_tokens = self._config.vocab_size
        for index, token in enumerate(token_ids):
            if not 0 <= token < n_tokens:
                raise InputError(
                    f"token {index} of the prompt is {token}, but the model's token ids are 0 to {n_tokens - 1}",
                    f"prompt[{index}]",
                )
            if kind := self._placeholders.get(token):
                raise InputError(
                    f"token {index} of the prompt is the placeholder of {kind}s: send {kind}s in messages, "
                    "to /v1/chat/completions",
                    "prompt",
                )

    def _check_length(self, n_tokens: int, field: str) -> None:
        if n_tokens == 0:
            raise InputError("the prompt is empty", "prompt")
        self._check_least(n_tokens, field, "")

    def _check_least(self, n_tokens: int, field: str, least: str = "at least ") -> None:
        if n_tokens < self._sequence_length:
            return
        if self._counts:
            raise PromptTooLongError(
                f"the prompt has {least}{n_tokens} tokens, and fewer than {self._sequence_length} are counted: "
                "send it in parts",
                field,
            )
        raise PromptTooLongError(
            f"the prompt has {least}{n_tokens} tokens and an answer needs room for one more, but the sequence "
            f"length is {self._sequence_length}: shorten the prompt{self._or_remedy}",
            field,
        )


def _settings(chat: Conversation) -> TemplateSettings:
    """The settings of a conversation, with how its prompt ends."""
    if chat.continue_final_message:
        return {**chat.settings, "add_generation_prompt": False, "continue_final_message": True}
    return {**chat.settings, "add_generation_prompt": chat.add_generation_prompt}


def _certain_text(messages: Sequence[Message]) -> str:
    """The text that every template writes: many trim texts, and some drop a part of earlier answers."""
    return "".join(text.strip() for message in messages if message.role != "assistant" for text in message.texts)


def _media_parts(messages: Sequence[Message]) -> list[MediaPart]:
    """The images and videos, in order of appearance."""
    return [part for message in messages for part in message.media]
