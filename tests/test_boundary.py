"""What libraries raise: turned into two lines with the cause kept, and what must pass."""

import json
import os
import subprocess
import sys

import pytest
import torch

from optq.boundary import first_line, library, short
from optq.errors import DataError, ModelError


def turned(error, **options):
    with (
        pytest.raises(ModelError) as caught,
        library(ModelError, "it failed", "mend it", **options),
    ):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("no such kind at line 1"), "no such kind at line 1"),
        (KeyError("content"), "KeyError: 'content'"),
        (TypeError(""), "TypeError"),
        (ValueError("\n one thing\n\nand another"), "one thing"),
        (RuntimeError("two reasons:\n the first"), "two reasons: the first"),
        (ValueError("x " * 500), "x " * 98 + "x.."),
    ],
)
def test_any_error_becomes_two_lines(error, said):
    refusal = turned(error)
    assert (refusal.cause, refusal.remedy) == (f"it failed: {said}", "mend it")


def test_the_remedy_may_depend_on_the_error():
    error = ImportError("no tiktoken here")
    with pytest.raises(ModelError) as caught, library(ModelError, "x", lambda e: f"mind {e}"):
        raise error
    assert caught.value.remedy == "mind no tiktoken here"


OURS = ZeroDivisionError("a defect")


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("out"), DataError("a", "b"),
        GeneratorExit(), OURS,
    ],
    ids=repr,
)  # fmt: skip
def test_what_passes(error):
    with pytest.raises(type(error)) as caught, library(ModelError, "x", "y", [OURS]):
        raise error
    assert caught.value is error


def test_a_quotation_is_short():
    assert short("a" * 60) == "a" * 60
    assert short("a" * 61) == "a" * 58 + ".."
    assert len(first_line(ValueError("x " * 1000))) <= 200


def test_files_are_utf_8_whatever_the_locale_says(tmp_path):
    """As on Windows, where the default is another."""
    (tmp_path / "config.json").write_text('{"of": "Köln"}', encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    rows = tmp_path / "rows.jsonl"
    row = {"key": "ö", "method": "rtn", "wbits": 4, "groupsize": 32, "bits_per_weight": 4}
    row |= {"bytes": 1, "perplexity": 1.0}
    rows.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    program = (
        "import sys, locale; from pathlib import Path; from optq.compare import Rows\n"
        "from optq.model.checkpoint import Checkpoint\n"
        "assert locale.getpreferredencoding(False) != 'UTF-8'\n"
        "said = Checkpoint(Path(sys.argv[1]), {}, {}).config()['of']\n"
        "print(ascii([said, *Rows(Path(sys.argv[1], 'rows.jsonl')).rows]))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, env=os.environ | plain, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == ascii(["Köln", "ö"])
