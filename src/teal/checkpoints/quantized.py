"""Published quantized checkpoints, read projection by projection without building the model."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from teal.checkpoints.awq_gptq import AwqLayout, GptqLayout
from teal.checkpoints.compressed_tensors import CompressedLayout
from teal.checkpoints.files import CheckpointFiles
from teal.foundation.artifact import read_json, well_formed
from teal.foundation.errors import UserError
from teal.quantization.weight import QuantizedWeight

# Name of the output head in every family.
HEAD = "lm_head"


class Layout(Protocol):
    """How a quantization method stores the tensors of a projection."""

    @property
    def marker(self) -> str:
        """Suffix of a tensor that every quantized projection has."""
        ...

    def weight(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Assemble the projection `name` from its tensors by suffix."""
        ...


_LAYOUTS: Mapping[str, Callable[[Mapping[str, Any]], Layout]] = {
    "awq": AwqLayout.from_config,
    "compressed-tensors": CompressedLayout.from_config,
    "gptq": GptqLayout.from_config,
}


class QuantizedCheckpoint:
    """A model folder with quantized projections.

    Attributes:
        files: The weight files.
        method: Quantization method: "awq", "gptq" or "compressed-tensors".
        names: Dotted names of the quantized projections, sorted.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open `folder` and read its table of contents, no tensor yet.

        Raises:
            UserError: The model is dense, quantized in an unsupported way, or incomplete.
        """
        config = quantization_config_of(Path(folder))
        if config is None:
            raise UserError(
                f"{str(folder)!r} is not quantized: its config.json has no quantization_config. "
                "Open it as a dense model."
            )
        with well_formed(Path(folder) / "config.json"):
            self.method, self._layout = _layout_of(config)
        self.files = CheckpointFiles(folder)
        suffix = f".{self._layout.marker}"
        self.names = sorted(n.removesuffix(suffix) for n in self.files.names if n.endswith(suffix))
        if not self.names:
            raise UserError(
                f"{str(folder)!r} says it is quantized with {self.method}, but holds no "
                f"{self._layout.marker} tensors. Copy its files there anew."
            )

    @property
    def folder(self) -> Path:
        """The model folder."""
        return self.files.folder

    def __iter__(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield the name and weight of every quantized projection, one in memory at a time."""
        for name in self.names:
            yield name, self.read(name)

    def read(self, name: str) -> QuantizedWeight:
        """Read the projection with a dotted name.

        Raises:
            UserError: The projection is not among `names`, incomplete or damaged.
        """
        if name not in self.names:
            raise UserError(f"{str(self.folder)!r} holds no quantized {name}. See its names.")
        prefix = f"{name}."
        own = sorted(tensor for tensor in self.files.names if tensor.startswith(prefix))
        try:
            tensors = {tensor.removeprefix(prefix): self.files.tensor(tensor) for tensor in own}
            with well_formed(self.folder):
                return self._layout.weight(name, _Tensors(tensors))
        except UserError as error:
            raise UserError(f"Cannot read {name} of {str(self.folder)!r}: {error}") from error


def quantization_config_of(folder: Path) -> Mapping[str, Any] | None:
    """Return the `quantization_config` of a model folder, or `None` for a dense model.

    Raises:
        UserError: config.json is missing or damaged.
    """
    config = read_json(folder / "config.json").get("quantization_config")
    if config is not None and not isinstance(config, dict):
        raise UserError(
            f"The quantization_config in {str(folder / 'config.json')!r} is no JSON object. "
            "Copy the file there anew."
        )
    return config


class _Tensors(dict[str, Tensor]):
    """The tensors of one projection by suffix."""

    def __missing__(self, suffix: str) -> Tensor:
        raise UserError(f"It lacks {suffix}. Use a complete checkpoint.")


def _layout_of(config: Mapping[str, Any]) -> tuple[str, Layout]:
    method = str(config.get("quant_method", "")).lower()
    if method not in _LAYOUTS:
        raise UserError(
            f"Quantization method {method!r} is not supported. "
            f"Supported: {', '.join(_LAYOUTS)}. Use a checkpoint in one of these."
        )
    return method, _LAYOUTS[method](config)
