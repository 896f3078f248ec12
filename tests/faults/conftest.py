"""Disks that are full or read-only, for root and for everyone else."""

import contextlib
import ctypes
import os
import resource

import pytest

_VERSION, _BITS = 0x20080522, 0b110  # of the capability interface; CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def small_files(size):
    """No file grows beyond ``size`` bytes: the system itself refuses to write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only(folder):
    """Nothing can be made in ``folder``; root too is bound by its mode here."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        with _bound_by_modes():
            yield
    finally:
        folder.chmod(mode)


@contextlib.contextmanager
def _bound_by_modes():
    if os.geteuid():
        yield
        return
    header, data = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0, os.strerror(ctypes.get_errno())
    effective = data[0]
    data[0] = effective & ~_BITS
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        data[0] = effective
        assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def places(tmp_path):
    """A dense model, a mixture, a recipe and a folder for results, as the command line wants them."""
    from faults.places import Places

    return Places.made(tmp_path)
