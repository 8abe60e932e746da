"""MDI-LLM: model-distributed inference with Qwen2-VL built in. See README.md for a first run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdi.core.messages import RawText, TokenIds
    from mdi.core.sampling import SamplingParams
    from mdi.engine import Completion, Engine

__all__ = ["Completion", "Engine", "RawText", "SamplingParams", "TokenIds"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # `import mdi` does not take the seconds that torch takes to load
    if name == "SamplingParams":
        from mdi.core.sampling import SamplingParams

        return SamplingParams
    if name in ("RawText", "TokenIds"):
        import mdi.core.messages

        return getattr(mdi.core.messages, name)
    if name in ("Engine", "Completion"):
        import mdi.engine

        return getattr(mdi.engine, name)
    raise AttributeError(f"module 'mdi' has no attribute {name!r}")
