"""Load a `gptq` checkpoint with transformers, optimum and gptqmodel, and compare every weight.

Run by the python of an environment that has these three, in the repository root:

    python bench/peers/transformers_check.py OUT

The expected weights come from the independent decoder in `tests/`. Prints what transformers
reports of missing or unexpected tensors, and how many layers are equal once both sides are rounded
to bfloat16. Exit status 1 if any is not, or if a tensor is missing or left over.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import decoder

model, report = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], device_map="cpu", dtype=torch.float32, output_loading_info=True
)
problems = {kind: keys for kind, keys in report.items() if keys}
expected = decoder.decode(Path(sys.argv[1]))
equal = sum(
    torch.equal(
        model.get_submodule(name).dequantize_weight().T.bfloat16(),
        torch.from_numpy(weight).bfloat16(),
    )
    for name, weight in expected.items()
)
print(f"loading: {problems or 'clean'}; {equal} of {len(expected)} layers equal")
sys.exit(bool(problems) or equal != len(expected))
