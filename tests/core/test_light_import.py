"""``import mixtura`` is light: it loads nothing that takes time. And the check that says so can fail."""

import subprocess
import sys

import pytest

LIST = "\nimport sys; print(*sys.modules)"


def loaded(code):
    """Names of the modules that are loaded after ``code`` ran in a new process."""
    done = subprocess.run([sys.executable, "-c", code + LIST], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_mixtura_loads_no_heavy_module():
    assert not loaded("import mixtura") & {"torch", "transformers", "numpy", "scipy", "pandas", "sklearn"}


def test_core_loads_neither_numpy_nor_torch():
    assert not loaded("import mixtura.core") & {"torch", "transformers", "numpy"}


def test_core_on_numpy_loads_no_torch():
    code = "import numpy as np; from mixtura.core import *; select(np.zeros((2, 3)), SelectionSpec(k=2))"
    assert "torch" not in loaded(code)


def test_nn_loads_no_transformers():
    assert "transformers" not in loaded("import mixtura.nn")


def test_hf_loads_no_modeling_file():
    modeling = {name for name in loaded("import mixtura.hf") if "transformers.models." in name and ".modeling_" in name}
    assert modeling <= {"transformers.models.auto.modeling_auto"}  # a table of names


@pytest.mark.parametrize("module", ["numpy", "torch"])
def test_the_check_can_fail(module):
    assert module in loaded(f"import mixtura, {module}")
