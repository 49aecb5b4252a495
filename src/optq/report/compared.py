"""The table of `optq compare` and `optq demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optq.report.tables import BARS, bar, columns, plus, size, stdout, write

TITLES = {
    "none": "full precision",
    "rtn": "round to nearest",
    "plain": "GPTQ, plain",
    "no-qep": "GPTQ, no QEP",
    "gptq": "GPTQ",
    "best": "GPTQ, tuned",
    "budget": "GPTQ, within a budget",
    "w8a8": "GPTQ, activations too",
    "smoothquant": "SmoothQuant",
    "llm-int8": "LLM.int8()",
}


def _title(method: str) -> str:
    pruned = method.removeprefix("prune-")
    return TITLES[method] if pruned == method else f"SparseGPT, {pruned}"


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Methods side by side; bars compare the rises at the same bits and groups.

    Divergence and agreement have columns where any row knows them.
    """
    groups = len({row["groupsize"] for row in rows[1:]}) > 1
    sparse = any(row.get("sparsity") is not None for row in rows)
    names = ("bits", *(("groups",) if groups else ()), "method", "bits/weight", "layers")
    names += ("zeros",) if sparse else ()
    fast = ("tokens/s",) if any(row.get("tokens_per_second") for row in rows) else ()
    left = (1 + groups, 7 + groups + sparse + len(fast))  # the method and the bar
    far = ("divergence", "agreement") if any(map(_is_far, rows)) else ()
    left = (*left[:1], left[1] + len(far))
    table = columns(*names, "perplexity", "rise", *far, *fast, "seconds", BARS, left=left)
    for row in rows:
        same = [r for r in rows if (r["wbits"], r["groupsize"]) == (row["wbits"], row["groupsize"])]
        plain = row["method"] == "none"
        groupsize = "row" if row["groupsize"] == -1 else str(row["groupsize"])
        table.add_row(
            str(row["wbits"]) + (f"/{row['abits']}" if row.get("abits") else ""),
            *((("" if plain else groupsize),) if groups else ()),
            _title(row["method"]),
            f"{row['bits_per_weight']:.2f}",
            size(row["bytes"]),
            *((_share(row.get("sparsity")),) if sparse else ()),
            f"{row['perplexity']:.2f}",
            "" if plain else plus(row["rise"], row.get("rise_error"), "+.2f"),
            *(_far(row) if far and not plain else [""] * len(far)),
            *((_rate(row.get("tokens_per_second")),) if fast else ()),
            "" if plain else f"{row['seconds']:.1f}",
            bar(
                max(row["rise"], 0),
                max(r["rise"] for r in same) or 1.0,
                color="red" if row["method"] == "rtn" else "cyan",
            ),
            end_section=row is same[-1],
        )
    write(table, ("seconds", "layers", "agreement"))
    if any(row.get("abits") for row in rows):
        stdout.print("bits 8/8: of weights, and of the activations that meet them")
    if far:
        stdout.print("divergence: KL(full precision || quantized), nats a token")
        stdout.print("agreement: tokens where both find the same next one likeliest")
    if any(row.get("rise_error") for row in rows):
        stdout.print("±: standard error over the windows, which all models read; the rise's is the")
        stdout.print("ratio of perplexities', times full precision's perplexity")


def _share(sparsity: float | None) -> str:
    return "" if sparsity is None else f"{sparsity:.0%}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1f}"


def _is_far(row: Mapping[str, Any]) -> bool:
    return row.get("divergence") is not None


def _far(row: Mapping[str, Any]) -> list[str]:
    if not _is_far(row):  # a row that an older version has kept
        return ["-", "-"]
    return [plus(row["divergence"], row["divergence_error"]), f"{row['agreement']:.1%}"]
