"""Quantize the benchmark's model with GPTQModel, under GPTQModel's own Python.

Act-order is off in both its forms, as for every tool. Finished layers stay in memory instead of
going to disk, and the calibration batch is 8 sequences: the fastest of what its options offer.
``--best`` turns on what it has for quality: its range search with group-aware order (``group``) or
with act-order (``act``).
"""

import os

# Read when GPTQModel is imported. Its default leaves too few workers on a small machine.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count()))

import torch
from gptqmodel import GPTQModel, QuantizeConfig, __version__
from measure import Measurement, arguments

args = arguments()
tokens = torch.load(args.tokens)
calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]

measurement = Measurement(args.model)
with measurement.seconds("load"):
    model = GPTQModel.load(
        str(args.model),
        QuantizeConfig(
            bits=args.wbits,
            group_size=args.groupsize,
            sym=True,
            desc_act=args.best == "act",
            act_group_aware=args.best == "group",
            mse=2.4 if args.best else 0.0,
            offload_to_disk=False,
            device="cpu",
        ),
    )
with measurement.seconds("quantize"):
    model.quantize(calibration, batch_size=8)
measurement.peak()
with measurement.seconds("save"):
    model.save(str(args.out))
measurement.print("GPTQModel", __version__, torch.__version__)
