"""The bundled model's text: held-out modules stay out of training, and missing source is said."""

import subprocess
import sys
from pathlib import Path

import pytest

from optq.demo import corpus
from optq.errors import DataError

HELD_OUT = corpus.CALIBRATION_MODULES + corpus.EVALUATION_MODULES


def test_the_held_out_lists_are_disjoint():
    assert len(set(HELD_OUT)) == len(HELD_OUT)


@pytest.fixture(scope="module")
def training_files() -> list[Path]:
    return corpus.training_files()


def test_held_out_modules_and_their_tests_are_not_trained_on(training_files):
    folder = corpus.stdlib_folder()
    trained = {path.relative_to(folder).as_posix() for path in training_files}
    for module in HELD_OUT:
        assert f"{module}.py" not in trained
        assert f"test/test_{module}.py" not in trained


def test_training_files_are_the_library_without_tables_and_packages(training_files):
    folder = corpus.stdlib_folder()
    trained = [path.relative_to(folder).as_posix() for path in training_files]
    assert {"dataclasses.py", "email/message.py", "json/decoder.py"} <= set(trained)
    assert not [name for name in trained if "site-packages" in name or "encodings/" in name]
    assert "pydoc_data/topics.py" not in trained
    contents = [path.read_bytes() for path in training_files]
    assert len(set(contents)) == len(contents)
    assert training_files == sorted(training_files)


def test_texts_are_long_enough_for_their_use():
    # At most 5 characters a token: 64 windows of 512 to calibrate, 40,000 tokens to evaluate.
    assert len(corpus.calibration_text()) > 64 * 512 * 5
    assert len(corpus.evaluation_text()) > 40_000 * 5
    assert corpus.calibration_text() != corpus.evaluation_text()


def test_missing_source_is_a_data_error(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "stdlib_folder", lambda: tmp_path)
    with pytest.raises(DataError) as caught:
        corpus.evaluation_text()
    assert "argparse.py" in caught.value.cause
    assert caught.value.remedy


def test_the_corpus_needs_no_torch():
    program = "import sys, optq.demo.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
