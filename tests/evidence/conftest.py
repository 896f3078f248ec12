"""Every test reads its text anew: others put made-up domains in the place of real ones."""

import pytest

from mixtura.evidence.rigs.text import read


@pytest.fixture(autouse=True)
def real_text():
    read.cache_clear()
    yield
    read.cache_clear()
