"""Loading the library: one of another version, or one that is none, is never called; and what a program must survive.

T tokens, D width, E experts, K slots a token.
"""

import os
import shlex
import shutil
import subprocess

import pytest
import torch

from mixtura.core.errors import MixturaWarning, NotExpressibleError
from mixtura.nn import Experts
from mixtura.nn.backends import automatic_backend, sorted_backend
from mixtura.nn.backends.native import library as loading
from mixtura.nn.backends.native import native_backend
from mixtura.nn.backends.native.build import SOURCES, headers, interface

STUBS = {
    "of another version, interface 0123456789abcdef instead of": (
        'extern "C" const char *mixtura_interface() { return "0123456789abcdef"; }'
    ),
    "of an older version": 'extern "C" const char *mixtura_isa() { return "avx2"; }',
}


def stub(folder, source):
    path = folder / "libmixtura_native.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture
def instead(monkeypatch):
    """Puts another file in the place of the library; ends with the one of before."""

    def replace(path):
        monkeypatch.setattr(loading, "PATH", path)
        forget()

    def forget():
        loading.library.cache_clear()
        loading._loaded.cache_clear()

    yield replace
    monkeypatch.undo()
    forget()


def call():
    generator = torch.Generator().manual_seed(0)
    indices_TK = torch.randint(0, 5, (6, 2), generator=generator)
    return Experts(4, 16, 8), torch.randn(6, 16, generator=generator), indices_TK, torch.rand(6, 2, generator=generator)


@pytest.mark.parametrize("reason", STUBS)
def test_a_library_of_another_version_is_said_once_and_torch_computes(reason, instead, tmp_path):
    instead(stub(tmp_path, STUBS[reason]))
    arguments = call()
    with pytest.warns(MixturaWarning, match=f"libmixtura_native.so: the library is {reason}") as seen:
        out_TD = automatic_backend(*arguments)
    assert torch.equal(out_TD, sorted_backend(*arguments))
    assert torch.equal(automatic_backend(*arguments), out_TD)  # a warning would be an error now
    with pytest.raises(NotExpressibleError, match=reason):
        native_backend(*arguments)
    assert "torch computes experts until mixtura is installed again" in str(seen[0].message)


def test_a_file_that_is_no_library_is_said_and_torch_computes(instead, tmp_path):
    path = tmp_path / "libmixtura_native.so"
    path.write_bytes(b"no library")
    instead(path)
    with pytest.warns(MixturaWarning, match="the library cannot be loaded"):
        out_TD = automatic_backend(*call())
    assert out_TD.isfinite().all()


def test_without_a_library_nothing_is_said(instead, tmp_path):
    instead(tmp_path / "libmixtura_native.so")
    arguments = call()
    assert torch.equal(automatic_backend(*arguments), sorted_backend(*arguments))
    assert loading.why_no_library() == "the library was not built, for want of a C++ compiler"


def test_the_interface_changes_with_the_headers_but_not_with_their_comments(tmp_path):
    assert loading.library().mixtura_interface().decode() == interface()
    for header in headers():
        shutil.copy(header, tmp_path)
    assert interface(tmp_path) == interface(SOURCES)
    (tmp_path / "mixtura_native.h").write_text(f"// new\n\n{(SOURCES / 'mixtura_native.h').read_text()}")
    assert interface(tmp_path) == interface(SOURCES)
    with (tmp_path / "mixtura_decode.h").open("a") as file:
        file.write("int more(void);\n")
    assert interface(tmp_path) != interface(SOURCES)
