"""Builds the native experts with the C++ compiler of the machine; without one the package is built all the same.

The compiler is $CXX, else c++. A package without the library computes experts on torch alone, and says so.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/mixtura/nn/backends/native")
LIBRARY = "libmixtura_native.so"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-Wall", "-Wextra"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # none of them changes what NaN does
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
SOURCES: dict[str, list[str]] = {"dispatch": [], "decode": [], "isa_portable": []}
X86_SOURCES = {
    "dispatch": ["-DMIXTURA_X86"],
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx512": AVX512,
    "isa_avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}


class NativeBuild(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the library beside the Python files that load it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is built, an editable one too."""
        root = Path(self.root)
        try:
            build(root / NATIVE / "csrc", root / NATIVE / LIBRARY)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            self.app.display_warning(f"native experts are not built, torch will compute them: {reason.strip()}")
            (root / NATIVE / LIBRARY).unlink(missing_ok=True)
            return
        build_data["artifacts"].append(f"{NATIVE}/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def build(sources: Path, library: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile and link.

    Args:
        sources: folder of the C++ files.
        library: what is written, whole or not at all.
        extra: flags for all steps, as those of a sanitizer.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    files = SOURCES | X86_SOURCES if x86 else SOURCES
    with tempfile.TemporaryDirectory() as folder:
        objects = {name: Path(folder, f"{name}.o") for name in files}

        def compile_one(name: str) -> None:
            source = str(sources / f"{name}.cpp")
            _run([*compiler, *FLAGS, *extra, *files[name], "-c", source, "-o", str(objects[name])])

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, files))
        linked = Path(folder, library.name)
        _run([*compiler, "-shared", "-fopenmp", *extra, *map(str, objects.values()), "-o", str(linked)])
        partial = library.with_suffix(".partial")
        partial.write_bytes(linked.read_bytes())
        partial.replace(library)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
