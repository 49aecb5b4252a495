"""What is seen of a run under way: a bar on a terminal, a line for each block elsewhere."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from optq.record import TunedBlock
from optq.report import live, progress


def layer(error, relative, rounding):
    return SimpleNamespace(error=error, relative_error=relative, rtn_error=rounding)


def site(block, name, *layers, tuned=None, blocks=4):
    return SimpleNamespace(
        block=block, blocks=blocks, site=f"model.layers.{block}.{name}", layers=layers, tuned=tuned
    )


@pytest.fixture
def run():
    """A run whose clock stands until it is moved; ``bar`` and ``said`` are what it told."""
    now, bar, said = [100.0], [], []
    told = live.Live(lambda *each: bar.append(each), said.append, lambda: now[0])

    def solved(seconds, step):
        now[0] += seconds
        told.solved(step)

    return SimpleNamespace(live=told, solved=solved, bar=bar, said=said, now=now)


def test_a_line_for_each_block(run):
    run.solved(10, site(0, "q_proj", layer(1, 0.01, 2), layer(1, 0.02, 4)))
    run.solved(20, site(0, "down_proj", layer(1, 0.01, 6)))
    assert run.said == []
    run.solved(3, site(1, "q_proj", layer(2, 0.02, 2)))
    assert run.said == ["block 1 of 4: relative error 1.2% (rounding 4.8%), 30 s, about 2 min left"]
    run.solved(7, site(1, "down_proj", layer(2, 0.02, 2)))
    run.solved(1, site(2, "q_proj", layer(0, 0.0, 0)))
    # The first block is not counted: what comes before it is in its time.
    assert run.said[1:] == ["block 2 of 4: relative error 2%, 10 s, about 20 s left"]
    run.solved(1, site(3, "q_proj", layer(1, 0.5, 1)))
    run.live.end()
    run.live.end()
    assert run.said[2:] == [
        "block 3 of 4: relative error 0%, 1 s, about 6 s left",
        "block 4 of 4: relative error 50%, 1 s",
    ]


def test_the_bar_has_site_error_so_far_and_time_left(run):
    run.now[0] += 9  # of imports, which are no part of the first block
    run.live.begin()
    assert run.bar == [(0, 1, "starting"), (0, 1, "reading model and text")]
    run.live.reading(3, 128)
    run.solved(30, site(0, "self_attn.q_proj", layer(1, 0.01, 2)))
    run.solved(5, site(1, "self_attn.q_proj", layer(3, 0.03, 6)))
    assert run.bar[2:] == [
        (0, 1, "reading text: 3 of 128"),
        (0, 4, "block 1 of 4, self_attn.q_proj: error so far 1% (rounding 2%)"),
        (1, 4, "block 2 of 4, self_attn.q_proj: error so far 2% (rounding 4%), about 2 min left"),
    ]


def test_a_run_that_goes_on_counts_its_own_blocks_alone(run):
    run.solved(8, site(2, "q_proj", layer(1, 0.01, 1)))
    run.solved(5, site(3, "q_proj", layer(1, 0.01, 1)))
    run.live.end()
    assert run.said == [
        "block 3 of 4: relative error 1%, 8 s, about 8 s left",
        "block 4 of 4: relative error 1%, 5 s",
    ]


def test_what_comes_before_the_first_block_is_not_in_its_time(run):
    for _ in range(2):
        run.solved(50, site(0, "q_proj"))  # a budget's widths are tried
    run.now[0] += 50
    run.live.reading(128, 128)
    run.solved(5, site(0, "q_proj", layer(1, 0.01, 1), blocks=1))
    run.live.end()
    assert run.said == ["block 1 of 1: relative error 1%, 5 s"]


def test_blocks_and_scales_that_are_tuned(run):
    gained = TunedBlock(block="0", steps=9, before=2.0, after=1.0, moved=0.1, kept=True, note="")
    run.solved(4, site(0, "q_proj", layer(1, 0.01, 1), blocks=1))
    run.solved(4, site(0, "", layer(1, 0.01, 1), tuned=gained, blocks=1))
    assert run.bar[-1][2] == "block 1 of 1, tuned: error 50% of what it was"
    run.live.tuning(10, 400, 0.0123)
    assert run.said == [
        "block 1 of 1: relative error 1%, tuned: error 50% of what it was, 8 s",
        "tuning, step 10 of 400: divergence 0.0123",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_two_lines_and_keeps_none(width, monkeypatch, capsys):
    file, how = io.StringIO(), {"force_terminal": True, "_environ": {"TERM": "xterm"}}
    console = Console(file=file, width=width, color_system=None, **how)
    monkeypatch.setattr(progress, "stderr", console)
    with live.quantizing() as told:
        told.solved(site(0, "self_attn.q_proj" * 9, layer(1, 0.01, 2)))
    seen = file.getvalue()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen))
    assert any("quantizing" in line and "0/4" in line for line in lines)
    assert any(line.startswith("block 1 of 4, self_attn") for line in lines)
    assert all(len(line) <= width for line in lines)
    assert seen.endswith("\x1b[2K")  # the last line is gone
    done = capsys.readouterr()
    assert (done.out, done.err) == ("", "")


def test_elsewhere_a_stream_has_the_lines_alone(capsys):
    with live.quantizing() as told:
        told.solved(site(0, "q_proj", layer(1, 0.01, 2), blocks=1))
    done = capsys.readouterr()
    assert done.err == "block 1 of 1: relative error 1% (rounding 2%), 0 s\n" and done.out == ""
    with live.quantizing(shown=False) as told:  # another process of the run
        told.solved(site(0, "q_proj", layer(1, 0.01, 2), blocks=1))
    assert capsys.readouterr().err == ""


def test_a_run_that_ends_early_does_not_call_its_block_done(capsys):
    with pytest.raises(KeyboardInterrupt), live.quantizing() as told:
        told.solved(site(0, "q_proj", layer(1, 0.01, 2)))
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""
