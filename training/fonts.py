"""Typefaces for written scenes, all from Python packages; some are kept for held-out scenes only.

Knows file names; draws nothing.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

TRAINING = (
    "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf",
    "matplotlib/mpl-data/fonts/ttf/DejaVuSans-Bold.ttf",
    "matplotlib/mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf",
    "matplotlib/mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf",
    "matplotlib/mpl-data/fonts/ttf/DejaVuSerif.ttf",
    "matplotlib/mpl-data/fonts/ttf/STIXGeneralBol.ttf",
    "matplotlib/mpl-data/fonts/ttf/DejaVuSans-BoldOblique.ttf",
    "font_hanken_grotesk/files/HankenGrotesk-Medium.otf",
    "font_hanken_grotesk/files/HankenGrotesk-Bold.otf",
    "font_source_serif_pro/files/SourceSerifPro-Bold.otf",
    "font_source_serif_pro/files/SourceSerifPro-Regular.otf",
    "font_source_sans_pro/files/SourceSansPro-Semibold.otf",
    "font_source_sans_pro/files/SourceSansPro-Black.otf",
    "font_roboto/files/Roboto-Medium.ttf",
    "font_roboto/files/Roboto-Black.ttf",
    "font_caladea/files/Caladea-Bold.ttf",
    "font_fredoka_one/files/FredokaOne-Regular.ttf",
    "font_fjallaone/files/FjallaOne-Regular.ttf",
)
HELD_OUT = (
    "font_lato/files/Lato-Bold.ttf",
    "font_lato/files/Lato-Regular.ttf",
    "font_manrope/files/Manrope-Bold.ttf",
    "matplotlib/mpl-data/fonts/ttf/cmb10.ttf",
    "font_caladea/files/Caladea-Regular.ttf",
)


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A typeface at a size in pixels. Raises SystemExit, naming the remedy, where its package is missing."""
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the typeface {name} is missing: pip install -e '.[training]'")
    return ImageFont.truetype(Path(spec.submodule_search_locations[0]) / rest, size)
