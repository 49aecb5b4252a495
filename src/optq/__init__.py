"""OPTQ: quantize the weights of language models with GPTQ."""

__version__ = "0.1.0"
