"""Runs whose bytes are recorded: ``python tests/byte_settings.py`` prints a hash for each.

Sums depend on the processor's units, so the libraries are held to what every x86 processor of the
last ten years has, on one thread; ``--native`` leaves them as they are, to compare two commits on
one machine.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}
MODELS = ("llama_bfloat16", "qwen2", "gpt2")


def settings():
    """By name: the model, the quantizer, whether errors propagate, and the format."""
    from optq import GPTQ, OBQ, QEP, RTN

    made = {}
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            kind = f"{bits} {'sym' if sym else 'asym'}"
            made[f"rtn {kind}"] = ("qwen2", RTN(bits, 32, sym), False, "gptq_v2")
            made[f"plain {kind}"] = ("llama_bfloat16", GPTQ.plain(bits, 32, sym), False, "gptq")
            made[f"default {kind}"] = ("llama_bfloat16", GPTQ(bits, 32, sym), False, "gptq")
            form = "compressed-tensors"
            made[f"default qep {kind}"] = ("qwen2", GPTQ(bits, 64, sym), True, form)
            made[f"rows {kind}"] = ("gpt2", GPTQ(bits, -1, sym), True, "gptq_v2")
    obq = OBQ(3, 32)
    made |= {
        "rtn mse qep": ("gpt2", RTN(4, 32, mse=True), True, "gptq"),
        "rtn rows": ("llama_bfloat16", RTN(8), False, "compressed-tensors"),
        "actorder": ("qwen2", GPTQ.plain(4, 32, actorder=True), False, "gptq"),
        "actorder polish qep": ("gpt2", GPTQ(3, 32, actorder=True), True, "gptq_v2"),
        "static": ("gpt2", GPTQ.plain(3, 32, static_groups=True), False, "gptq"),
        "static actorder": ("qwen2", GPTQ(4, 32, actorder=True, static_groups=True), True, "gptq"),
        "damped": ("qwen2", GPTQ.plain(4, 32, percdamp=0.1, mse=True), False, "gptq"),
        "blocks of 16": ("llama_bfloat16", GPTQ(4, 64, blocksize=16), False, "gptq"),
        "polish 4": ("qwen2", GPTQ(2, 32, polish=4), False, "gptq"),
        "qep options": ("qwen2", GPTQ(3, 32), QEP(1.0, 0.1, "down_proj"), "gptq"),
        "obq": ("qwen2", obq, False, "gptq"),
        "obq qep": ("qwen2", obq, True, "compressed-tensors"),
    }
    return made


def _plain(config):
    """Without the versions of what wrote it."""
    versions = ("meta", "transformers_version")
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in versions
    }


def run(folder, quantizer, qep, form):
    """The hash of the weights and settings of one checkpoint; the run record is not among them."""
    import zoo

    from optq import ModelConfig, Runner

    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        config, tokens = ModelConfig(str(folder), "cpu"), zoo.token_ids(12, 48)
        Runner(config, quantizer, qep, calib=tokens, output=out, format=form).run()
        for file in sorted(out.glob("*.safetensors")):
            digest.update(file.name.encode() + file.read_bytes())
        for file in sorted(out.glob("*config.json")):
            digest.update(json.dumps(_plain(json.loads(file.read_text())), sort_keys=True).encode())
    return digest.hexdigest()


def main():
    import torch
    import transformers
    import zoo

    transformers.logging.disable_progress_bar()
    if "--native" not in sys.argv:
        torch.cpu._is_avx512_bf16_supported = lambda: False
    rows = {row.name: row for row in zoo.ROWS}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: zoo.save(rows[name], Path(scratch) / name) for name in MODELS}
        hashes = {
            name: run(folders[model], *options) for name, (model, *options) in settings().items()
        }
    print(json.dumps(hashes, indent=1))


if __name__ == "__main__":
    if "--native" not in sys.argv and any(os.environ.get(k) != v for k, v in PORTABLE.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PORTABLE)
    main()
