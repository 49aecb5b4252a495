"""What was measured, as the page says it: only alike beside alike, with windows and errors."""

import re
from dataclasses import replace
from html import unescape

import pytest
import records

from optq.findings import Against, Completed, Findings, OnText
from optq.report.page import beside, build, completions, warnings, words
from optq.report.page.known import Several


def text(name="demo", seqlen=512, perplexity=5.0, dense=None, ratio=1.25, agreement=0.9, tokens=9):
    """What was measured on a text; ``dense``: beside which model."""
    beside_it = None
    if dense:
        beside_it = Against(
            dense=dense, perplexity=perplexity / ratio, divergence=0.05, divergence_99_9=1.0,
            divergence_error=0.0023, agreement=agreement, agreement_error=0.0041, ratio=ratio,
            ratio_error=0.001515,
        )  # fmt: skip
    told = {"text": name, "seqlen": seqlen, "tokens": tokens, "perplexity": perplexity}
    return OnText(**told, losses=[], against=beside_it)


def measured(place, *texts, **more):
    found = Findings(optq="0.1.0", model=place, texts=list(texts))
    return replace(records.known(place, findings=found), **more)


def test_only_what_was_measured_alike_is_beside_each_other():
    one = measured("one", text("wikitext2", 2048, 9.0, "m"), text(perplexity=5.0, dense="m"))
    other = measured("other", text(seqlen=128, perplexity=7.0), text(perplexity=6.0, dense="m"))
    third, bare = measured("third", text(perplexity=8.0, dense="else")), measured("bare")
    said = beside.of(Several([one, other, third, bare]))
    assert said["on"] == "demo, windows of 512" and said["against"] == "m" and said["missing"]
    assert [row["perplexity"] for row in said["rows"]] == [5.0, 6.0, 8.0, None]
    assert [row["ratio"] for row in said["rows"]] == [1.25, 1.25, None, None]
    assert [bool(row["against"]) for row in said["rows"]] == [True, True, False, False]
    page = build.page(Several([one, other, third, bare]))
    assert (
        "that of m (± its standard error), divergence and same token are on demo, windows of"
        in (" ".join(page.split()))
    )
    longer = measured("longer", text(perplexity=4.0, tokens=90))  # the file of the text has changed
    rows = beside.of(Several([measured("a", text(perplexity=3.0)), longer]))["rows"]
    assert [row["perplexity"] for row in rows] == [3.0, None]


def test_what_was_measured_has_its_window_and_its_errors():
    page = build.page(Several([measured("one", text(dense="m"), text(seqlen=128))]))
    row = re.search(r'<th scope="row">demo</th>.*?</tr>', page, re.DOTALL)[0]
    cells = [
        " ".join(each.split()) for each in re.findall(r"<td>(.*?)</td>", unescape(row), re.DOTALL)
    ]
    assert cells == [
        *("512", "9", "5.000", "4.000", "1.2500 ± 0.0015", "0.0500 ± 0.0023", "1.00"),
        "90.0% ± 0.41%",
    ]
    assert "+25.00%" in page and "± 0.15% perplexity (standard error)" in page
    assert "on demo, windows of 512; full precision 4.000" in page


def test_full_precision_that_is_known_is_in_the_table():
    page = build.page(Several([measured("one", text(perplexity=6.0), full=5.0)]))
    assert "<td>6.000</td><td>5.000</td>" in page and "<td>1.2000</td>" in page
    assert "+20.00%" in page and "To measure it" not in page


def test_a_broken_model_is_said_to_be_one_first():
    broken = text(perplexity=615.0, dense="m", ratio=123.0, agreement=0.3149)
    known = measured("one", text(dense="m"), broken)
    assert warnings.of(known)[0] == (
        "on demo, perplexity is 123 times full precision's, and only 31% of the next tokens are"
        " those of full precision"
    )
    assert warnings.of(measured("one", text(perplexity=8.0), full=5.0))[0] == (
        "on demo, perplexity is 1.60 times full precision's"
    )
    assert not [line for line in warnings.of(measured("one", text(dense="m"))) if "demo" in line]
    page = build.page(Several([measured("one", broken)]))
    assert f"{words.TIMES}123 " in page and "± 0.0015 perplexity (standard error)" in page
    assert "<strong>615.0</strong>" in page and "1e+" not in page[: page.find("<script>")]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.013, "1.30%"), (0.0129, "1.29%"), (0.1, "10.0%"), (1.234, "123%"), (0.0, "0%"),
     (0.9999, "100%"), (0.00001234, "0.00123%")],
)  # fmt: skip
def test_shares_have_three_digits(value, said):
    assert words.percent(value) == said


def test_commands_are_broken_between_words_only():
    said = words.unbroken("optq eval a --text 'x<y' " + "long/" * 9)
    assert '<span class="word">--text</span> <span class="word">&#39;x&lt;y&#39;</span>' in said
    assert said.endswith(" " + "long/" * 9)
    assert '<code><span class="word">a</span></code>' in words.code("see `a`")


def completed(tokens, dense, differs):
    made = Completed(prompt="p", tokens=tokens, dense=dense, differs=differs)
    (said,) = completions.of(records.FINDINGS.model_copy(update={"completions": [made]}))
    return said["sides"]


def test_the_mark_is_on_what_is_seen():
    """The bytes of a character are tokens without text but the last; a line's end is no sight."""
    ours, theirs = completed(["a", "", "", "é", "b"], ["a", "\n", "c"], 1)
    assert (ours["same"], ours["first"], ours["rest"]) == ("a", "é", "b")
    assert (theirs["same"], theirs["first"], theirs["rest"]) == ("a", "↵", "\nc")
    ours, theirs = completed(["a", "\t"], ["a"], 1)
    assert ours["first"] == "⇥\t" and not ours["ends"] and theirs["ends"]
    ours, _ = completed(["a\u202eb", "\x00"], ["a", "c"], 0)
    assert ours["first"] == "a\\u202eb" and ours["rest"] == "\\x00"


def test_other_calibration_is_said():
    one, made = records.known(), records.record(3, 4)
    assert beside.of(Several([one, records.known("other", made)]))["calibrated"] is None
    update = {"calibration": made.calibration | {"samples": 32}, "qep": None}
    other = records.known("other", made.model_copy(update=update))
    said = beside.of(Several([one, other]))["calibrated"]
    assert "Not calibrated as moe-4bit was: other (samples 32, not 128, error propagation)." in said
