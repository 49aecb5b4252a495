"""Comparisons as a program makes them; the demo's rows are tested with the command."""

import json
import re
from dataclasses import asdict, replace
from xml.etree import ElementTree

import pytest
import zoo

from optq import GPTQ, RTN, ModelConfig, Runner, compare
from optq.core.gptq import BEST, PLAIN
from optq.data.calibration import calibration_tokens
from optq.data.evaluation import evaluation_tokens
from optq.errors import DataError, OutputError, SettingError
from optq.evaluate.divergence import divergence
from optq.evaluate.perplexity import perplexity
from optq.model.predictions import predictions
from optq.report import chart, compared, tables

TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    (row,) = (row for row in zoo.ROWS if row.name == "llama")
    return ModelConfig(str(zoo.save(row, tmp_path_factory.mktemp("llama") / "model")), "cpu")


@pytest.fixture
def comparison(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return compare.Comparison(
        config,
        methods=("rtn", "plain", "no-qep", "gptq"),
        wbits=(3,),
        groupsizes=(32, -1),
        calib=str(text),
        text=str(text),
        nsamples=4,
        seqlen=32,
    )


def test_what_best_is(comparison):
    rows = replace(comparison, methods=("gptq", "best"), groupsizes=(32,)).run()
    tokenizer = comparison.config.load()[1]
    tokens = calibration_tokens(comparison.calib, tokenizer, 4, 32, 0)
    model = Runner(comparison.config, GPTQ(3, 32), True, calib=tokens, tune="model").run().model
    windows = evaluation_tokens(comparison.text, tokenizer, 32)
    assert perplexity(model, windows).perplexity == rows[2].perplexity != rows[1].perplexity


def test_a_comparison(comparison):
    seen = []
    rows = comparison.run(progress=lambda *step: seen.append(step))
    assert [row.method for row in rows] == ["none", *comparison.methods * 2]
    assert [row.groupsize for row in rows] == [-1, *[32] * 4, *[-1] * 4]
    full, rest = rows[0], rows[1:]
    assert full.rise == 0 and full.bits_per_weight == 32
    assert all(row.rise == row.perplexity - full.perplexity for row in rest)
    assert all(row.seconds > 0 and 3 < row.bits_per_weight < 5 for row in rest)
    assert full.divergence is full.agreement is full.rise_error is None
    assert all(0 < row.divergence_error < row.divergence for row in rest)
    assert all(0 < row.agreement < 1 and row.rise_error > 0 for row in rest)
    assert len({row.perplexity for row in rows}) == len(rows)
    # The same run by hand, with the same tokens.
    tokenizer = comparison.config.load()[1]
    tokens = calibration_tokens(comparison.calib, tokenizer, 4, 32, 0)
    model = Runner(comparison.config, GPTQ.plain(3, 32), calib=tokens).run().model
    windows = evaluation_tokens(comparison.text, tokenizer, 32)
    assert perplexity(model, windows).perplexity == rows[2].perplexity
    dense = comparison.config.load()[0]
    assert perplexity(dense, windows).perplexity == full.perplexity
    found = divergence(model, predictions(dense, [windows])[0], windows)
    assert (found.mean, found.agreement) == (rows[2].divergence, rows[2].agreement)
    assert rows[2].rise_error == pytest.approx(found.ratio_error * full.perplexity)
    (without, row) = replace(comparison, methods=("plain",), groupsizes=(32,), far=False).run()
    assert (without.perplexity, row.perplexity, row.rise) == (
        full.perplexity, rows[2].perplexity, rows[2].rise,
    )  # fmt: skip
    assert row.divergence is row.agreement is row.rise_error is None
    assert seen[-1][:2] == (8, 9) and "gptq at 3 bits" in seen[-1][2]


def test_nothing_is_done_twice(comparison, monkeypatch):
    """One text for all rows, one pass of the full-precision model, and rounding reads one window
    to find its layers, whatever the others need.
    """
    done, run = [], Runner.run

    def watched(name):
        plain = getattr(compare, name)

        def call(*arguments, **named):
            done.append(name)
            return plain(*arguments, **named)

        monkeypatch.setattr(compare, name, call)

    for name in ("calibration_tokens", "evaluation_tokens", "predictions", "divergence"):
        watched(name)
    monkeypatch.setattr(Runner, "run", lambda self: done.append(len(self.calib)) or run(self))
    rows = replace(comparison, methods=("rtn", "plain"), groupsizes=(32,)).run()
    once = ["evaluation_tokens", "calibration_tokens", "predictions"]
    assert done == [*once, 1, "divergence", 4, "divergence"]
    monkeypatch.undo()
    tokenizer = comparison.config.load()[1]
    tokens = calibration_tokens(comparison.calib, tokenizer, 4, 32, 0)
    result = Runner(comparison.config, RTN(3, 32), calib=tokens).run()
    windows = evaluation_tokens(comparison.text, tokenizer, 32)
    assert perplexity(result.model, windows).perplexity == rows[1].perplexity
    assert (result.bytes, result.bits_per_weight) == (rows[1].bytes, rows[1].bits_per_weight)


def test_an_interrupted_comparison_goes_on(comparison, tmp_path, monkeypatch):
    results = tmp_path / "rows.jsonl"
    whole = comparison.run(results)
    lines = results.read_text().splitlines()
    assert len(lines) == len(whole)
    results.write_text("\n".join(lines[:4]) + "\n" + lines[4][:-20])  # cut by a crash
    made, run = [], Runner.run
    monkeypatch.setattr(Runner, "run", lambda self: made.append(self) or run(self))
    again = comparison.run(results)
    assert len(made) == len(whole) - 4
    assert [(r.method, r.perplexity) for r in again] == [(r.method, r.perplexity) for r in whole]
    assert comparison.run(results) == again and len(made) == len(whole) - 4
    # Other defaults are other rows.
    monkeypatch.setitem(BEST, 3, PLAIN)
    other = comparison.run(results)
    assert other[3].perplexity == other[4].perplexity == other[2].perplexity != whole[3].perplexity
    monkeypatch.undo()
    monkeypatch.setattr(Runner, "run", lambda self: made.append(self) or run(self))
    made.clear()
    # Another seed is another comparison: nothing of the file counts, and nothing is lost.
    replace(comparison, seed=1, methods=("rtn",), groupsizes=(32,)).run(results)
    assert len(made) == 1
    assert comparison.run(results) == again


def test_rows_that_an_older_version_has_kept(comparison, tmp_path, capfd):
    """Are taken as they are: what they do not know is a dash."""
    results = tmp_path / "rows.jsonl"
    few = replace(comparison, methods=("rtn",), groupsizes=(32, -1))
    rows = few.run(results)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for name in ("rise_error", "divergence", "divergence_error", "agreement", "agreement_error"):
        del lines[1][name]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = few.run(results)
    assert again[1].perplexity == rows[1].perplexity and again[1].divergence is None
    assert again[2] == rows[2]
    compared.show([asdict(row) for row in again])
    told = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert "divergence" in told[0] and "agreement" in told[0]
    assert told[2].count("-") == 2 and f"{rows[2].divergence:.4f}" in told[3]
    capfd.readouterr()
    compared.show([asdict(row) for row in again[:2]])  # nobody knows: no column
    assert "divergence" not in capfd.readouterr().out


def test_a_narrow_terminal_leaves_columns_out(monkeypatch, capfd):
    from rich.console import Console

    rows = [asdict(row) for row in (ROW, replace(ROW, method="gptq", rise=1.0, rise_error=0.5,
            divergence=0.1, divergence_error=0.01, agreement=0.5))]  # fmt: skip
    for width, there, gone in ((130, "seconds", None), (90, "agreement", "seconds")):
        console = Console(force_terminal=True, width=width, highlight=False)
        monkeypatch.setattr(tables, "stdout", console)
        monkeypatch.setattr(compared, "stdout", console)
        compared.show(rows)
        said = capfd.readouterr().out
        assert there in said and "divergence" in said and (gone is None or gone not in said)
        assert all(len(line) <= width for line in re.sub(r"\x1b\[[\d;]*m", "", said).splitlines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("rtn", "awq")}, "the method awq is unknown"),
        ({"wbits": (4, 5)}, "wbits is 5"),
        ({"groupsizes": (32, 48)}, "groupsize 48 does not divide"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_work(comparison, tmp_path, change, message):
    with pytest.raises(SettingError, match=message):
        replace(comparison, **change).run(tmp_path / "rows.jsonl")
    kept = tmp_path / "rows.jsonl"
    assert not kept.exists() or not kept.read_text()


def test_a_calibration_text_that_is_not_there_is_refused_before_any_work(comparison, tmp_path):
    with pytest.raises(DataError):
        replace(comparison, calib=str(tmp_path / "none.txt")).run(tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").read_text()


def test_a_chart_is_an_svg_in_a_folder_that_is_there(tmp_path):
    chart.check(tmp_path / "chart.svg")
    with pytest.raises(SettingError, match=r"chart\.png is not an \.svg"):
        chart.check(tmp_path / "chart.png")
    with pytest.raises(OutputError, match="there is no folder"):
        chart.check(tmp_path / "nowhere" / "chart.svg")


@pytest.mark.parametrize("content", ["not JSON\n", "[1]\n", '{"key": "x"}\n{"other": 1}\n'])
def test_a_file_of_something_else_is_refused(comparison, tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="holds no results"):
        comparison.run(path)
    assert path.read_text() == content


def test_a_place_that_cannot_be_written(comparison, tmp_path):
    for write in (
        lambda path: replace(comparison, methods=("rtn",)).run(path),
        lambda path: chart.write(path, "model", ROWS),
    ):
        with pytest.raises(OutputError, match="cannot be written"):
            write(tmp_path / "nowhere" / "file")


ROW = compare.Row("none", 16, -1, 16.0, 1000, 10.0)
ROWS = [
    asdict(row)
    for row in (
        compare.Row("none", 16, -1, 16.0, 1000, 10.0),
        compare.Row("rtn", 3, 128, 3.2, 200, 14.0, 4.0, 1.0),
        compare.Row("gptq", 3, 128, 3.2, 200, 11.0, 1.0, 2.0),
        compare.Row("gptq", 4, 128, 4.2, 250, 9.9, -0.1, 2.0),
    )
]


def test_the_chart_is_to_scale(tmp_path):
    chart.write(tmp_path / "chart.svg", "a <model> & more", ROWS)
    root = ElementTree.parse(tmp_path / "chart.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    _, rtn, gptq, better = (float(r.get("width")) for r in root.iter(f"{space}rect"))
    assert rtn == 4 * gptq > 0 and better == 0
    words = " ".join(text.text for text in root.iter(f"{space}text"))
    assert "a <model> & more" in words and "+4.000" in words and "-0.100" in words
