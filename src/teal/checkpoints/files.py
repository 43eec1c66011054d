"""The weight files of a model folder: which of them count, and the tensors they hold."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from teal.foundation.artifact import read_json
from teal.foundation.errors import UserError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class CheckpointFiles:
    """The safetensors files of one model, as its index or its single file lists them.

    Other safetensors files in the same folder do not count.

    Attributes:
        folder: The model folder.
        names: Names of all tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open `folder` and read its table of contents, no tensor yet.

        Raises:
            UserError: The folder has no safetensors weights, or they are damaged.
        """
        self.folder = Path(folder)
        self._opened: dict[str, Any] = {}
        self._files = self._listed()
        self.names = frozenset(self._files)

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes.

        Raises:
            UserError: One of them is missing.
        """
        total = 0
        for file in sorted(set(self._files.values())):
            try:
                total += (self.folder / file).stat().st_size
            except OSError as error:
                raise self._damaged(file, error) from error
        return total

    def file_of(self, name: str) -> Path:
        """Return the file that holds the tensor `name`.

        Raises:
            UserError: There is no such tensor.
        """
        return self.folder / self._file_of(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor onto the CPU.

        Raises:
            UserError: There is no such tensor, or its file is missing or damaged.
        """
        file = self._file_of(name)
        try:
            tensor: Tensor = self._open(file).get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(file, error) from error
        return tensor

    def _listed(self) -> dict[str, str]:
        """Return the file name of every tensor."""
        index = self.folder / _INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{str(index)!r} has no weight_map. Copy it there anew.")
            return {str(name): str(file) for name, file in weight_map.items()}
        if not (self.folder / _SINGLE).is_file():
            raise UserError(
                f"{str(self.folder)!r} holds neither {_SINGLE} nor {_INDEX}. "
                "Save the model with save_pretrained."
            )
        return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)

    def _file_of(self, name: str) -> str:
        if name not in self._files:
            raise UserError(
                f"The weights of {str(self.folder)!r} lack {name}. Use a complete checkpoint."
            )
        return self._files[name]

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._damaged(file, error) from error
        return self._opened[file]

    def _damaged(self, file: str, error: Exception) -> UserError:
        return UserError(
            f"{str(self.folder / file)!r} is missing or damaged ({error}). Copy it there anew."
        )
