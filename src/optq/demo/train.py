"""Train the bundled model: ``python -m optq.demo.train --out DIR``.

A Llama of 7.3 million parameters and its byte-level BPE tokenizer learn the standard library's
source (``optq.demo.corpus``): about an hour on two cores with AVX512-BF16. ``DIR`` holds a
loadable model after every checkpoint, and a run that is started again resumes from the last one,
with another ``--steps`` if wanted: the schedule is warmup, stable, decay, so the decay can begin
at any checkpoint of the stable part.

Four choices make an hour enough:

* Muon for the blocks' matrices, AdamW for the embedding and the norms' gains.
* Threads split the batch, not the operators: each runs single-threaded operators on windows of
  its own. With two threads inside an operator both wait whenever another program takes a core.
* Attention as two plain products: at 512 tokens they are more than twice as fast on a CPU
  as PyTorch's fused attention.
* The library proper counts double beside its tests, which are the larger half of the source.
"""

import argparse
import copy
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optq.demo import corpus

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
WINDOW = 512  # tokens
BATCH = 8  # windows per step
SHARD = 2  # windows per thread at a time
MUON_RATE, ADAMW_RATE = 0.02, 0.003
WARMUP_STEPS = 100
DECAY_SHARE = 0.3  # of all steps, at the end
REPORT_STEPS = 50
CHECKPOINT_STEPS = 100
MEASURE_STEPS = 1000  # held-out perplexity
LIBRARY_REPEATS = 2  # per pass, beside one of the tests


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE without normalizer, prefix space or added special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def prepare(out: Path) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """The tokenizer and the training text as one row of ids, each file ended by end-of-text."""
    if (out / "stream.pt").exists():
        return PreTrainedTokenizerFast.from_pretrained(out), torch.load(out / "stream.pt")
    files = corpus.training_files()
    texts = [path.read_text(encoding="utf-8") for path in files]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(out)
    ended = [text + END_OF_TEXT for text in texts]
    ids = [torch.tensor(row) for row in tokenizer(ended, verbose=False)["input_ids"]]
    pairs = zip(ids, files, strict=True)
    library = [row for row, path in pairs if not {"test", "tests"} & {*path.parts}]
    stream = torch.cat(ids + library * (LIBRARY_REPEATS - 1))
    torch.save(stream, out / "stream.pt")
    return tokenizer, stream


class Batches:
    """The batch of any step: every pass cuts the stream at another offset and shuffles it."""

    def __init__(self, stream: Tensor, seed: int) -> None:
        self.stream = stream
        self.seed = seed
        self.steps_per_pass = (len(stream) // WINDOW - 1) // BATCH
        self._pass = -1
        self._windows = stream

    def __getitem__(self, step: int) -> Tensor:
        number, position = divmod(step, self.steps_per_pass)
        if number != self._pass:
            random = torch.Generator().manual_seed(self.seed * 1000 + number)
            offset = int(torch.randint(WINDOW, (), generator=random))
            usable = (len(self.stream) - offset) // WINDOW * WINDOW
            windows = self.stream[offset : offset + usable].view(-1, WINDOW)
            self._windows = windows[torch.randperm(len(windows), generator=random)]
            self._pass = number
        return self._windows[position * BATCH : (position + 1) * BATCH]


def rate_factor(step: int, steps: int) -> float:
    """Warmup, stable, then linear decay to zero over the last ``DECAY_SHARE`` of the steps."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def make_optimizers(model: LlamaForCausalLM, threads: int) -> list[torch.optim.Optimizer]:
    """AdamW for what is no matrix of a block, and a Muon for each thread's part of those."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    muons = [
        torch.optim.Muon(matrices[i::threads], lr=MUON_RATE, weight_decay=0.02)
        for i in range(threads)
    ]
    return [*muons, torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor) -> float:
    """In bfloat16, over whole windows without overlap; the loss in float32."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    losses = []
    for window in ids[: len(ids) // WINDOW * WINDOW].view(-1, 1, WINDOW):
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        losses.append(cross_entropy(logits, window[0, 1:]))
    return torch.stack(losses).mean().exp().item()


def train(out: Path, steps: int, seed: int) -> None:
    """Write tokenizer and model to ``out``, going on from ``out/training.pt`` if it is there."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, stream = prepare(out)
    batches = Batches(stream, seed)
    held_out = torch.tensor(tokenizer(corpus.evaluation_text(), verbose=False)["input_ids"])

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=896,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )
    parameters = list(model.parameters())
    optimizers = make_optimizers(model, threads)
    compiled = torch.compile(model, dynamic=False)
    first = 0
    if (out / "training.pt").exists():
        state = torch.load(out / "training.pt")
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def gradients(windows: Tensor) -> tuple[Tensor, ...]:
        """These windows' share of the batch's loss, and its gradient for every parameter."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # its cache is shared
            loss = compiled(input_ids=windows, labels=windows, use_cache=False).loss
            share = loss * len(windows) / BATCH
        return (share.detach(), *torch.autograd.grad(share, parameters))

    print(f"{len(batches.stream)} tokens, {batches.steps_per_pass} steps in a pass", flush=True)
    gradients(batches[first][:SHARD])  # compiles, before there are threads
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    start, losses = time.monotonic(), []
    for step in range(first, steps):
        shards = pool.map(gradients, batches[step].split(SHARD))
        totals = next(shards)
        for shard in shards:
            for total, part in zip(totals, shard, strict=True):
                total += part
        loss, *summed = totals
        for parameter, gradient in zip(parameters, summed, strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                rate = MUON_RATE if isinstance(optimizer, torch.optim.Muon) else ADAMW_RATE
                group["lr"] = rate * rate_factor(step, steps)
        list(pool.map(lambda optimizer: optimizer.step(), optimizers))
        losses.append(loss.item())
        done = step + 1
        if done % REPORT_STEPS == 0 or done == steps:
            mean = sum(losses) / len(losses)
            speed = len(losses) * BATCH * WINDOW / (time.monotonic() - start)
            print(f"step {done}/{steps} loss {mean:.3f}, {speed:.0f} tokens/s", flush=True)
            start, losses = time.monotonic(), []
        if done % CHECKPOINT_STEPS == 0 or done == steps:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
            state = {
                "step": done,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, out / "training.tmp")
            os.replace(out / "training.tmp", out / "training.pt")
        if done % MEASURE_STEPS == 0 or done == steps:
            print(f"held-out perplexity {perplexity(model, held_out):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train OPTQ's bundled model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and checkpoint")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
