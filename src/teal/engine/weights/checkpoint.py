"""The weights of a decoder, read from a model folder tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from teal.checkpoints.files import CheckpointFiles
from teal.checkpoints.location import load_config
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
from teal.engine.weights.quantized import CheckpointSource, RoundedSource, bytes_needed
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent
from teal.models.architectures import architecture_of
from teal.quantization import Scheme


@torch.no_grad()
def from_folder(
    folder: str | Path,
    dtype: torch.dtype | None,
    device: torch.device,
    scheme: Scheme | None = None,
    progress: Progress = silent,
) -> DecoderWeights:
    """Read the weights of a model folder tensor by tensor, without building the model.

    Peak memory is that of the weights plus the largest tensor.

    Args:
        folder: Model folder that `save_pretrained` wrote, with one safetensors file or several; or
            a quantized checkpoint, whose projections are read without rounding them again.
        dtype: Dtype of the weights, or `None` for the checkpoint's own.
        device: Device of the weights.
        scheme: Quantization of the projections while they are read, or `None` for none.
        progress: Shows the layers while they are read.

    Raises:
        UserError: The folder is incomplete, damaged or too large for the device, the engine does
            not run the model, or the model is quantized already and a scheme was given.
    """
    config = load_config(str(folder))
    architecture = architecture_of(config)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    quantized = _quantized(Path(folder), scheme)
    needed = quantized.files.nbytes if quantized else bytes_needed(architecture, dtype, scheme)
    require_memory(needed, device, "The weights")
    files = quantized.files if quantized else CheckpointFiles(folder)
    source = _FolderSource(files, dtype, device)
    matrices: Source = source
    if quantized:
        matrices = CheckpointSource(source, quantized, device, source.names, source.read)
    elif scheme:
        matrices = RoundedSource(source, scheme)
    # A quantized head is no longer tied to the embedding.
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
    def __init__(self, files: CheckpointFiles, dtype: torch.dtype, device: torch.device) -> None:
        self._files = files
        self._dtype = dtype
        self._device = device
        self.names = set(files.names)
        self.read: set[str] = set()

    def matrix(self, output_sizes: Mapping[str, int], in_features: int) -> Tensor:
        fused = self._empty(in_features, sum(output_sizes.values()))
        for (name, size), part in zip(
            output_sizes.items(), transposed_parts(fused, output_sizes), strict=True
        ):
            part.copy_(self._load(name, (size, in_features)))
        return fused

    def vector(self, output_sizes: Mapping[str, int]) -> Tensor:
        loaded = [self._load(name, (size,)) for name, size in output_sizes.items()]
        return torch.cat(loaded).to(self._dtype)

    def rows(self, name: str, shape: tuple[int, int]) -> Tensor:
        return self._empty(*shape).copy_(self._load(name, shape))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._files.tensor(name)
        self.read.add(name)
        require_shape(name, tensor, shape)
        return tensor.to(self._device)
