"""Quantize the benchmark's model with llm-compressor, under llm-compressor's own Python.

Settings are those of its GPTQ example. Act-order is off, as for every tool. Its default calibration
batch of one sequence stays: of 1, 2 and 8 it took the least processor time and memory. ``--best
mse`` turns on what it has for quality: its range search and act-order. By default it shows every
expert all tokens; ``--best mse-routed`` is the same with the tokens that are routed to each.
``--best sparsegpt-0.5`` or ``sparsegpt-2:4`` prunes instead, with its SparseGPT.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import __version__, oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from measure import Measurement, arguments
from transformers import AutoModelForCausalLM

args = arguments()
tokens = torch.load(args.tokens)
dataset = Dataset.from_dict({"input_ids": tokens.tolist()})

weights = QuantizationArgs(
    num_bits=args.wbits,
    group_size=args.groupsize,
    strategy="group",
    symmetric=True,
    observer="mse" if args.best else "minmax",
    actorder="static" if args.best else None,
)
groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
if not args.best:
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], actorder=None)
if args.best and args.best.startswith("sparsegpt-"):
    sparsity = args.best.removeprefix("sparsegpt-")
    kept, colon, of = sparsity.partition(":")
    recipe = SparseGPTModifier(
        sparsity=1 - int(kept) / int(of) if colon else float(sparsity),
        mask_structure=sparsity if colon else "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )

measurement = Measurement(args.model)
with measurement.seconds("load"):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
with measurement.seconds("quantize"):
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
        moe_calibrate_all_experts=args.best != "mse-routed",
    )
measurement.peak()
with measurement.seconds("save"):
    model.save_pretrained(args.out, save_compressed=True)
measurement.print("llm-compressor", __version__, torch.__version__)
