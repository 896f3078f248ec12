import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtura.core.errors import OptionError, UnknownNameError
from mixtura.data import MixedBlocks
from mixtura.data.blocks import block_counts

SHARES = st.dictionaries(
    st.sampled_from("abcdef"), st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.integers(0, 9)), min_size=1
).filter(lambda shares: any(shares.values()))


def letters(text):
    """A token is a letter's number."""
    return [ord(letter) for letter in text]


def documents(names="ab", count=12, size=40):
    """Document i of a domain is its letter, in capitals, and the i-th character over and over."""
    return {name: [name.upper() + chr(500 + i) * size for i in range(count)] for name in names}


def blocks(proportions, **options):
    options = {"total": 20, "length": 8, "tokenize": letters, **options}
    return MixedBlocks(options.pop("documents", documents()), proportions, **options)


def same(one, other):
    assert len(one) == len(other)
    for x, y in zip(one, other, strict=True):
        assert x["domain"] == y["domain"]
        assert np.array_equal(x["input_ids"], y["input_ids"])


def largest_remainders(proportions, total):
    """One block at a time to whoever lacks most of its exact share, after everyone has the whole part of it."""
    whole = sum(Fraction(share) for share in proportions.values())
    exact = {name: Fraction(share) * total / whole for name, share in proportions.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    waiting = sorted(exact)
    while sum(counts.values()) < total:
        most = max(waiting, key=lambda name: exact[name] - math.floor(exact[name]))
        waiting.remove(most)
        counts[most] += 1
    return counts


@given(SHARES, st.integers(1, 1000))
def test_counts_are_those_of_the_largest_remainders(proportions, total):
    counts = block_counts(proportions, total)
    assert counts == largest_remainders(proportions, total)
    assert sum(counts.values()) == total


@given(SHARES, st.integers(1, 200), st.integers(0, 5))
def test_blocks_have_the_proportions_exactly(proportions, total, seed):
    found = blocks(proportions, total=total, seed=seed, documents=documents("abcdef", count=2))
    assert len(found) == total
    counts = {name: sum(block["domain"] == name for block in found) for name in proportions}
    assert counts == block_counts(proportions, total)


@pytest.mark.parametrize("scale", [1e-300, 1, 1e300, 1.7e308])
def test_only_the_ratio_of_proportions_counts(scale):
    assert block_counts({"a": scale, "b": scale}, 7) == {"a": 4, "b": 3}


@pytest.mark.parametrize("share", [-1, -1e-9, math.nan, math.inf, -math.inf])
def test_a_proportion_that_is_no_share_is_named(share):
    with pytest.raises(OptionError, match=f"proportion of 'b' must be finite and at least 0, got {share}"):
        blocks({"a": 1, "b": share})


@pytest.mark.parametrize("proportions", [{}, {"a": 0}, {"a": 0, "b": 0.0}])
def test_proportions_that_are_all_0(proportions):
    with pytest.raises(OptionError, match="proportions must not all be 0"):
        blocks(proportions)


def test_an_unknown_domain_offers_the_nearest():
    texts = {"shakespeare": ["x" * 9], "code": ["y" * 9]}
    with pytest.raises(UnknownNameError, match="unknown domain 'shakespear'; did you mean 'shakespeare'"):
        blocks({"code": 1, "shakespear": 0}, documents=texts)


@pytest.mark.parametrize(("total", "length"), [(0, 8), (-1, 8), (5, 1), (5, 0)])
def test_too_few_blocks_or_tokens(total, length):
    with pytest.raises(OptionError, match=f"total must be at least 1 and length at least 2, got {total} and {length}"):
        blocks({"a": 1}, total=total, length=length)


@pytest.mark.parametrize("texts", [[], ["short"], ["short", "seven.."]])
def test_a_domain_without_a_document_for_a_block_is_named(texts):
    with pytest.raises(OptionError, match="domain 'b' has no document of 8 tokens"):
        blocks({"a": 1, "b": 1}, documents={**documents("a"), "b": texts})


def test_a_domain_with_no_block_needs_no_document():
    assert {block["domain"] for block in blocks({"a": 1, "b": 0}, documents={**documents("a"), "b": []})} == {"a"}


@pytest.mark.parametrize("length", [2, 8, 41])
def test_blocks_have_their_length(length):
    for block in blocks({"a": 1, "b": 2}, length=length):
        assert block["input_ids"].shape == (length,)
        assert block["input_ids"].dtype == np.int64


def test_a_block_is_text_of_its_domain():
    for block in blocks({"a": 1, "b": 2}, total=60):
        text = "".join(map(chr, block["input_ids"]))
        assert any(text in document for document in documents()[block["domain"]])


def test_the_same_arguments_give_the_same_blocks_at_any_index():
    proportions = {"a": 0.3, "b": 0.7}
    found, again = blocks(proportions, seed=5), blocks(proportions, seed=5)
    same(found, again)
    backwards = [again[i] for i in reversed(range(len(again)))]
    same(list(found), backwards[::-1])
    same([found[-1], found[-20]], [found[19], found[0]])


@pytest.mark.parametrize("index", [20, -21, 1000])
def test_an_index_that_is_outside(index):
    with pytest.raises(IndexError):
        blocks({"a": 1})[index]


def test_another_seed_gives_other_blocks_in_another_order():
    found, other = blocks({"a": 1, "b": 1}, seed=0), blocks({"a": 1, "b": 1}, seed=1)
    assert [block["domain"] for block in found] != [block["domain"] for block in other]
    assert any(not np.array_equal(x["input_ids"], y["input_ids"]) for x, y in zip(found, other, strict=True))


def test_blocks_of_a_domain_do_not_depend_on_the_others():
    alone = blocks({"a": 1}, total=10)
    beside = [block for block in blocks({"b": 1, "a": 1}, total=20) if block["domain"] == "a"]
    same(alone, beside)


@given(st.integers(1, 30), st.integers(0, 9))
def test_every_document_gives_a_block_before_one_gives_a_second(total, seed):
    found = blocks({"a": 1}, total=total, seed=seed)
    times = np.unique([block["input_ids"][1] for block in found], return_counts=True)[1]
    assert len(times) == min(total, 12)
    assert max(times) - min(times) <= 1


def test_documents_that_are_too_short_are_passed_over():
    texts = {"a": ["short", "A" + "x" * 20, "", "A" + "y" * 20]}
    assert {chr(block["input_ids"][1]) for block in blocks({"a": 1}, total=6, documents=texts)} == {"x", "y"}


def test_blocks_of_a_long_document_begin_at_its_lines():
    lines = [f"{i:04d} " + "word " * 10 for i in range(300)]
    found = blocks({"a": 1}, total=50, documents={"a": ["\n".join(lines)]})
    begins = {"".join(map(chr, block["input_ids"][:5])) for block in found}
    assert begins <= {line[:5] for line in lines}
    assert len(begins) > 25


def spread(order, counts):
    """How far a window's count of a domain is from the domain's share of the window, at most: (domains,)."""
    total = len(order)
    worst = []
    for d, count in enumerate(counts):
        before = np.concatenate([[0], np.cumsum(np.asarray(order) == d)]) - np.arange(total + 1) * count / total
        worst.append(before.max() - before.min())
    return np.array(worst)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 20))
def test_domains_are_evenly_spread(counts, seed):
    """Every window of the order holds each domain's share to within 2 (1 + s (D - 2)) blocks.

    Block k of a domain with n blocks has its time in [k/n, (k+1)/n), so a stretch of time of length t holds n t of them
    to within 2. A window is such a stretch, but its length is known by its blocks, N t to within what all domains are
    off; that part counts by the domain's share s: (1 - s) 2 + s 2 (D - 1).
    """
    names = "abcde"[: len(counts)]
    found = blocks(dict(zip(names, counts, strict=True)), total=sum(counts), seed=seed, documents=documents(names))
    shares = np.array(counts) / sum(counts)
    order = [names.index(block["domain"]) for block in found]
    assert (spread(order, counts) <= 2 * (1 + shares * (len(counts) - 2)) + 1e-9).all()


def test_the_bound_on_the_spread_would_be_broken_by_a_shuffle():
    order = np.random.default_rng(0).permutation([0] * 100 + [1] * 100)
    assert (spread(order, [100, 100]) > 2).all()
