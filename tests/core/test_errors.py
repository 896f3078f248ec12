import pytest

from mixtura.core import errors
from mixtura.core.errors import unknown_name


def test_the_nearest_name_is_offered():
    assert str(unknown_name("domain", "wikipdia", ["news", "wikipedia"])) == (
        "unknown domain 'wikipdia'; did you mean 'wikipedia'?"
    )


def test_all_names_are_offered_when_none_is_near():
    assert str(unknown_name("domain", "zzz", {"b": 1, "a": 2})) == "unknown domain 'zzz'; known: a, b"
    assert str(unknown_name("domain", "zzz", [])) == "unknown domain 'zzz'; known: none"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ShapeError, ValueError),
        (errors.OptionError, ValueError),
        (errors.UnknownNameError, KeyError),
        (errors.NotExpressibleError, ValueError),
        (errors.FileFormatError, ValueError),
        (errors.FetchError, OSError),
    ],
)
def test_errors_are_what_callers_catch(error, builtin):
    assert issubclass(error, errors.MixturaError)
    assert issubclass(error, builtin)
    assert str(error("plain")) == "plain"
