"""A head of its own: for a run that quantizes it, and for a model that is to get one.

Where the head is the embeddings, nothing can be written that readers would take for both: they look
up rows of the one, and multiply by the other. Untied, the checkpoint has the same values under two
names, and its config says so; nobody else need know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optq.errors import ModelError, SettingError
from optq.model.checkpoint import Checkpoint
from optq.model.names import disk_names
from optq.model.source import empty_model

WIDTHS = (8, 4)  # bits
UNTIED = {"tie_word_embeddings": False}
AS_IT_IS = "leave out --head, and the head stays as it is"


@dataclass(frozen=True, kw_only=True)
class Untied(Checkpoint):
    """``source`` with a head of its own; ``same`` names the tensors that are others once more."""

    source: Checkpoint
    same: dict[str, str]

    def config(self) -> dict[str, Any]:
        """The source's, where nothing is tied."""
        config = self.source.config() | UNTIED
        text = config.get("text_config")
        return config | {"text_config": text | UNTIED} if isinstance(text, dict) else config

    def tensors(self, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = list(self.files if names is None else names)
        yield from self.source.tensors([name for name in wanted if name not in self.same])
        for name in wanted:
            if name in self.same:
                ((_, tensor),) = self.source.tensors([self.same[name]])
                yield name, tensor

    def own(self, name: str) -> bool:
        return self.source.own(self.same.get(name, name))


def with_own_head(checkpoint: Checkpoint, head: int | None, untie: bool = False) -> Checkpoint:
    """The checkpoint whose head is quantized to ``head`` bits; as it is, where that is None.

    ``untie`` gives it one where it has none but the embeddings. Raises ``SettingError`` where the
    two contradict each other or the model, and :class:`ModelError` for a head that is no linear
    layer, or one that cannot be told from the embeddings.
    """
    if head is None:
        if untie:
            raise SettingError("--untie is for a quantized head", "add --head 8, or leave it out")
        return checkpoint
    if head not in WIDTHS:
        raise SettingError(f"a head of {head} bits is asked for", "choose --head 8 or 4")
    model = empty_model(checkpoint)
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        what = "none" if module is None else f"a {type(module).__name__}"
        raise ModelError(f"the head of {type(model).__name__} is {what}, no nn.Linear", AS_IT_IS)
    (name,) = (f"{name}.weight" for name, each in model.named_modules() if each is module)
    embeddings = model.all_tied_weights_keys.get(name)
    on_disk, same = disk_names(model, checkpoint.files), dict[str, str]()
    if embeddings is not None:
        both = on_disk.keys() >= {name, embeddings}
        # Of headers alone nobody knows whether two tensors are the same.
        if not untie and (checkpoint.whole or not both):
            raise SettingError(
                f"the head of {checkpoint.folder} is its embeddings, which stay as they are",
                "--untie gives it a head of its own, which is quantized",
            )
        for lacks, there in ((name, embeddings), (embeddings, name)):
            if lacks not in on_disk and there in on_disk:
                same[lacks] = on_disk[there]
    elif untie:
        raise SettingError(
            f"{checkpoint.folder} has a head of its own already", "leave out --untie"
        )
    files = checkpoint.files | {new: checkpoint.files[old] for new, old in same.items()}
    layout = checkpoint.layout | {new: checkpoint.layout[old] for new, old in same.items()}
    where = checkpoint.folder, files, layout, checkpoint.dtype, checkpoint.hub, checkpoint.whole
    made = Untied(*where, source=checkpoint, same=same)
    model = empty_model(made)
    if name in model.all_tied_weights_keys or name not in disk_names(model, made.files):
        raise ModelError(
            f"{type(model).__name__} has no way to say that its head is its own", AS_IT_IS
        )
    return made


def head_shape(model: Any) -> tuple[int, int]:
    """Rows and columns of the output head; 0 where there is none."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return (0, 0) if weight is None else tuple(weight.shape)
