import gzip
import subprocess
import sys

import pytest

from mixtura.core.errors import FetchError
from mixtura.data import DOMAINS, SOURCES, load_domain
from mixtura.data.domains import LONGEST, SHORTEST

MODULE = sys.modules["mixtura.data.domains"]
LONG = "line of words\n" * (SHORTEST // 14 + 1)


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """What a fetch of anything gives: a folder with these files."""

    def files(**contents):
        for name, content in contents.items():
            path = tmp_path / "deep" / name.replace("__", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr(MODULE, "fetch", lambda name: tmp_path)

    return files


@pytest.mark.parametrize("name", ["man-de", "man-fr", "man-es"])
def test_manual_pages_are_unpacked_and_become_plain_text(fetched, name):
    page = ".TH X 1\n.SH NAME\n\\fBgrößer\\fR\n" + LONG
    fetched(
        b__1__gz=gzip.compress(page.encode()), a__1__gz=gzip.compress(LONG.encode()), short__1__gz=gzip.compress(b"x")
    )
    assert load_domain(name) == [LONG.strip(), "NAME\ngrößer\n" + LONG.strip()]


def test_a_manual_page_in_another_encoding_is_read_nevertheless(fetched):
    pages = {f"{i}__1__gz": gzip.compress(("é" * i + LONG).encode("latin-1")) for i in (1, 2)}
    fetched(**pages)
    assert load_domain("man-fr") == ["\ufffd" * i + LONG.strip() for i in (1, 2)]


def test_documents_of_a_middle_length_are_taken(fetched):
    fetched(
        a__txt="a" * (SHORTEST - 1),
        b__txt="b" * SHORTEST,
        c__txt="c" * LONGEST,
        d__txt="d" * (LONGEST + 1),
        e__txt=b"\xff" * SHORTEST,
        f__rst="f" * SHORTEST,
    )
    assert [text[0] for text in load_domain("doc-python")] == ["b", "c"]


def test_plays_come_without_what_stands_around_them(fetched):
    small_print = "Project Gutenberg's\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
    end = "\nEnd of this Project Gutenberg Etext of a play\nmore of theirs\n"
    other = "\n    End of Project Gutenberg Etext\n"
    fetched(
        a_gut__txt=small_print + "\nACT I\n" + LONG + end,
        b_gut__txt="ACT II\n" + LONG * 200 + other,
        c__txt=LONG,
    )
    first, second = load_domain("shakespeare")
    assert first == "ACT I\n" + LONG.strip()
    assert second == "ACT II\n" + (LONG * 200).strip()
    assert len(second) > LONGEST


def test_cpp_without_torch_is_a_domain_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(MODULE.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="code-cpp is read from torch's headers, but torch is not installed"):
        load_domain("code-cpp")


def test_every_domain_that_needs_a_download_has_a_source():
    no_text = {"smollm2-135m", "festvox-kal", "festvox-ked", "fashion-mnist"}
    assert {name for name, domain in DOMAINS.items() if domain.download} == {*SOURCES} - no_text


def test_reading_code_imports_no_torch():
    script = "import sys; from mixtura.data import load_domain; load_domain('code-cpp')"
    script += "; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", script], check=True)
