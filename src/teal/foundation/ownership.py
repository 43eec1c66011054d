"""Which output folders may be replaced: those that teal wrote and that hold nothing else."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from teal.foundation.errors import UserError


def record_of(kind: str) -> str:
    """Return the name of the file in which an output of a kind says what it is."""
    return f"{kind}.json"


def require_replaceable(folder: Path, kind: str) -> None:
    """Check that replacing a folder deletes nothing but an earlier output of the same kind.

    The folder's own record decides, not the names of its files: it has to name the kind, and every
    other file has to be one that it lists.

    Args:
        folder: An existing folder or file.
        kind: Kind of the output that would replace it, such as "plan".

    Raises:
        UserError: It is a file, another kind of output, or holds something else; the message names
            what would be lost.
    """
    if not folder.is_dir():
        raise _refusal(folder, "is a file")
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return
    record = _record(folder / record_of(kind))
    if record.get("kind") != kind or not isinstance(record.get("schema_version"), int):
        raise _refusal(folder, f"holds {names[0]!r} and no {kind} that teal wrote")
    files = record.get("files", [f"{kind}.safetensors"])
    own = {record_of(kind), *(files if isinstance(files, list) else ())}
    foreign = next((name for name in names if name not in own), None)
    if foreign is not None:
        raise _refusal(folder, f"holds {foreign!r}, which teal did not write")


def require_no_input(folder: Path, inputs: Iterable[str | Path | None]) -> None:
    """Check that an output folder holds none of the files or folders that a command reads.

    Args:
        folder: Destination.
        inputs: Paths that are read; `None`, and names that are no path, are skipped.

    Raises:
        UserError: Writing the output would delete an input.
    """
    target = folder.resolve()
    for given in inputs:
        path = None if given is None else Path(given).resolve()
        if path is not None and path.exists() and (path == target or target in path.parents):
            raise UserError(
                f"{str(folder)!r} holds the input {str(given)!r}, which writing the output would "
                "delete. Choose another output."
            )


def write_record(folder: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write the record of an output whose other files are all in place.

    Args:
        folder: The output, complete but for its record.
        kind: Kind of the output, such as "quantization".
        content: What else the record says; a "schema_version" among it.
    """
    files = sorted(entry.name for entry in folder.iterdir())
    record = {"kind": kind, **content, "files": files}
    (folder / record_of(kind)).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _record(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{str(folder)!r} {reason}; --force replaces only what teal wrote. Choose another output."
    )
