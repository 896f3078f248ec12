import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtura.core.errors import FetchError, FileFormatError, OptionError, UnknownNameError
from mixtura.data import DOMAINS, Corpus, load_domain
from mixtura.data.domains import LONGEST, SHORTEST, Domain

TEXTS = st.lists(st.text(max_size=6), min_size=2, max_size=30, unique=True)
SHARE = st.floats(0.01, 0.99)


@pytest.fixture
def domains(monkeypatch):
    """Put domains of one's own in the place of the known ones."""

    def known(**texts):
        for name in list(DOMAINS):
            monkeypatch.delitem(DOMAINS, name)
        for name, read in texts.items():
            monkeypatch.setitem(DOMAINS, name, Domain(name, read if callable(read) else lambda read=read: iter(read)))

    return known


def unreachable():
    raise FetchError("apt-get download failed: no network")


@given(TEXTS, SHARE)
def test_both_sides_have_documents_and_none_is_on_both(texts, share):
    corpus = Corpus.split({"d": texts}, held_out=share)
    train, held = corpus.train["d"], corpus.held_out["d"]
    assert train
    assert held
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(texts)
    assert train == [text for text in texts if text in train]  # the order stays


@given(TEXTS, SHARE, st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order(texts, share, random):
    shuffled = random.sample(texts, len(texts))
    one, other = (Corpus.split({"d": order}, held_out=share) for order in (texts, shuffled))
    assert set(one.held_out["d"]) == set(other.held_out["d"])


@given(TEXTS, TEXTS, SHARE)
def test_the_split_of_a_domain_does_not_depend_on_others(texts, others, share):
    alone = Corpus.split({"d": texts}, held_out=share)
    beside = Corpus.split({"e": others, "d": texts}, held_out=share)
    assert alone.train["d"] == beside.train["d"]
    assert alone.held_out["d"] == beside.held_out["d"]


def test_a_document_stays_on_its_side_when_others_come():
    texts = [f"document {i}" for i in range(400)]
    before = Corpus.split({"d": texts[:200]})
    after = Corpus.split({"d": texts})
    assert set(before.train["d"]) < set(after.train["d"])
    assert set(before.held_out["d"]) < set(after.held_out["d"])


def test_the_share_held_out_is_about_what_was_asked_for():
    texts = [f"document {i}" for i in range(4000)]
    assert len(Corpus.split({"d": texts}, held_out=0.25).held_out["d"]) == pytest.approx(1000, abs=5 * 27.4)


@given(TEXTS, SHARE)
def test_what_is_there_twice_counts_once(texts, share):
    assert Corpus.split({"d": texts + texts}, held_out=share) == Corpus.split({"d": texts}, held_out=share)


@pytest.mark.parametrize("texts", [[], ["one"], ["one", "one"]])
def test_too_few_documents_are_named(domains, texts):
    message = rf"domain 'few' needs at least two documents, got {len(set(texts))}"
    with pytest.raises(OptionError, match=message):
        Corpus.split({"few": texts})
    domains(few=texts)
    with pytest.raises(OptionError, match=message):
        load_domain("few")


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5, float("nan")])
def test_held_out_must_lie_between_0_and_1(held_out):
    with pytest.raises(OptionError, match="held_out must lie between 0 and 1, got"):
        Corpus.split({"d": ["a", "b"]}, held_out=held_out)


def test_load_reads_domains_and_splits_them(domains):
    domains(a=["a1", "a2", "a1"], b=["b1", "b2"])
    assert Corpus.load(["a", "b"]) == Corpus.split({"a": ["a1", "a2"], "b": ["b1", "b2"]})
    assert Corpus.load(["b", "b"]) == Corpus.split({"b": ["b1", "b2"]})


def test_a_domain_that_cannot_be_had_is_skipped_with_its_reason(domains):
    domains(a=["a1", "a2"], far=unreachable)
    corpus = Corpus.load(["far", "a"])
    assert list(corpus.train) == list(corpus.held_out) == ["a"]
    assert corpus.skipped == {"far": "apt-get download failed: no network"}


def test_a_domain_that_cannot_be_had_is_an_error_if_one_asks_for_that(domains):
    domains(a=["a1", "a2"], far=unreachable)
    with pytest.raises(FetchError, match=r"^apt-get download failed: no network$"):
        Corpus.load(["a", "far"], on_missing="raise")


def test_nothing_left_is_an_error(domains):
    domains(far=unreachable)
    with pytest.raises(FetchError, match=r"no domain could be read: .*no network"):
        Corpus.load(["far"])


def test_only_what_cannot_be_had_is_skipped(domains, tmp_path):
    domains(a=["a1", "a2"])
    with pytest.raises(UnknownNameError, match="unknown domain 'aa'; did you mean 'a'"):
        Corpus.load(["a", "aa"])
    with pytest.raises(FileFormatError, match="cannot be read"):
        Corpus.load(["a", f"own={tmp_path / 'nowhere.txt'}"])


def test_on_missing_is_one_of_two(domains):
    domains(a=["a1", "a2"])
    with pytest.raises(OptionError, match="on_missing must be 'skip' or 'raise', got 'ignore'"):
        Corpus.load(on_missing="ignore")


def test_an_unknown_domain_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown domain 'code-pyton'; did you mean 'code-python'"):
        load_domain("code-pyton")


def test_own_text_from_a_folder_is_one_document_a_file(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in {
        "b.txt": "second",
        "a.txt": "first",
        "deep/c.txt": "dritter, größer",
        "blank.txt": " \n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "d.md").write_text("not read")
    assert load_domain(f"own={tmp_path}") == ["first", "second", "dritter, größer"]


def test_own_text_from_a_jsonl(tmp_path):
    path = tmp_path / "own.jsonl"
    texts = ["first\nline", "a line separator \u2028 and \x85 stay inside", " ", "last"]
    lines = [json.dumps({"text": text, "id": 3}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert load_domain(f"own={path}") == [texts[0], texts[1], texts[3]]


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", "null", '{"txt": "a"}', '{"text": 3}', '{"text": null}', r'{"text": "\ud800"}']
)
def test_a_broken_line_of_a_jsonl_is_named(tmp_path, line):
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n', encoding="utf-8")
    with pytest.raises(FileFormatError, match=r'own\.jsonl\': line 3 is no JSON object with "text"'):
        load_domain(f"own={path}")


def test_own_text_from_one_file_is_cut_at_empty_lines(tmp_path):
    path = tmp_path / "own.txt"
    paragraphs = [f"paragraph {i} " + "word " * (10 + i % 7) + "\nsecond line" for i in range(100)]
    path.write_text("\n\n".join(paragraphs) + "\n")
    documents = load_domain(f"own={path}")
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert all(SHORTEST <= len(document) + 2 <= 3 * SHORTEST for document in documents)
    assert {part for document in documents for part in document.split("\n\n")} == set(paragraphs)


@pytest.mark.parametrize("text", ["", "\n\n", "too short\n\nfor two documents", "one line " * 1000])
def test_one_file_that_gives_one_document_is_too_little(tmp_path, text):
    path = tmp_path / "own.txt"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"domain 'own' needs at least two documents, got [01]"):
        load_domain(f"own={path}")


@pytest.mark.parametrize("name", ["own.txt", "own.jsonl"])
def test_text_that_is_not_utf8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(FileFormatError, match=r"own\.\w+' cannot be read: .*utf-8"):
        load_domain(f"own={tmp_path / name}")


def test_a_name_is_given_once(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for i in range(2):
            (tmp_path / folder / f"{i}.txt").write_text(f"{folder}{i}")
    with pytest.raises(OptionError, match="domain 'own' is given twice"):
        Corpus.load([f"own={tmp_path / 'x'}", f"own={tmp_path / 'y'}"])


def test_python_code_needs_no_download():
    assert not DOMAINS["code-python"].download
    documents = load_domain("code-python")
    assert documents == load_domain("code-python")
    assert len(documents) > 200
    assert all(SHORTEST <= len(text) <= LONGEST for text in documents)
    assert sum("def " in text for text in documents) > 0.8 * len(documents)


def test_cpp_code_needs_no_download():
    assert not DOMAINS["code-cpp"].download
    documents = load_domain("code-cpp")
    assert documents == load_domain("code-cpp")
    assert len(documents) > 200
    assert all(SHORTEST <= len(text) <= LONGEST for text in documents)
    assert sum("#include" in text for text in documents) > 0.8 * len(documents)
    assert not any("@generated" in text for text in documents)
