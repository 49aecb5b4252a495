"""Quantize the benchmark's model with AutoRound, under AutoRound's own Python.

Its settings are its defaults, 200 steps a block among them (``--iters``), on all the tokens given;
it compiles nothing, and packs while saving.
"""

import torch
from auto_round import AutoRound, __version__
from measure import Measurement, arguments
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

args = arguments()
tokens = torch.load(args.tokens)
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]

measurement = Measurement(args.model)
with measurement.seconds("load"):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    autoround = AutoRound(
        model,
        tokenizer,
        bits=args.wbits,
        group_size=args.groupsize,
        sym=True,
        iters=args.iters,
        dataset=DataLoader(rows, batch_size=8),
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
with measurement.seconds("quantize"):
    autoround.quantize()
measurement.peak()
with measurement.seconds("save"):
    autoround.save_quantized(str(args.out), format="auto_gptq")
measurement.print("AutoRound", __version__, torch.__version__)
