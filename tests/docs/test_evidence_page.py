"""The page of evidence, of results that are made up and of those that are there."""

import pytest

from docs.made_up import arm, result
from docs.pages import docs_module
from mixtura.evidence.scripts import known_results


def page(*results):
    return docs_module("evidence_page").evidence_page({one.key: one for one in results})


def test_a_section_says_everything():
    lines = page(result()).splitlines()
    assert lines[0] == "**1 claims**: does not hold here 1."
    for line in (
        "| [expert-choice](#expert-choice) | Experts that choose are better. | does not hold here |",
        "## expert-choice",
        "**Claim.** Experts that choose are better. "
        "Source: Zhou et al., [arXiv:2202.09368](https://arxiv.org/abs/2202.09368), fig. 2; a book.",
        "**Setting.** A sum of two numbers.",
        "**Verdict: does not hold here.** The difference is 0 (-1 to 1).",
        "| experts choose | 0.25\u00a0±\u00a00.12 |",
        r"| tokens \| choose | 12,345 | 1.235 |",
        r"| experts choose minus tokens \| choose | loss | 0.0 (-1.0 to 1.0) |",
        "    | experts choose | loss | 0.2 | 0.25 | 0.3 |",
        '    * experts choose: `{"width": 64}`',
        '    * tokens | choose: `{"width": 64}`, best of 2 settings on a seed of its own',
        "Run on 2026-01-02, Linux, x86_64, 2 cores; python 3.11, torch 2.9. To repeat it:",
        "mixtura evidence expert-choice",
    ):
        assert line in lines


def test_verdicts_come_first_and_are_counted():
    told = page(result("b", verdict="holds"), result("a", verdict="partly"), result("c", verdict="holds"))
    assert told.startswith("**3 claims**: holds 2, partly 1.\n")
    assert told.index("| [c](#c)") < told.index("## a\n") < told.index("## b\n")


def test_arms_may_have_different_figures_and_costs():
    other = arm(
        "other", cost={"flops": 1.5e15}, figures={"speed": {"mean": 2.0, "low": None, "high": None, "seeds": [2.0] * 3}}
    )
    told = page(result(arms=(arm("one"), other)))
    assert "| arm | loss | speed |\n| --- | --- | --- |\n| one | 0.25\u00a0±\u00a00.12 |  |\n| other |  | 2 |" in told
    assert "| other |  |  | 1.5e15 |" in told


def test_what_cannot_be_tested_has_no_tables_of_arms():
    told = page(result(arms=(), differences=(), verdict="not testable here", sentence="It needs a cluster."))
    assert "**Verdict: not testable here.** It needs a cluster." in told
    assert "seed" not in told


def test_without_results_it_says_so():
    assert page() == docs_module("evidence_page").NOTHING


@pytest.mark.parametrize(
    ("value", "told"), [(None, ""), (2.0, "2"), (1234567.0, "1,234,567"), (0.123456, "0.1235"), (3e15, "3e15")]
)
def test_numbers(value, told):
    assert docs_module("evidence_page").number(value) == told


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        ((-0.0412, -0.0521, -0.0303), "-0.041 (-0.052 to -0.030)"),
        ((1234.5, 1000.0, 1469.0), "1,234 (1,000 to 1,469)"),
        ((2.11, 2.11 - 0.00999, 2.11 + 0.00999), "2.110 (2.100 to 2.120)"),
        ((3.0, 3.0, 3.0), "3.000 (3.000 to 3.000)"),
    ],
)
def test_an_interval_is_shown_to_two_digits_of_its_half(interval, told):
    named = dict(zip(("mean", "low", "high"), interval, strict=True))
    row = {"figure": "loss", "of": "one", "against": "two", **named}
    shown = page(result(arms=(arm("one", figures={"loss": {**named, "seeds": [0.0] * 3}}),), differences=(row,)))
    assert f"| one minus two | loss | {told} |" in shown
    assert f"| one | {told.split()[0]}\u00a0±\u00a0" in shown


@pytest.mark.parametrize("text", ["it holds", "It holds", "It holds."])
def test_sentences_have_a_capital_and_a_full_stop(text):
    assert "**Setting.** It holds.\n" in page(result(setting=text))


def test_every_result_that_is_there_has_its_section():
    told = docs_module("hooks").generated("evidence")
    for key, one in known_results().items():
        section = told.partition(f"\n## {key}\n")[2].partition("\n## ")[0]
        assert f"**Verdict: {one.verdict}.** {one.sentence[0].upper()}{one.sentence[1:].rstrip('.')}." in section
        assert f"\n{one.command}\n" in section
