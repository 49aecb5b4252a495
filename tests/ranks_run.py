"""A quantization that several processes share: ``torchrun tests/ranks_run.py SETTINGS.json``."""

import json
import sys
from pathlib import Path

import torch

import optq.quantize
import optq.solving
from optq import GPTQ, RTN, Mixed, ModelConfig, Runner, SmoothQuant


def main():
    torch.set_num_threads(1)
    asked = json.loads(Path(sys.argv[1]).read_text())
    optq.quantize.BATCH_TOKENS, optq.solving.MEMORY = asked["batch"], asked["memory"]
    for name, run in asked["runs"].items():
        methods = {"gptq": GPTQ, "rtn": RTN, "mixed": Mixed, "smoothquant": SmoothQuant}
        quantizer = methods[run.pop("method")](*run.pop("quantizer"))
        model, calib = run.pop("model"), torch.tensor(run.pop("calib"))
        out = Path(asked["out"]) / name
        if out.exists():  # torchrun has started this again
            continue
        result = Runner(ModelConfig(model, "cpu"), quantizer, calib=calib, output=out, **run).run()
        assert result.layers and result.record.layers == result.layers, name


if __name__ == "__main__":
    main()
