"""int4 weights that are calibrated with a text: what a model's layers read in it decides how they are rounded.

The text runs once through the products, one after the other: each is calibrated with the inputs that it gets from the
weights before it, as they are rounded by then. An expert's are those of the tokens that chose it: where these are few,
its weights are rounded to the nearest. Memory is needed for one product in float32, the activations of the whole text
(of an expert's rows, several times), and one matrix of inputs x inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mdi.checkpoint.source import Source
from mdi.checkpoint.tokenizer_files import TOKENIZER, check_tokenizer_files
from mdi.checkpoint.weights import RoundedWeights, Rounding, UnfitError, not_finite
from mdi.core.batch import Batch, Slice
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.quantization import UNQUANTIZED, ModelQuantization, Quantization, QuantizedTensor
from mdi.layers.gptq import Compensation, quantize_with
from mdi.layers.linear import Linear
from mdi.layers.mlp import MLP
from mdi.layers.quantize import NotFiniteError, ScaleError
from mdi.layers.rope import text_positions
from mdi.models.config import StageSpec
from mdi.models.decoder import EMBEDDING, FINAL_NORM, LAYERS, LM_HEAD, norm_of, stem
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage, format_of, load_stage, stage_specs

DEFAULT = Path(__file__).parents[1] / "assets" / "calibration.txt"
SEQUENCE = 512  # tokens that are read together
MAX_SEQUENCES = 16
MIN_SEQUENCES = 4
MIN_ROWS = 64  # of an expert: with fewer its weights are rounded to the nearest
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class CalibrationText:
    """A text that weights are calibrated with. name: "default", or of its file."""

    name: str
    text: str

    @classmethod
    def default(cls) -> CalibrationText:
        """The one that ships: prose and chats in several languages, code, markup."""
        return cls("default", DEFAULT.read_text(encoding="utf-8"))

    @classmethod
    def read(cls, path: Path) -> CalibrationText:
        """A file's text. Raises ConfigError for one that cannot be read or is not UTF-8."""
        try:
            return cls(path.name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ConfigError(
                f"the calibration text {str(path)!r} is not UTF-8: convert it, or choose another"
            ) from None
        except OSError as error:
            cause = error.strerror or "it cannot be read"
            raise ConfigError(f"the calibration text {str(path)!r} cannot be read ({cause})") from None

    @property
    def sha256(self) -> str:
        """Hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def sequences(self, source: Source) -> Tensor:
        """The text as a checkpoint's tokens: up to MAX_SEQUENCES, spread evenly over it: int64 [sequences, SEQUENCE].

        Control tokens in the text are control tokens. Raises ConfigError where it is too short.
        """
        ids = torch.tensor(_token_ids(source.path, self.text))
        n_whole = len(ids) // SEQUENCE
        if n_whole < MIN_SEQUENCES:
            raise ConfigError(
                f"the calibration text {self.name!r} has {len(ids)} tokens, but at least {MIN_SEQUENCES * SEQUENCE} "
                "are needed: add text of the kind that the model will read"
            )
        n_taken = min(n_whole, MAX_SEQUENCES)
        return ids[: n_whole * SEQUENCE].view(n_whole, SEQUENCE)[torch.arange(n_taken) * n_whole // n_taken]


@dataclass
class CalibratedWeights:
    """A checkpoint's weights; those of the decoder that have a 4-bit format are calibrated with a text.

    They are asked for in the order of the layers, each one once. What has another format is rounded to the nearest.
    """

    source: Source
    text: CalibrationText
    quantization: ModelQuantization
    _made: dict[str, QuantizedTensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        return self._rounded.tensor(name)

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor:
        if quantization.bits != 4 or not (name == LM_HEAD or name.startswith(LAYERS)):
            return self._rounded.quantized(name, quantization)
        with torch.inference_mode():
            while name not in self._made:
                self._made |= next(self._parts)
        return self._made.pop(name)

    @property
    def rounding(self) -> Rounding:
        return self._rounded.rounding

    @cached_property
    def _rounded(self) -> RoundedWeights:
        return RoundedWeights(self.source)

    @cached_property
    def _parts(self) -> Iterator[dict[str, QuantizedTensor]]:
        return self._calibrated()

    def _calibrated(self) -> Iterator[dict[str, QuantizedTensor]]:
        """The matrices of every layer, then the LM head's."""
        config, ids = self.source.model_config, self.text.sequences(self.source)
        slices = tuple(Slice(slot, 0, SEQUENCE) for slot in range(len(ids)))
        batch = Batch(0, slices, text_positions(0, SEQUENCE).repeat(1, len(ids)))
        hidden = self.tensor(EMBEDDING)[ids.flatten()].float() * config.embedding_scale
        for index in range(config.n_layers):
            made: dict[str, QuantizedTensor] = {}
            stage = Stage(self._layer(index, made), n_slots=len(ids), sequence_length=SEQUENCE)
            hidden = stage.run(batch, hidden)
            del stage
            yield made | self._unread(index, made)
        norm = norm_of(config, _Float32(self, {}), stem(FINAL_NORM))
        yield self.calibrate([LM_HEAD], norm(hidden))

    def _layer(self, index: int, made: dict[str, QuantizedTensor]) -> LoadedStage:
        """A layer in float32 whose products are made by their first inputs, and then are in `made`."""
        spec, get = StageSpec(index, index + 1), _Float32(self, made)
        loaded = load_stage(self.source.model_config, spec, torch.device("cpu"), _WithoutMatrices(get))
        layer, prefix = loaded.decoder.layers[0], f"{LAYERS}{index}."
        layer.qkv = _Uncalibrated(get, [f"{prefix}{name}.weight" for name in QKV], layer.qkv)
        layer.out = _Uncalibrated(get, [f"{prefix}self_attn.o_proj.weight"], layer.out)
        if isinstance(layer.mlp, MLP):
            _uncalibrate(get, f"{prefix}mlp", layer.mlp)
            return loaded
        for expert, mlp in enumerate(layer.mlp.mlps):
            _uncalibrate(get, f"{prefix}mlp.experts.{expert}", mlp, MIN_ROWS)
        return loaded

    def _unread(self, index: int, made: Mapping[str, QuantizedTensor]) -> dict[str, QuantizedTensor]:
        """The matrices of experts that no token of the text chose, rounded to the nearest."""
        config = self.source.model_config
        specs = stage_specs(config, StageSpec(index, index + 1), config.dtype, self.quantization)
        formats = {name: spec.quantization for name, spec in specs.items() if name not in made}
        return {
            name: self._rounded.quantized(name, format_)
            for name, format_ in formats.items()
            if format_ and format_.bits == 4
        }

    def calibrate(self, names: Sequence[str], x: Tensor, min_rows: int = 1) -> dict[str, QuantizedTensor]:
        """Those of these weights that have a 4-bit format. x: their inputs, float32 [tokens, inputs].

        min_rows: where there are fewer, weights are rounded to the nearest.
        """
        formats = {name: format_of(name, x.shape[1], self.quantization) for name in names}
        wanted = {name: format_ for name, format_ in formats.items() if format_ and format_.bits == 4}
        if not torch.linalg.vector_norm(x).isfinite():
            raise CheckpointError(
                f"what {names[0]} reads in the calibration text is infinite or no number: a weight before it is "
                "damaged; download or convert the checkpoint again"
            )
        if not wanted:
            return {}
        if len(x) < min_rows:
            return {name: self._rounded.quantized(name, format_) for name, format_ in wanted.items()}
        compensation = Compensation.of(x, next(iter(wanted.values())))
        return {name: self._quantize(name, compensation) for name in wanted}

    def _quantize(self, name: str, compensation: Compensation) -> QuantizedTensor:
        weight = self.tensor(name)
        try:
            made = quantize_with(weight, compensation)
        except NotFiniteError as error:
            raise not_finite(name, error) from None
        except ScaleError as error:
            raise UnfitError(name, str(error)) from None
        if self.source.quantization != UNQUANTIZED:
            self.rounding.add(weight, made)
        return made


@dataclass(frozen=True)
class _Float32:
    """A `GetTensor` of weights in float32, and of those that are calibrated by now."""

    weights: CalibratedWeights
    made: dict[str, QuantizedTensor]
    dtype: torch.dtype = torch.float32

    def __call__(self, name: str, _shape: tuple[int, ...], _dtype: str | None = None, /) -> Tensor:
        return self.weights.tensor(name).float()

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
        return self.made[name] if name in self.made else self(name, shape)


@dataclass(frozen=True)
class _WithoutMatrices:
    """A `GetTensor` whose matrices have no contents (torch's device "meta")."""

    get: _Float32
    dtype: torch.dtype = torch.float32

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        return self.get(name, shape, dtype)

    def matrix(self, _name: str, shape: tuple[int, ...], /) -> Tensor:
        return torch.empty(shape, device="meta")


class _Uncalibrated(Linear):
    """A product without weights. Its inputs make them, all at once. names: of the weights, in order."""

    def __init__(self, get: _Float32, names: Sequence[str], product: Linear, min_rows: int = 1) -> None:
        """min_rows: see `CalibratedWeights.calibrate`."""
        super().__init__(product.weight, product.bias, product.activation)
        self.get = get
        self.names = names
        self.min_rows = min_rows

    def __call__(self, x: Tensor) -> Tensor:
        self.get.made.update(self.get.weights.calibrate(self.names, x, self.min_rows))
        outputs = {stem(name): self.get.weights.source.spec(name).shape[0] for name in self.names}
        made = Linear.load(self.get, outputs, x.shape[1], bias=self.bias is not None, activation=self.activation)
        return made(x)


def _uncalibrate(get: _Float32, name: str, mlp: MLP, min_rows: int = 1) -> None:
    """Takes the weights of an MLP that is called `name`, until its inputs make them."""
    gate_up = [f"{name}.{part}_proj.weight" for part in ("gate", "up")]
    mlp.gate_up = _Uncalibrated(get, gate_up, mlp.gate_up, min_rows)
    mlp.down = _Uncalibrated(get, [f"{name}.down_proj.weight"], mlp.down, min_rows)


def _token_ids(path: Path, text: str) -> list[int]:
    """By the tokenizer in a checkpoint's folder. Raises CheckpointError where its files make none."""
    check_tokenizer_files(path)
    try:
        return list(_tokenizer(path).encode(text, add_special_tokens=False).ids)
    except Exception as error:  # of any kind, of three libraries
        cause = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"calibration needs the checkpoint's tokenizer ({cause[0]}): download it again") from None


def _tokenizer(path: Path) -> Tokenizer:
    if (path / TOKENIZER).exists():
        return Tokenizer.from_file(str(path / TOKENIZER))
    from transformers import AutoTokenizer  # which takes seconds to import

    backend: Tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    return backend
