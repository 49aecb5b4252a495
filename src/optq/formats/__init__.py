"""On-disk formats: read, write, detect. One file and one row of ``FORMATS`` each."""

from optq.formats.gptq import GPTQ_V1, GPTQ_V2, GPTQFormat

FORMATS: dict[str, GPTQFormat] = {row.name: row for row in (GPTQ_V1, GPTQ_V2)}
