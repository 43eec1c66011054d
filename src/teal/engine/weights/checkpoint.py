"""The weights of a decoder from a model folder, tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teal.checkpoints.quantized import HEAD, QuantizedCheckpoint, quantization_config_of
from teal.engine.weights.decoder_weights import (
    DecoderWeights,
    Source,
    assemble,
    require_all_read,
    require_shape,
    transposed_parts,
)
from teal.engine.weights.memory import require_memory
from teal.engine.weights.quantized import CheckpointSource, RoundedSource, bytes_in, bytes_needed
from teal.foundation.artifact import read_json
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent
from teal.models.architectures import architecture_of
from teal.models.loading import load_config
from teal.quantization import Scheme

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@torch.no_grad()
def from_folder(
    folder: str | Path,
    dtype: torch.dtype | None,
    device: torch.device,
    scheme: Scheme | None = None,
    progress: Progress = silent,
) -> DecoderWeights:
    """Read the weights of a model folder tensor by tensor, without building the model.

    At its peak this takes the memory of the weights and of the largest tensor.

    Args:
        folder: What `save_pretrained` wrote, in one safetensors file or in several; or a quantized
            checkpoint, whose projections stay as they are.
        dtype: Dtype of the weights, or `None` for the checkpoint's own.
        device: Where to put them.
        scheme: Into what projections are quantized as they are read.
        progress: Shows the layers going by.

    Raises:
        UserError: The folder is incomplete or damaged, of a model that the engine does not run,
            or too large for the device; or it is quantized and a scheme was given.
    """
    config = load_config(str(folder))
    architecture = architecture_of(config)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    quantized = _quantized(Path(folder), scheme)
    needed = bytes_in(Path(folder)) if quantized else bytes_needed(architecture, dtype, scheme)
    require_memory(needed, device, "The weights")
    source = _FolderSource(Path(folder), dtype, device)
    matrices: Source = source
    if quantized:
        matrices = CheckpointSource(source, quantized, device, source.names, source.read)
    elif scheme:
        matrices = RoundedSource(source, scheme)
    # A head that is quantized no longer is the embedding.
    tied_head = architecture.tied_head and not (quantized and HEAD in quantized.names)
    weights = assemble(architecture, matrices, tied_head=tied_head, progress=progress)
    require_all_read(architecture, source.names, source.read, repr(str(folder)))
    return weights


def _quantized(folder: Path, scheme: Scheme | None) -> QuantizedCheckpoint | None:
    if not (folder / "config.json").is_file() or quantization_config_of(folder) is None:
        return None
    if scheme is not None:
        raise UserError(
            f"{str(folder)!r} is quantized already. Open it without quantizing, or quantize the "
            "model that it came from."
        )
    return QuantizedCheckpoint(folder)


class _FolderSource:
    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._opened: dict[str, Any] = {}
        self._files = _files_of(folder)
        self.names = set(self._files) or self._names_of_single_file()
        self.read: set[str] = set()

    def matrix(self, output_sizes: Mapping[str, int], in_features: int) -> Tensor:
        fused = self._empty(in_features, sum(output_sizes.values()))
        for (name, width), part in zip(
            output_sizes.items(), transposed_parts(fused, output_sizes), strict=True
        ):
            part.copy_(self._load(name, (width, in_features)))
        return fused

    def vector(self, output_sizes: Mapping[str, int]) -> Tensor:
        loaded = [self._load(name, (width,)) for name, width in output_sizes.items()]
        return torch.cat(loaded).to(self._dtype)

    def rows(self, name: str, shape: tuple[int, int]) -> Tensor:
        return self._empty(*shape).copy_(self._load(name, shape))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _names_of_single_file(self) -> set[str]:
        return set(self._open(_SINGLE).keys())

    def _load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.names:
            raise UserError(
                f"The weights of {str(self._folder)!r} lack {name}. Use a complete checkpoint."
            )
        self.read.add(name)
        file = self._files.get(name, _SINGLE)
        try:
            tensor: Tensor = self._open(file).get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(file, error) from error
        require_shape(name, tensor, shape)
        return tensor.to(self._device)

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(self._folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._damaged(file, error) from error
        return self._opened[file]

    def _damaged(self, file: str, error: Exception) -> UserError:
        return UserError(
            f"{str(self._folder / file)!r} is missing or damaged ({error}). Copy it there anew."
        )


def _files_of(folder: Path) -> dict[str, str]:
    """Return the file of every tensor of a checkpoint in several files, nothing for one file."""
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{str(folder / _INDEX)!r} has no weight_map. Copy it there anew.")
        return {str(name): str(file) for name, file in weight_map.items()}
    if not (folder / _SINGLE).is_file():
        raise UserError(
            f"{str(folder)!r} holds neither {_SINGLE} nor {_INDEX}. "
            "Save the model with save_pretrained."
        )
    return {}
