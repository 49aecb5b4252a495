"""Run an exported file in llama.cpp, and compare with OPTQ's own reading of the checkpoint.

Run in the repository root by OPTQ's python; PYTHON is that of an environment with numpy, gguf and
llama-cpp-python, which this script starts a second time for llama.cpp's part:

    python bench/peers/llama_cpp.py CHECKPOINT FILE.gguf --llama PYTHON

Compared are the tokens of some texts, the logits at every position of one, and a greedy
continuation. llama.cpp rounds the activations of quantized layers to 8 bits, block by block. So the
logits are compared twice: of the file as it is, and of a copy whose blocks are dequantized to
float32, where nothing but the order of sums differs. That copy must agree; exit status 1 if it
does not, or if a text gives other tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TEXTS = [
    "def parse(path):\n    with open(path) as file:\n        return json.load(file)\n",
    "for number in range(12345678):\n\tprint(f'{number:>10}')   # it's 3.14 or 1e-5\n\n\n",
    " leading and  double   spaces, trailing too  ",
    "naïve café, Ωμέγα, 漢字 かな, emoji 🙂👍🏽, e\u0301, \u00a0 and \u2028 in one line",
    "I'VE got WE'LL and they're; snake_case camelCase 100% $5.00 (a+b)*c != d[0]",
    "\r\n windows\r\nlines\r\n",
    "a",
]
PROMPT = '''import os
import json


class Reader:
    """Read a file line by line."""

    def __init__(self, path):
        self.path = path
        self.lines = []

    def read(self):
        with open(self.path) as file:
            for line in file:
                self.lines.append(line.strip())
        return self.lines

    def __len__(self):
        return len('''
NEW_TOKENS = 48
LARGEST = 1e-4  # difference of the copy's logits, as a fraction of their standard deviation
MOVED = 1e-2  # the same where fp16 moved minima (Q4_1)


def ours(folder: Path, file: Path) -> None:
    """Tokens, logits and continuation of the checkpoint in transformers, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from optq.formats.reader import quantized_layers, read_layer
    from optq.model.checkpoint import Checkpoint
    from optq.model.experts import Bank, is_bank
    from optq.model.names import disk_names
    from optq.model.source import load_tokenizer

    checkpoint = Checkpoint.open(str(folder))
    tokenizer, config = load_tokenizer(checkpoint), AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    banks = [Bank(name, module) for name, module in model.named_modules() if is_bank(module)]
    places = {f"{layer.name}.weight": layer for bank in banks for layer in bank.layers}
    places |= {n: each for n, each in model.state_dict().items() if not n.endswith("_proj")}
    packed = {f"{name}.weight": name for name in quantized_layers(checkpoint)}
    missing = {*places}
    for name, on_disk in disk_names(model, [*checkpoint.files, *packed]).items():
        if on_disk in packed:
            tensor = read_layer(checkpoint, packed[on_disk]).weight
        else:
            ((_, tensor),) = checkpoint.tensors([on_disk])
        missing.discard(name)
        place = places[name]
        (place.copy_ if isinstance(place, torch.Tensor) else place.put)(tensor.float())
    assert missing <= {"lm_head.weight"}, missing  # tied
    ids = tokenizer(PROMPT).input_ids
    sequence = list(ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        for _ in range(NEW_TOKENS):
            last = model(torch.tensor([sequence]), use_cache=False).logits[0, -1]
            sequence.append(int(last.argmax()))
    np.savez(
        file,
        texts=json.dumps([tokenizer(text).input_ids for text in TEXTS]),
        logits=logits.numpy(),
        sequence=sequence,
    )


def theirs(model: Path, file: Path, scratch: Path) -> int:
    """llama.cpp's, and how far they are."""
    import gguf
    import llama_cpp

    reference = np.load(file)
    logits, sequence = reference["logits"], reference["sequence"].tolist()
    prompt = sequence[: len(logits)]
    scale = logits.std()
    wrong = 0
    print(
        f"llama-cpp-python {llama_cpp.__version__}, {llama_cpp.llama_print_system_info().decode()}"
    )
    largest = MOVED if dense(gguf, model, scratch / "dense.gguf") else LARGEST
    for name, path in (("as exported", model), ("dequantized", scratch / "dense.gguf")):
        run = llama_cpp.Llama(
            str(path), n_ctx=512, logits_all=True, type_k=0, type_v=0, verbose=False
        )
        for text, expected in zip(TEXTS, json.loads(str(reference["texts"])), strict=True):
            found = run.tokenize(text.encode(), add_bos=True, special=False)
            if found != expected:
                wrong += 1
                print(f"{name}: {text!r} is {found}, not {expected}")
        run.eval(prompt)
        scores = run.scores[: len(prompt)].copy()
        far = np.abs(scores - logits).max() / scale
        same = (scores.argmax(-1) == logits.argmax(-1)).mean()
        moved = divergence(logits, scores)
        print(
            f"{name}: logits differ by at most {far:.2g} of their standard deviation;"
            f" same best token at {same:.1%} of {len(prompt)} positions;"
            f" mean divergence {moved:.2g} nats"
        )
        if name == "dequantized" and far > largest:
            wrong += 1
        found = list(prompt)
        for _ in range(NEW_TOKENS):
            found.append(int(run.scores[run.n_tokens - 1].argmax()))
            run.eval(found[-1:])
        until = next(
            (i for i, (a, b) in enumerate(zip(found, sequence, strict=True)) if a != b),
            len(found),
        )
        print(f"{name}: {until - len(prompt)} of {NEW_TOKENS} greedy tokens are the same")
        print("   ", repr(run.detokenize(found[len(prompt) :]).decode(errors="replace")))
    return wrong


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over positions of the Kullback-Leibler divergence of two sets of logits."""

    def logs(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    return float((np.exp(logs(p)) * (logs(p) - logs(q))).sum(-1).mean())


def dense(gguf, source: Path, target: Path) -> bool:
    """Copy a file with every tensor as float32; whether it has Q4_1."""
    found = gguf.GGUFReader(source)
    architecture = found.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in found.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inside = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inside)
    for tensor in found.tensors:
        writer.add_tensor(
            tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return any(tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1 for tensor in found.tensors)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama", help="python that has llama-cpp-python")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.reference:
            return min(theirs(options.file, options.reference, Path(scratch)), 1)
        reference = Path(scratch) / "reference.npz"
        ours(options.checkpoint, reference)
        # -P: this script is not the module of its name.
        command = [options.llama, "-P", __file__, options.checkpoint, options.file]
        return subprocess.run([*command, "--reference", reference], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
