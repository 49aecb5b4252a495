"""`optq report` on folders that real runs and other tools wrote, and what it refuses."""

import json
import shutil
import sys
from html import unescape
from pathlib import Path

import pytest
import records
import zoo

from optq import GPTQ, RTN, ModelConfig, Runner, cli, compare
from optq.cli.report import DemoReport
from optq.findings import FILE as FOUND
from optq.formats.describe import weights
from optq.record import FILE, TIMES

FIXTURES = Path(__file__).parents[1] / "fixtures"
BY_NAME = {row.name: row for row in zoo.ROWS}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return zoo.save(BY_NAME["llama"], tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    calib = zoo.token_ids(12, 48)
    Runner(ModelConfig(str(dense), "cpu"), GPTQ(4, 32), True, calib=calib, output=out).run()
    return out


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def report(monkeypatch, capfd):
    def run(*words):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["optq", "report", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capfd.readouterr()

    return run


def said(path):
    """The page without what charts need."""
    text = path.read_text()
    return " ".join(unescape(text[: text.find("<script>")]).split())


def test_a_report_of_a_run(report, folder, dense):
    code, out, err = report(folder, "--against", dense)
    assert code == 0 and err == ""
    page = folder / "optq_report.html"
    assert out.splitlines()[0].startswith(f"wrote {page} ") or f"{page}  (" in out
    assert out.splitlines()[-1] == f"next: optq eval {folder} --against {dense}"
    text, record = said(page), json.loads((folder / FILE).read_text())
    worst = max(record["layers"], key=lambda layer: layer["relative_error"])
    assert f'title="{worst["name"]}"' in text
    assert f"{record['bits_per_weight']:.2f} bits a weight" in text
    assert f"read from {dense}" in text and "error behind the last block" in text
    assert "Factorizing the Hessians took" in text and "takes 4 and 8 bits, symmetric" in text
    assert report(folder)[0] == 0  # over the report that is there


def test_sizes_before_are_those_of_the_dense_model(made, dense):
    """Reckoned from shapes, and read."""
    checkpoint, plain = ModelConfig(str(made)).checkpoint(), ModelConfig(str(dense)).checkpoint()
    count, before = weights(checkpoint)
    record = json.loads((made / FILE).read_text())
    assert count == sum(layer["rows"] * layer["cols"] for layer in record["layers"])
    assert before == sum(tensor.nbytes for tensor in plain.layout.values())


def test_what_was_evaluated_is_in_it(report, folder):
    (folder / FOUND).write_text(records.FINDINGS.text())
    code, out, _ = report(folder)
    assert code == 0 and out.splitlines()[-1] == f"next: optq generate {folder} PROMPT"
    text = said(folder / "optq_report.html")
    assert "+2.39%" in text and "it repeats itself" in text and "1.0239 ± 0.0017" in text


@pytest.mark.parametrize(
    ("name", "bits"), [("gptqmodel/gptq_4bit", 4), ("llmcompressor/w4a16_g32", 4)]
)
def test_other_tools_left_no_record(report, tmp_path, name, bits):
    folder = shutil.copytree(FIXTURES / name, tmp_path / "theirs")
    out = tmp_path / "page.html"
    assert report(folder, "--out", out)[0] == 0
    text = said(out)
    assert "there is no record of the run" in text and f"{bits} bits" in text
    assert "bits a weight" in text and "vLLM" in text and "Error by layer" not in text


def test_a_method_that_is_not_read(report, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in (FILE, TIMES, "quantize_config.json"):
        (folder / name).unlink(missing_ok=True)
    code, out, _ = report(folder)
    assert code == 0
    text = said(folder / "optq_report.html")
    assert "awq; there is no record of the run" in text and "unknown" in text
    assert "cannot measure it: the model is quantized with awq." in text
    assert "optq eval" not in text and "<dd>awq</dd>" in text
    assert out.splitlines()[-1] == f"next: open {folder / 'optq_report.html'} in a browser"


def test_beside_each_other(report, folder, dense, tmp_path):
    other = tmp_path / "rounded"
    calib = zoo.token_ids(2, 48)
    Runner(ModelConfig(str(dense), "cpu"), RTN(3, 32), calib=calib, output=other).run()
    assert report(folder, "--with", other)[0] == 0
    text = said(folder / "optq_report.html")
    assert "Side by side" in text and "error of rounded, over this one's" in text
    assert "rounded (samples 2, not 12, error propagation)" in text
    assert "Gain over round-to-nearest" in text
    assert report(other, "--with", folder)[0] == 0
    text = said(other / "optq_report.html")
    assert "Gain over round-to-nearest" not in text and "of round-to-nearest's error" not in text


def damaged(folder, name, text):
    (folder / name).write_text(text)
    return [folder]


def taken(folder):
    (folder / "mine.html").write_text("mine")
    return [folder, "--out", folder / "mine.html"]


def newer(folder):
    return damaged(folder, FILE, '{"version": 3}')


@pytest.mark.parametrize(
    ("words", "cause", "remedy"),
    [
        (lambda folder: damaged(folder, FILE, "{"), "optq.json is damaged", "delete it"),
        (lambda folder: damaged(folder, TIMES, "[]"), "optq_times.json is damaged", "delete it"),
        (lambda folder: damaged(folder, FOUND, "{}"), "optq_eval.json is damaged", "delete it"),
        (newer, "is of version 3, newer than this OPTQ", "update OPTQ"),
        (taken, "mine.html exists and is no report", "--force"),
        (lambda folder: [folder, "--out", folder / "no" / "a.html"], "there is no folder", "make"),
        (lambda folder: ["demo"], "is neither quantized nor pruned", "optq prune wrote"),
        (lambda folder: [folder, "--against", folder], "is quantized already", "plain model"),
        (lambda folder: [folder, "--against", "demo"], "demo is not the model that", "name that"),
        (lambda folder: [folder, "--with", folder], "a checkpoint is named twice", "once"),
        (lambda folder: [folder, "--with", f"{folder}/."], "a checkpoint is named twice", "once"),
        (
            lambda folder: [folder, "--with", FIXTURES / "gptqmodel" / "gptq_8bit_qwen2"],
            "are of different models",
            "of one model",
        ),
    ],
)
def test_what_is_refused(report, folder, monkeypatch, tmp_path, words, cause, remedy):
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob("*"))
    code, out, err = report(*words(folder))
    assert code == 2 and out == "" and len(err.splitlines()) == 2
    assert cause in err.splitlines()[0] and remedy in err.splitlines()[1]
    assert {path.name for path in {*folder.rglob("*")} - {*before}} <= {"mine.html", FOUND}
    assert not (tmp_path / "optq_report.html").exists()


def test_a_file_of_ones_own_is_replaced_by_force(report, folder):
    words = taken(folder)
    assert report(*words, "--force")[0] == 0
    assert "OPTQ" in words[-1].read_text()


def test_it_opens_in_the_browser(report, folder, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert report(folder, "--open")[0] == 0
    assert opened == [(folder / "optq_report.html").resolve().as_uri()]


def test_the_demo_leaves_a_report(monkeypatch, tmp_path, capfd):
    """Of its rows of GPTQ; where the folder takes none it says so, and the table is there."""
    everything, all_rows = compare.evaluation_tokens, compare.Comparison
    monkeypatch.setattr(compare, "DEMO_SAMPLES", 4)
    monkeypatch.setattr(compare, "DEMO_SEQLEN", 64)
    monkeypatch.setattr(compare, "evaluation_tokens", lambda *args: everything(*args)[:2])
    few = {"methods": ("gptq",), "wbits": (4, 2)}
    monkeypatch.setattr(compare, "Comparison", lambda *args, **all: all_rows(*args, **all | few))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["optq", "demo", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capfd.readouterr().out
    assert end.value.code == 0 and out.count("GPTQ") == 2
    assert out.splitlines()[-1].startswith("next: open optq_demo.html in a browser")
    text = said(tmp_path / DemoReport.FILE)
    assert "demo at 4 bits" in text and "demo at 2 bits" in text
    assert "on demo, windows of 64; full precision" in text and "To measure it" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["optq_demo.html"]
    few |= {"wbits": (4,)}
    DemoReport.FILE.write_text("mine")
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capfd.readouterr()
    assert end.value.code == 0 and out.splitlines()[-1].startswith("next: optq quantize")
    assert "no report: optq_demo.html exists and is no report" in err
    assert DemoReport.FILE.read_text() == "mine"
