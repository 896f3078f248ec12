"""Compiles the library: by the installation, and by hand with other flags, as those of a sanitizer.

The compiler is $CXX, else c++. A file of its own, which the installation runs before there is a package.

    python src/mixtura/nn/backends/native/build.py /tmp/libmixtura_native.so -g -fsanitize=address
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-Wall", "-Wextra"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # none of them changes what NaN does
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
FILES: dict[str, list[str]] = {"dispatch": [], "decode": [], "isa_portable": []}
X86_FILES = {
    "dispatch": ["-DMIXTURA_X86"],
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx512": AVX512,
    "isa_avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}


def headers(sources: Path = SOURCES) -> list[Path]:
    """Those that describe the interface."""
    return sorted(sources.glob("mixtura_*.h"))


def interface(sources: Path = SOURCES) -> str:
    """Sixteen digits that change with the text of the headers, but for comments and spaces.

    The library holds those of the headers that it was built from; who calls it compares.
    """
    text = "\n".join(re.sub(r"//.*", "", path.read_text(encoding="utf-8")) for path in headers(sources))
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def build(library: Path, extra: tuple[str, ...] = (), *, sources: Path = SOURCES) -> None:
    """Compile and link.

    Args:
        library: what is written, whole or not at all.
        extra: flags for all steps.
        sources: folder of the C++ files.

    Raises:
        CalledProcessError: with what the compiler said.
        OSError: if there is none.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    files = FILES | X86_FILES if platform.machine().lower() in ("x86_64", "amd64") else FILES
    common = [*compiler, *FLAGS, f'-DMIXTURA_INTERFACE="{interface(sources)}"', *extra]
    with tempfile.TemporaryDirectory() as folder:
        objects = {name: str(Path(folder, f"{name}.o")) for name in files}

        def compile_one(name: str) -> None:
            _run([*common, *files[name], "-c", str(sources / f"{name}.cpp"), "-o", objects[name]])

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, files))
        linked = Path(folder, library.name)
        _run([*compiler, "-shared", "-fopenmp", *extra, *objects.values(), "-o", str(linked)])
        partial = library.with_suffix(f".{os.getpid()}")
        partial.write_bytes(linked.read_bytes())
        partial.replace(library)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), tuple(sys.argv[2:]))
    except subprocess.CalledProcessError as failure:
        sys.exit(failure.stderr)
