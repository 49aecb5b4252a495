"""What the order of the weights is worth: ``python bench/order.py MODEL...``.

OBQ gives each row its own greedy order, GPTQ all rows one: as the columns are, or by falling ``diag
H``. Here all three round the same rows of the same layers on the same grids, which are fitted
beforehand, with the Hessians of the model's own inputs; what is compared is the sum of errors, as a
share of round-to-nearest's. Fewer columns are the first ones of a layer that has more: for each
number that is asked for, of the layer with the fewest. OBQ's time grows as the cube of the columns,
so rows are few, and spread over the layer.

A model is ``demo`` or a folder of ``bench/english.py``, ``bench/smollm2.py`` or ``bench/model.py``
(without text, whose tokens are then random). Appends one record a model and number of columns to
bench/results/order.jsonl.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import append, machine
from quality import label, texts

from optq import GPTQ, OBQ, RTN, ModelConfig, Runner

RESULTS = Path(__file__).parent / "results" / "order.jsonl"
SAMPLES, SEQLEN, GROUPSIZE = 32, 512, 64
STATIC = {"groupsize": GROUPSIZE, "static_groups": True}
ORDERS = {
    "greedy (OBQ)": lambda bits: OBQ(bits, GROUPSIZE),
    "fixed (GPTQ)": lambda bits: GPTQ.plain(bits, **STATIC),
    "act-order (GPTQ)": lambda bits: GPTQ.plain(bits, actorder=True, **STATIC),
}


def sites(model: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hessian and stacked weight of the sites of a model, which stays as it is but for 8 bits."""
    found = []

    @dataclass(frozen=True)
    class Watched(RTN):
        def _solve(self, problem, weight, aim, storage):
            found.append((problem.H.clone(), weight.float()))
            return super()._solve(problem, weight, aim, storage)

    spec = texts(model)[0]
    loaded, _ = ModelConfig(model, "cpu").load()
    if model != "demo" and not Path(spec).is_file():
        torch.manual_seed(0)
        spec = torch.randint(4, loaded.config.vocab_size, (SAMPLES, SEQLEN))
    options = {"calib": spec, "nsamples": SAMPLES, "seqlen": SEQLEN}
    Runner(ModelConfig(model, "cpu"), Watched(8), **options).run()
    return found


def errors(H: torch.Tensor, weight: torch.Tensor, wbits: int) -> dict[str, float]:
    """The error of each order, as a share of round-to-nearest's."""
    shares = {}
    for name, build in ORDERS.items():
        solver = build(wbits)
        solution = solver.solve(solver.problem(H), weight)
        shares[name] = round((solution.error.sum() / solution.rtn_error.sum()).item(), 4)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--columns", default="64,128,256,512,1024,2048")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--wbits", default="4,3,2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for model in arguments.models:
        every = sites(model)
        for columns in map(int, arguments.columns.split(",")):
            wide = [pair for pair in every if len(pair[0]) >= columns]
            if not wide:
                continue
            least = min(len(H) for H, _ in wide)
            own = [pair for pair in wide if len(pair[0]) == least]
            H, weight = own[len(own) // 2]
            rows = torch.linspace(0, len(weight) - 1, arguments.rows).long()
            part = H[:columns, :columns].contiguous(), weight[rows, :columns].contiguous()
            for wbits in map(int, arguments.wbits.split(",")):
                shares = errors(*part, wbits)
                row = {"model": label(model), "columns": columns, "of": least, "wbits": wbits}
                row |= {"rows": arguments.rows, "shares": shares}
                append(arguments.results, row | machine())
                said = "   ".join(f"{name} {share:.3f}" for name, share in shares.items())
                print(f"{label(model)} {columns:5} columns, {wbits} bits: {said}", flush=True)


if __name__ == "__main__":
    main()
