"""Takes the weights of a decoder from a Hugging Face model, which keeps sharing them."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from teal.engine.weights.decoder_weights import (
    DecoderWeights,
    assemble,
    require_all_read,
    require_shape,
    transposed_parts,
)
from teal.engine.weights.quantized import RoundedSource
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent
from teal.models.architectures import architecture_of
from teal.models.weight_format import weight_format_of
from teal.quantization import FLOAT, Scheme


@torch.no_grad()
def from_model(
    model: nn.Module, scheme: Scheme | None = None, progress: Progress = silent
) -> DecoderWeights:
    """Fuse the weights of a Hugging Face model in place and share them with it.

    Parameters of projections become views of the fused matrices, so there is no second copy and
    `model` keeps working. Peak extra memory is that of the largest fused matrix. Moving or casting
    the model afterwards ends the sharing. To save it afterwards, give `save_pretrained` a
    `state_dict` of contiguous tensors.

    Args:
        model: A supported causal language model, sparse or dense, changed in place.
        scheme: Format to which projections are quantized; the model then keeps its floats, and the
            quantized weights come on top.
        progress: Shows progress over the layers.

    Returns:
        The weights, in the dtype and on the device of the model.

    Raises:
        UserError: The model is not supported, is quantized already, or mixes dtypes or devices.
    """
    if weight_format_of(model) != FLOAT and scheme is not None:
        raise UserError(
            "The model is quantized already. Open it without quantizing, or quantize the dense "
            "model that it came from."
        )
    architecture = architecture_of(model.config)
    source = _ModelSource(model)
    tied = source.tied("lm_head.weight", model.get_input_embeddings().weight)  # type: ignore[operator]
    rounded = source if scheme is None else RoundedSource(source, scheme)
    weights = assemble(architecture, rounded, tied_head=tied, progress=progress)
    require_all_read(architecture, source.names, source.read, type(model).__name__)
    if weights.device.type == "cuda":
        # Free cached blocks of the old sizes, which will not be reused.
        torch.cuda.empty_cache()
    return weights


class _ModelSource:
    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self.names = set(self._parameters)
        self.read: set[str] = set()

    def tied(self, name: str, other: Tensor) -> bool:
        return self._parameters.get(name) is other

    def matrix(self, output_sizes: Mapping[str, int], in_features: int) -> Tensor:
        parameters = [
            self._take(name, (width, in_features)) for name, width in output_sizes.items()
        ]
        fused = _fused_already(parameters)
        if fused is None:
            fused = parameters[0].new_empty((in_features, sum(output_sizes.values())))
            for parameter, part in zip(
                parameters, transposed_parts(fused, output_sizes), strict=True
            ):
                part.copy_(parameter)
                # Frees the memory that the parameter had.
                parameter.data = part
        return fused

    def vector(self, output_sizes: Mapping[str, int]) -> Tensor:
        return torch.cat([self._take(name, (width,)).data for name, width in output_sizes.items()])

    def rows(self, name: str, shape: tuple[int, int]) -> Tensor:
        return self._take(name, shape).data

    def _take(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        if name not in self._parameters:
            raise UserError(f"The model lacks {name}. Give a complete causal language model.")
        self.read.add(name)
        parameter = self._parameters[name]
        require_shape(name, parameter, shape)
        first = next(iter(self._parameters.values()))
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            raise UserError(
                f"{name} is {parameter.dtype} on {parameter.device}, other parameters are "
                f"{first.dtype} on {first.device}. Bring the model to one dtype and device."
            )
        return parameter


def _fused_already(parameters: list[nn.Parameter]) -> Tensor | None:
    """Return the fused matrix if the parameters are adjacent views of one."""
    first = parameters[0]
    output_sizes = [len(parameter) for parameter in parameters]
    starts = accumulate(output_sizes[:-1], initial=first.storage_offset())
    found = [
        (parameter.untyped_storage().data_ptr(), parameter.storage_offset(), parameter.stride())
        for parameter in parameters
    ]
    storage, stride = first.untyped_storage().data_ptr(), (1, sum(output_sizes))
    if found != [(storage, start, stride) for start in starts]:
        return None
    shape = (first.shape[1], sum(output_sizes))
    return first.data.as_strided(shape, (sum(output_sizes), 1), first.storage_offset())
