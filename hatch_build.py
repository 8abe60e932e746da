"""Build hook of the wheel and of editable installs: builds the library of kernels. See CONTRIBUTING.md, "Wheels"."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INSIDE = "mdi/kernels"  # the library's folder in a wheel
RELEASE = "MDI_WHEEL"  # names one of build.RELEASES by its wheel's platform, to be built by ziglang


class KernelsHook(BuildHookInterface[Any]):
    """Puts the library into a wheel of its platform; an editable install finds it in src/, where it is built.

    Where nothing compiles, the wheel is one of Python alone: MDI-LLM computes through torch there.
    """

    def dependencies(self) -> list[str]:
        build = load(self.root)
        target = chosen(build)
        needs_zig = os.environ.get(RELEASE) or (target.zig and not build.system_compiler())
        return ["ziglang>=0.14"] if needs_zig else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build = load(self.root)
        if version == "editable":
            self.built(build, build.LIBRARY)
            return
        self.folder = tempfile.TemporaryDirectory()
        library = Path(self.folder.name, build.LIBRARY.name)
        if not self.built(build, library):
            return
        platform = chosen(build).wheel_platform if os.environ.get(RELEASE) else sysconfig.get_platform()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform.replace('-', '_').replace('.', '_')}"
        for file in (library, build.checksum_file(library)):
            build_data["force_include"][str(file)] = f"{INSIDE}/{file.name}"

    def built(self, build: ModuleType, library: Path) -> bool:
        """Whether the library could be built. A release is not built without it."""
        try:
            release = os.environ.get(RELEASE)
            compiler = [*build.zig(), "-target", chosen(build).zig] if release else None
            build.build(library, chosen(build), compiler)
        except (build.BuildError, OSError) as error:
            if os.environ.get(RELEASE):
                raise
            self.app.display_warning(f"built without kernels, which is slow: {error}")
            return False
        return True


def load(root: str) -> ModuleType:
    """`mdi.kernels.build` by its path: this environment has none of what the package imports."""
    path = Path(root, "src", INSIDE, "build.py")
    specification = importlib.util.spec_from_file_location("mdi_kernels_build", path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def chosen(build: ModuleType) -> Any:
    """The target of this build. Raises ValueError for a release that is not listed."""
    name = os.environ.get(RELEASE)
    if not name:
        return build.this_machine()
    found = {target.wheel_platform: target for target in build.RELEASES}
    if name not in found:
        raise ValueError(f"{RELEASE}={name}: releases are {', '.join(found)}")
    return found[name]
