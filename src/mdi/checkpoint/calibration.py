"""int4 weights that are calibrated with a text: what a model's layers read in it decides how they are rounded.

The text runs through the layers one after the other, each with the weights that the layers before it have by then.
Memory is needed for one layer in float32, its activations, and one matrix of inputs x inputs for each product.
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
from mdi.checkpoint.weights import RoundedWeights, UnfitError, not_finite
from mdi.core.batch import Batch, Slice
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.quantization import ModelQuantization, Quantization, QuantizedTensor
from mdi.core.reduce import Reduce, alone
from mdi.layers.gptq import Compensation, Hessian, quantize_with
from mdi.layers.linear import Linear
from mdi.layers.norm import RMSNorm
from mdi.layers.quantize import NotFiniteError, ScaleError
from mdi.layers.rope import text_positions
from mdi.models.config import StageSpec
from mdi.models.decoder import EMBEDDING, FINAL_NORM, LAYERS, LM_HEAD, stem
from mdi.models.stage import Stage
from mdi.models.weights import LoadedStage, format_of, load_stage

DEFAULT = Path(__file__).parents[1] / "assets" / "calibration.txt"
SEQUENCE = 512  # tokens that are read together
MAX_SEQUENCES = 16
MIN_SEQUENCES = 4
PRODUCTS = {  # a layer's products, and the weights that share each one's inputs
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


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

    def sequences(self, source: Source) -> list[Tensor]:
        """The text as a checkpoint's tokens: up to MAX_SEQUENCES of SEQUENCE, spread evenly over it.

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
        starts = [index * n_whole // n_taken * SEQUENCE for index in range(n_taken)]
        return [ids[start : start + SEQUENCE] for start in starts]


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
    def _rounded(self) -> RoundedWeights:
        return RoundedWeights(self.source)

    @cached_property
    def _parts(self) -> Iterator[dict[str, QuantizedTensor]]:
        return self._calibrated()

    def _calibrated(self) -> Iterator[dict[str, QuantizedTensor]]:
        """The matrices of every layer, then the LM head's."""
        embedding = self.tensor(EMBEDDING)
        hidden = [embedding[ids].float() for ids in self.text.sequences(self.source)]
        del embedding
        for layer in range(self.source.model_config.n_layers):
            made = self._calibrated_layer(layer, hidden)
            yield made
            hidden = _through(self._layer(layer, made), hidden)
        yield self._calibrated_head(hidden)

    def _calibrated_layer(self, index: int, hidden: Sequence[Tensor]) -> dict[str, QuantizedTensor]:
        loaded, hessians = self._layer(index, {}), {product: Hessian() for product in PRODUCTS}
        for product, hessian in hessians.items():
            layer = loaded.decoder.layers[0]
            setattr(layer, product, _Observed(getattr(layer, product), hessian))
        _through(loaded, hidden, reduce=_each_product)
        del loaded, layer
        made: dict[str, QuantizedTensor] = {}
        for product, names in PRODUCTS.items():
            made |= self._calibrate([f"{LAYERS}{index}.{name}.weight" for name in names], hessians.pop(product))
        return made

    def _calibrated_head(self, hidden: Sequence[Tensor]) -> dict[str, QuantizedTensor]:
        config, hessian = self.source.model_config, Hessian()
        norm = RMSNorm(_Float32(self, {}), stem(FINAL_NORM), config.hidden_size, config.rms_eps)
        for sequence in hidden:
            hessian.add(norm(sequence))
        return self._calibrate([LM_HEAD], hessian)

    def _calibrate(self, names: Sequence[str], hessian: Hessian) -> dict[str, QuantizedTensor]:
        """Those of these weights that have a 4-bit format. hessian: of their inputs."""
        formats = {name: format_of(name, hessian.inputs, self.quantization) for name in names}
        wanted = {name: format_ for name, format_ in formats.items() if format_ and format_.bits == 4}
        if not wanted:
            return {}
        mean = hessian.mean()
        if not mean.isfinite().all():
            raise CheckpointError(
                f"what {names[0]} reads in the calibration text is infinite or no number: a weight before it is "
                "damaged; download or convert the checkpoint again"
            )
        compensation = Compensation.of(mean, next(iter(wanted.values())))
        return {name: self._quantize(name, compensation) for name in wanted}

    def _quantize(self, name: str, compensation: Compensation) -> QuantizedTensor:
        try:
            return quantize_with(self.tensor(name), compensation)
        except NotFiniteError as error:
            raise not_finite(name, error) from None
        except ScaleError as error:
            raise UnfitError(name, str(error)) from None

    def _layer(self, index: int, made: Mapping[str, QuantizedTensor]) -> LoadedStage:
        """One layer in float32. made: its calibrated matrices; the others are as the checkpoint has them."""
        spec = StageSpec(index, index + 1)
        return load_stage(self.source.model_config, spec, torch.device("cpu"), _Float32(self, made))


@dataclass(frozen=True)
class _Float32:
    """A `GetTensor` of weights in float32, some of them calibrated."""

    weights: CalibratedWeights
    made: Mapping[str, QuantizedTensor]
    dtype: torch.dtype = torch.float32

    def __call__(self, name: str, _shape: tuple[int, ...], _dtype: str | None = None, /) -> Tensor:
        return self.weights.tensor(name).float()

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
        return self.made[name] if name in self.made else self(name, shape)


class _Observed(Linear):
    """A product that adds its inputs to a Hessian."""

    def __init__(self, product: Linear, hessian: Hessian) -> None:
        self.product = product
        self.hessian = hessian

    def __call__(self, x: Tensor) -> Tensor:
        self.hessian.add(x)
        return self.product(x)


def _each_product(partial: Tensor) -> Tensor:
    """A `Reduce` of one rank. Unlike `alone`, it has products computed one by one, and not by one kernel a layer."""
    return partial


def _through(loaded: LoadedStage, hidden: Sequence[Tensor], reduce: Reduce = alone) -> list[Tensor]:
    """What a layer makes of sequences: each [SEQUENCE, hidden_size]."""
    stage = Stage(loaded, n_slots=1, sequence_length=SEQUENCE, reduce=reduce)
    batch = Batch(0, (Slice(0, 0, SEQUENCE),), text_positions(0, SEQUENCE))
    return [stage.run(batch, sequence) for sequence in hidden]


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
