"""Checkpoints that were never made: what a report is told of them, at any size."""

import math
import random

from optq.findings import Against, Completed, Findings, OnText
from optq.record import BlockRecord, LayerRecord, RunRecord, SiteRecord, Times
from optq.report.page.known import Known

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
CONFIG = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_experts": 128}
LOADS = [
    {"tool": "transformers", "loads": True, "why": "reads it with the package compressed-tensors"},
    {"tool": "vLLM", "loads": True, "why": "takes 4 and 8 bits, symmetric, from gptq"},
    {"tool": "SGLang", "loads": None, "why": "was not tried with this"},
    {"tool": "llama.cpp", "loads": False, "why": "`optq export .. --format gguf` has no blocks"},
]


def layer(name: str, block: str, site: str, at: float, **more: object) -> LayerRecord:
    """``at``: the relative error."""
    counts = [round(1e6 * math.exp(-((code - 7.5) ** 2) / 20)) for code in range(16)]
    told = {"rows": 768, "cols": 2048, "wbits": 4, "error": 700 * at, "relative_error": at}
    told |= {"rtn_error": 700 * at / random.uniform(0.2, 0.7), "damp": 0.01 * at}
    told |= {"tokens": random.randint(1000, 9000), "histogram": counts, "at_ends": 0.01 + at}
    told |= {"scale_min": -0.01 * random.random(), "scale_max": 0.01 * random.random()}
    return LayerRecord(name=name, block=block, site=site, **(told | more))


def record(blocks: int = 48, experts: int = 128, seed: int = 0) -> RunRecord:
    """A mixture of experts: 4 + 3 x experts layers to a block."""
    random.seed(seed)
    layers, sites = [], []

    def site(names: list[str], block: str, at: float, **more: object) -> None:
        diagonal = [math.exp(random.gauss(1 - i / 8, 0.3)) for i in range(32)]
        sites.append(SiteRecord(site=names[0], layers=names, diagonal=diagonal))
        layers.extend(
            layer(name, block, names[0], at * random.uniform(0.8, 1.25), **more) for name in names
        )

    for index in range(blocks):
        block, at = f"model.layers.{index}", 0.004 * (1 + index / blocks)
        site([f"{block}.self_attn.{name}" for name in ATTENTION[:3]], block, at)
        site([f"{block}.self_attn.o_proj"], block, 2 * at)
        for expert in range(experts):
            place, few = f"{block}.mlp.experts.{expert}", expert == experts - 1
            more = {"borrowed": 500, "tokens": 12} if few else {}
            at_expert = at * math.exp(random.gauss(0.5, 0.4))
            site([f"{place}.gate_proj", f"{place}.up_proj"], block, at_expert, **more)
            site([f"{place}.down_proj"], block, 2 * at_expert, **more)
    return RunRecord(
        optq="0.1.0",
        method="gptq",
        quantizer={"wbits": 4, "groupsize": 128, "sym": True},
        qep={"alpha": 0.5},
        calibration={"text": "c4", "samples": 128, "seqlen": 2048, "seed": 0, "chat": False},
        bits_per_weight=4.25,
        bytes=17_000_000_000,
        dense=[],
        layers=layers,
        sites=sites,
        blocks=[
            BlockRecord(block=f"model.layers.{i}", error=0.001 * 1.06**i) for i in range(blocks)
        ],
    )


TIMES = Times(
    optq="0.1.0",
    model="Qwen/Qwen3-30B-A3B",
    calib="c4",
    device="cuda:0",
    threads=2,
    seconds={"total": 1000.0, "forward": 400.0, "hessian": 150.0, "factor": 20.0, "solve": 250.0},
    layers={},
)
FINDINGS = Findings(
    optq="0.1.0",
    model="moe-4bit",
    texts=[
        OnText(
            text="wikitext2",
            seqlen=2048,
            tokens=245_000,
            perplexity=8.912,
            losses=[2.1, 2.2],
            against=Against(
                dense="Qwen/Qwen3-30B-A3B",
                perplexity=8.704,
                divergence=0.0312,
                divergence_99_9=1.42,
                agreement=0.934,
                ratio=1.0239,
                ratio_error=0.0017,
            ),
        )
    ],
    tasks={"piqa": {"acc": 0.79, "acc_norm": None}},
    completions=[
        Completed(
            prompt="def parse(text):\n",
            tokens=["    return", " text", ".", "split", "()"],
            dense=["    return", " text", ".", "strip", "()"],
            differs=3,
        ),
        Completed(
            prompt="The <b>capital</b> of France",
            tokens=[" is", " is", " is"],
            dense=[" is", " Paris", "."],
            differs=1,
            fault="it repeats itself",
        ),
    ],
)


def known(
    place: str = "moe-4bit", made: RunRecord | None = None, findings: Findings | None = FINDINGS
) -> Known:
    """A checkpoint of which all is known; ``made`` is a small one by default."""
    made = record(3, 4) if made is None else made
    what = {"loads": LOADS, "architecture": "Qwen3MoeForCausalLM", "format": "gptq", "bits": 4}
    what |= {"bytes": 17_900_000_000, "quantized_bytes": made.bytes}
    what |= {"quantized_layers": len(made.layers)}
    numbers = {"before": 61_000_000_000, "weights": 32_000_000_000}
    return Known(place, CONFIG, what, **numbers, record=made, times=TIMES, findings=findings)
