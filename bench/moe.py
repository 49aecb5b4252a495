"""Quality on a trained mixture of experts: ``python bench/moe.py MODEL``.

    python bench/english.py qwen3_moe MODEL --steps 80 --threads 2
    python bench/moe.py MODEL --llmcompressor PYTHON --gptqmodel PYTHON
    python bench/moe.py MODEL --rare

The first trains a small Qwen3-MoE in which some experts are rare. The second measures held-out
perplexity as ``bench/quality.py`` does (the same tokens for every way, windows that no choice was
made on), of OPTQ and, if given, of the peers, each under its own Python; a peer that fails is
recorded with its error. What counts is the rise over full precision, as a share of
round-to-nearest's.

``--rare`` looks at the experts with fewer calibration tokens than columns: the error
``tr((W - Q) H (W - Q)^T)`` of their layers on held-out tokens, ``H`` of the inputs that the dense
model's router sends them in the evaluation text, of OPTQ as it is, beside their own tokens alone
and round-to-nearest. Error propagation, which aims at other weights than ``W``, is off there.
With ``--choosing`` it tries how many tokens are enough, on the windows that choices are made on.

Appends to bench/results/moe.jsonl; of the second, what is there already is skipped.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from machine import append, machine
from quality import GROUPSIZE, SAMPLES, SEQLEN, final, label, texts
from quality_peers import VARIANTS, run
from torch import Tensor

import optq
from optq import GPTQ, RTN, ModelConfig, Runner
from optq.core.error import undamped_error
from optq.core.gptq import BEST
from optq.core.hessian import Hessian
from optq.data.calibration import calibration_tokens
from optq.data.evaluation import evaluation_tokens
from optq.evaluate.perplexity import perplexity
from optq.model import flow
from optq.model.blocks import find_blocks
from optq.model.experts import Bank
from optq.model.experts_call import called_through
from optq.model.linear import make_dense

RESULTS = Path(__file__).parent / "results" / "moe.jsonl"
EVERY = 2  # of the final windows
CHOSEN_ON = 328  # the first windows: see ``final`` of bench/quality.py
AS_IT_IS = "as it is"
PEERS = VARIANTS | {"llm-compressor routed": ("llmcompressor", "mse-routed")}
WAYS = {
    "rtn": lambda wbits: (RTN(wbits, GROUPSIZE), False),
    "plain": lambda wbits: (GPTQ.plain(wbits, GROUPSIZE), False),
    "no-qep": lambda wbits: (GPTQ(wbits, GROUPSIZE), False),
    "default": lambda wbits: (GPTQ(wbits, GROUPSIZE), BEST[wbits].qep),
}


class Trial:
    """A model with its texts, and what is done with it for one seed."""

    def __init__(self, model: str) -> None:
        self.name, self.config = label(model), ModelConfig(model, "cpu")
        self.folder = Path(model)
        self.calib, self.text = texts(model)
        self.dense, self.tokenizer = self.config.load()
        self.windows = evaluation_tokens(self.text, self.tokenizer, SEQLEN)

    def tokens(self, seed: int) -> Tensor:
        return calibration_tokens(self.calib, self.tokenizer, SAMPLES, SEQLEN, seed)

    def quantize(self, way: str, wbits: int, seed: int) -> optq.result.Result:
        quantizer, qep = WAYS[way](wbits)
        tokens = self.tokens(seed)[:1] if way == "rtn" else self.tokens(seed)
        return Runner(self.config, quantizer, qep, calib=tokens).run()


def quality(trial: Trial, bits: list[int], seeds: int, pythons: dict[str, str | None]) -> None:
    """One row for each way, number of bits and seed."""
    windows, done = final(trial.windows)[::EVERY], rows("quality", trial.name)
    asked = [("none", 16, 0)]
    for wbits in bits:
        asked += [(way, wbits, seed) for seed in range(seeds) for way in WAYS]
        asked += [(peer, wbits, 0) for peer, (tool, _) in PEERS.items() if pythons.get(tool)]
    for key in asked:
        way, wbits, seed = key
        if key in done or (way == "rtn" and seed):
            continue
        start = time.perf_counter()
        row = dict(zip(("model", "way", "wbits", "seed"), (trial.name, *key), strict=True))
        if way in PEERS:
            row |= peer(trial, way, wbits, seed, windows, pythons)
        else:
            model = trial.dense if way == "none" else trial.quantize(way, wbits, seed).model
            row["perplexity"] = round(perplexity(model, windows).perplexity, 5)
        row["seconds"] = round(time.perf_counter() - start, 1)
        keep("quality", row)
        done[key] = row
    full = done["none", 16, 0]["perplexity"]
    print(f"{trial.name}: full precision {full:.3f}, {len(windows)} windows of {SEQLEN}")
    for wbits in bits:
        for way in [*WAYS, *PEERS]:
            found = [row for (w, b, _), row in done.items() if (w, b) == (way, wbits)]
            rises = [row["perplexity"] - full for row in found if "perplexity" in row]
            rise = statistics.mean(rises) if rises else float("nan")
            share = rise / (done["rtn", wbits, 0]["perplexity"] - full)
            print(f"  {wbits} bits  {way:20} +{rise:9.4f}  {share:.3f} of rtn  {len(rises)} seeds")


def peer(
    trial: Trial, way: str, wbits: int, seed: int, windows: Tensor, pythons: dict[str, str | None]
) -> dict[str, object]:
    """Perplexity of what a peer wrote, loaded by OPTQ; or the error that it, or loading, ended in.

    ``layers`` says how many layers it quantized: some leave experts dense without a word.
    """
    tool, best = PEERS[way]
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ran = run(pythons[tool], tool, best, trial.folder, trial.tokens(seed), wbits, folder)
        if ran.returncode:
            return {"failure": said(ran.stderr)}
        version = json.loads(ran.stdout.splitlines()[-1])["version"]
        try:
            quantized = optq.load(folder / "out", "cpu")
        except optq.errors.OptqError as error:
            return {"version": version, "failure": f"not loaded: {error}".splitlines()[0]}
    layers = sum(isinstance(m, optq.model.linear.QuantizedLinear) for m in quantized.modules())
    make_dense(quantized)
    found = round(perplexity(quantized, windows).perplexity, 5)
    return {"version": version, "layers": layers, "perplexity": found}


def said(stderr: str) -> str:
    """The first line of the error that a Python program ended in."""
    lines = [line for line in stderr.splitlines() if line and not line[0].isspace()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return [*lines[-1:], *errors[-1:]][-1][:300] if lines else "no word"


def rare(trial: Trial, bits: list[int], seeds: int, choosing: bool) -> None:
    """Errors of rare experts' layers on held-out tokens: sums, ratios of sums, median ratios."""
    windows = trial.windows[:CHOSEN_ON] if choosing else trial.windows[CHOSEN_ON:]
    weights, hessians = weights_of(trial.dense), held_out(trial.dense, windows)
    enough = flow.ENOUGH
    ways = {"rtn": ("rtn", enough), "own": ("no-qep", 0), AS_IT_IS: ("no-qep", enough)}
    if choosing:
        ways |= {f"enough {n}": ("no-qep", n) for n in (1, 4, 8)}
    for wbits in bits:
        for seed in range(seeds):
            errors, few = {}, {}
            for name, (way, flow.ENOUGH) in ways.items():
                result = trial.quantize(way, wbits, seed)
                if name == AS_IT_IS:
                    few = {layer.name: layer.tokens for layer in result.layers}
                    few = {e: t for e, t in few.items() if e in weights and t < weights[e].shape[1]}
                solved = weights_of(result.model)
                errors[name] = {
                    layer: undamped_error(
                        (weights[layer].float() - solved[layer].float()).T, H
                    ).sum()
                    for layer, H in hessians.items()
                }
            flow.ENOUGH = enough
            # An expert without a token of its own has nothing but what is blended in.
            layers = [each for each in few if each in hessians and few[each]]
            row = {"model": trial.name, "wbits": wbits, "seed": seed, "choosing": choosing}
            row |= {"layers": len(layers), "of": len(weights), "tokens": sorted(few.values())}
            for name in ways:
                row[name] = {}
                for part in ("all", "gate_up", "down"):
                    some = [x for x in layers if part == "all" or (part == "down") == ("down" in x)]
                    row[name][part] = versus(errors, name, some)
            keep("rare", row)


def versus(errors: dict[str, dict[str, Tensor]], name: str, layers: list[str]) -> dict:
    """A way's error beside rounding's and own tokens': the ratio of the sums and the median one."""
    found: dict[str, object] = {"error": round(sum(errors[name][x].item() for x in layers), 2)}
    for other in ("rtn", "own"):
        ratios = [(errors[name][x] / errors[other][x]).item() for x in layers]
        whole = sum(errors[name][x] for x in layers) / sum(errors[other][x] for x in layers)
        found[other] = {
            "sums": round(whole.item(), 4),
            "median": round(statistics.median(ratios), 4),
        }
    return found


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weight of each expert's layers, by name."""
    banks = [bank for block in find_blocks(model) for bank in block.banks]
    return {layer.name: layer.weight for bank in banks for layer in bank.layers}


@torch.no_grad()
def held_out(model: torch.nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """``H`` of what each expert's layers read, by the name of the layer, if it reads anything."""
    banks = [bank for block in find_blocks(model) for bank in block.banks]
    sums = {own[0].name: Hessian(own[0].shape[1]) for b in banks for own in (*b.inner, *b.down)}

    def experts(bank: Bank, x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        routed = bank.routed(index)
        inside = {e: bank.activations(e, x[tokens]) for e, (_, tokens) in routed.items()}
        for expert, (_, tokens) in routed.items():
            sums[bank.inner[expert][0].name].add(x[tokens])
            sums[bank.down[expert][0].name].add(inside[expert])
        return bank.combine(x, routed, inside, scores)

    with called_through(banks, experts):
        for batch in windows.split(8):
            model(input_ids=batch, use_cache=False)
    groups = [own for bank in banks for own in (*bank.inner, *bank.down)]
    return {
        layer.name: sums[own[0].name].matrix()
        for own in groups
        if sums[own[0].name].tokens
        for layer in own
    }


def rows(what: str, model: str) -> dict[tuple[str, int, int], dict]:
    """The rows of a kind that are kept already."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = [row for row in map(json.loads, lines) if row["what"] == what and row["model"] == model]
    return {(row["way"], row["wbits"], row["seed"]): row for row in kept}


def keep(what: str, row: dict[str, object]) -> None:
    print(row, flush=True)
    append(RESULTS, {"what": what, **row, **machine()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder of bench/english.py")
    parser.add_argument("--wbits", default="4,3,2")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--llmcompressor", help="its Python")
    parser.add_argument("--gptqmodel", help="its Python")
    parser.add_argument("--rare", action="store_true", help="errors of rare experts' layers")
    parser.add_argument("--choosing", action="store_true", help="how many tokens are enough")
    arguments = parser.parse_args()
    trial, bits = Trial(arguments.model), list(map(int, arguments.wbits.split(",")))
    if arguments.rare:
        rare(trial, bits, arguments.seeds, arguments.choosing)
        return
    pythons = {tool: getattr(arguments, tool) for tool, _ in PEERS.values()}
    quality(trial, bits, arguments.seeds, pythons)


if __name__ == "__main__":
    main()
