"""Builds the native experts with the C++ compiler of the machine; without one the package is built all the same.

The compiler is $CXX, else c++. A package without the library computes experts on torch alone, and says so.
"""

from __future__ import annotations

import runpy
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/mixtura/nn/backends/native")
LIBRARY = "libmixtura_native.so"


class NativeBuild(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the library beside the Python files that load it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is built, an editable one too."""
        build_data["force_include"]["evidence"] = "mixtura/evidence/scripts"  # of an editable one they lie beside
        native = Path(self.root) / NATIVE
        compiling = runpy.run_path(str(native / "build.py"))
        try:
            compiling["build"](native / LIBRARY)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            self.app.display_warning(f"native experts are not built, torch will compute them: {reason.strip()}")
            (native / LIBRARY).unlink(missing_ok=True)
            return
        build_data["artifacts"].append(f"{NATIVE}/{LIBRARY}")
        for header in compiling["headers"]():  # the library is compared with them when it is loaded
            build_data["force_include"][str(header)] = str(header.relative_to(Path(self.root) / "src"))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
