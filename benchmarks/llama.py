"""llama.cpp as a peer: built for this CPU once, in a virtual environment of its own, and run as a side.

The side is this module, run by that environment's Python. It needs nothing of the project and calls llama.cpp's C
functions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdi" / "peers" / "llama-cpp"
BUILD = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF"
WITHOUT_AMX = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
"""llama-cpp-python 0.3.36, built for a Xeon with AMX, died there at its first `tileloadd`, with one thread and two."""
BATCH = 2048


def llama_python() -> Path:
    """The Python that has llama.cpp. Builds it where it is not there: some minutes of all cores."""
    python, built = FOLDER / "bin" / "python", FOLDER / ".built"
    if not built.exists():
        print(f"building llama.cpp for this CPU into {FOLDER}: some minutes", file=sys.stderr)
        venv.create(FOLDER, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python", "llama-cpp-python"]
        subprocess.run(pip, check=True, env={**os.environ, "CMAKE_ARGS": _build_options()})
        built.touch()
    return python


def _build_options() -> str:
    processor = Path("/proc/cpuinfo")
    has_amx = processor.exists() and "amx_int8" in processor.read_text()
    return f"{BUILD} {WITHOUT_AMX}" if has_amx else BUILD


class Llama:
    """One sequence of a GGUF file. Calls as in `benchmarks.sides`."""

    def __init__(self, path: str, sequence_length: int, threads: int) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = sequence_length, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        assert self._context, f"llama.cpp cannot load {path}"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._length = 0

    def prefill(self, ids: list[int]) -> None:
        """From nothing."""
        self._c.llama_memory_clear(self._memory, True)
        for start in range(0, len(ids), BATCH):
            self._read(ids[start : start + BATCH])
        self._length = len(ids)

    def decode(self, n_tokens: int) -> None:
        """Greedy tokens after the prompt, which are dropped again."""
        token = self._likeliest()
        for _ in range(n_tokens):
            self._read([token])
            token = self._likeliest()
        self._c.llama_memory_seq_rm(self._memory, 0, self._length, -1)

    def logits(self, ids: list[int]) -> list[float]:
        """Of the token after these, read from nothing."""
        self.prefill(ids)
        return self._last().tolist()  # type: ignore[no-any-return]

    def nll(self, ids: list[int]) -> float:
        """The sum of -log p of every token after the first, read from nothing."""
        import numpy as np

        self._c.llama_memory_clear(self._memory, True)
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, True
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        failed = self._c.llama_decode(self._context, batch)
        assert not failed, f"llama_decode returned {failed}"
        logits = np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (len(ids), self._vocab_size))
        total = 0.0
        for row, token in zip(logits, ids[1:], strict=False):
            highest = row.max()
            total += float(highest + np.log(np.exp((row - highest).astype(np.float64)).sum()) - row[token])
        self._c.llama_batch_free(batch)
        return total

    def _likeliest(self) -> int:
        return int(self._last().argmax())

    def _last(self) -> Any:
        import numpy as np

        return np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, -1), (self._vocab_size,))

    def _read(self, ids: list[int]) -> None:
        tokens = (self._c.llama_token * len(ids))(*ids)
        failed = self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids)))
        assert not failed, f"llama_decode returned {failed}"


if __name__ == "__main__":
    from benchmarks.serve_side import serve

    serve(Llama)
