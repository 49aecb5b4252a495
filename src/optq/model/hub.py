"""A model on the hub: its small files first, and each shard of weights when a tensor is wanted.

What the shards hold is in their headers, which the hub gives alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from optq.boundary import library, short
from optq.errors import ModelError


@dataclass(frozen=True)
class Hub:
    """One version of the model ``model_id``; its shards go where the user's others are."""

    model_id: str
    revision: str

    def header(self, file: str) -> dict[str, tuple[str, list[int]]]:
        """The name of each tensor's dtype, and its shape, in a shard that is not here."""
        from huggingface_hub import parse_safetensors_file_metadata

        with self._asking(file):
            read = parse_safetensors_file_metadata(self.model_id, file, revision=self.revision)
        return {name: (info.dtype, info.shape) for name, info in read.tensors.items()}

    def download(self, file: str) -> None:
        """Raises :class:`ModelError` where it does not come."""
        from huggingface_hub import hf_hub_download

        with self._asking(file):
            hf_hub_download(self.model_id, file, revision=self.revision)

    def _asking(self, file: str) -> Any:
        cause = f"the hub does not give {file} of {short(self.model_id, 200)}"
        return library(ModelError, cause, "run again: the files that are here already stay")


def fetch(model_id: str, weights: tuple[str, ...]) -> tuple[Path, Hub, list[str]]:
    """The folder of a model on the hub, without its shards, and their names where no index is.

    ``weights`` are the suffixes of files of weights. A model without safetensors comes whole.
    Raises :class:`ModelError` for one that the hub does not give.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        cause = f"{short(model_id, 200)} does not exist"
        raise ModelError(cause, "give a model folder or a hub id") from error
    others = [*(f"*{suffix}" for suffix in weights), "consolidated*", "original/*", "onnx/*"]
    cause = f"there is no folder {short(model_id, 200)}, and the hub does not give it"
    remedy = "give a model folder, or check the id, your access to it, and the network"
    with library(ModelError, cause, remedy):
        folder = Path(snapshot_download(model_id, ignore_patterns=others))
        hub, shards = Hub(model_id, folder.name), list[str]()
        if not [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
            if not [*folder.glob("*.bin")]:
                files = list_repo_files(model_id, revision=hub.revision)
                shards = [f for f in files if fnmatch(f, "*.safetensors") and "/" not in f]
            if not shards:
                snapshot_download(model_id, allow_patterns=["*.bin", "*.bin.index.json"])
    return folder, hub, shards
