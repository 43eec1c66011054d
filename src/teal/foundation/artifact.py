"""Artifacts on disk, written whole or not at all: one JSON file and one safetensors file."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from teal.foundation.errors import UserError
from teal.foundation.ownership import record_of, require_no_input, require_replaceable


def check_destination(
    folder: Path,
    kind: str,
    *,
    force: bool = False,
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """Check before a long job that `folder` can be written at its end.

    Args:
        folder: Destination.
        kind: Kind of the output, such as "plan"; only an earlier one of the same kind is replaced.
        force: Whether an existing folder may be replaced.
        inputs: Files and folders that the job reads, which the output must not hold.

    Raises:
        UserError: The folder exists and `force` is not set, it holds anything but an earlier output
            of the kind, an input lies in it, or its parent is not writable.
    """
    _recover(folder)
    require_no_input(folder, inputs)
    if os.path.lexists(folder) and not force:
        raise UserError(
            f"Output {str(folder)!r} already exists. Choose another, or replace it with --force."
        )
    if os.path.lexists(folder):
        require_replaceable(folder, kind)
    parent = folder.parent
    # Not Path.exists, which raises for unsearchable folders and names that are too long.
    while not os.path.exists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"Cannot write {str(folder)!r}: {str(parent)!r} is not a writable folder. "
            "Choose another output."
        )


@contextmanager
def replace_folder(folder: Path, kind: str, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` if the with statement ends without an error.

    A process killed at any moment leaves the old content whole: either in place, or in a backup
    beside it that the next read or write restores.

    Args:
        folder: Destination.
        kind: Kind of the output; its record, `{kind}.json`, is the caller's to write.
        force: Whether an existing folder may be replaced.

    Yields:
        The temporary folder.

    Raises:
        UserError: The destination cannot be written; see `check_destination`.
    """
    check_destination(folder, kind, force=force)
    # If it is a symbolic link, its target is replaced.
    folder = folder.resolve()
    temporary = _temporary(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        # The job may have taken hours: nothing that came meanwhile is deleted either.
        if folder.exists():
            require_replaceable(folder, kind)
        _exchange(folder, temporary)
    except OSError as error:
        raise UserError(
            f"Cannot write {str(folder)!r}: {error.strerror}. Make room or choose another output."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to `path` atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: a reader sees the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_artifact(
    folder: Path,
    kind: str,
    payload: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    force: bool = False,
) -> None:
    """Write `{kind}.json` and, if there are tensors, `{kind}.safetensors` to `folder`.

    Args:
        folder: Destination.
        kind: Kind of artifact, such as "plan"; it names the files and is checked on loading.
        payload: JSON content, with a "schema_version".
        tensors: Tensors by name, any dtype.
        force: Whether an existing folder may be replaced.

    Raises:
        UserError: The destination cannot be written.
    """
    with replace_folder(folder, kind, force=force) as temporary:
        content = {"kind": kind, **payload}
        if tensors:
            # Not save_file, which makes the file private whatever the umask.
            data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            (temporary / f"{kind}.safetensors").write_bytes(data)
            content["tensors_sha256"] = hashlib.sha256(data).hexdigest()
        (temporary / record_of(kind)).write_text(json.dumps(content, indent=2) + "\n")


def load_artifact(
    folder: Path, kind: str, schema_version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an artifact that `save_artifact` wrote.

    Args:
        folder: Folder of the artifact.
        kind: Expected kind.
        schema_version: Newest version that the caller understands.

    Returns:
        JSON content, and tensors by name.

    Raises:
        UserError: The artifact is missing, damaged, of another kind or of a newer schema.
    """
    _recover(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{str(folder)!r} is not a folder. Give a folder that holds {kind}.json.")
    payload = read_json(folder / f"{kind}.json")
    if payload.get("kind") != kind or not isinstance(payload.get("schema_version"), int):
        raise UserError(f"{str(folder / f'{kind}.json')!r} was not written by teal. Make it anew.")
    if payload["schema_version"] > schema_version:
        raise UserError(
            f"{str(folder)!r} has schema version {payload['schema_version']}, this teal reads up "
            f"to {schema_version}. Update teal."
        )
    return payload, _load_tensors(folder / f"{kind}.safetensors", payload.get("tensors_sha256"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing, unreadable or damaged, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} does not exist. Check the path.") from None
    except OSError as error:
        raise UserError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is damaged or not JSON ({error}). Make it anew.") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds no JSON object. Make it anew.")
    return content


@contextmanager
def well_formed(folder: Path) -> Iterator[None]:
    """Turn errors from parsing a malformed artifact into one sentence.

    Args:
        folder: The artifact, for the message.

    Raises:
        UserError: The with statement raised because a key is missing or a value is malformed.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{str(folder)!r} is damaged ({type(error).__name__}: {error}). Make it anew."
        ) from error


def _load_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    if sha256 is None:
        return {}
    damaged = UserError(f"{str(path)!r} is missing or damaged. Make the artifact anew.")
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise damaged
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged from error
    return tensors


def _exchange(folder: Path, new: Path) -> None:
    backup = _backup(folder)
    if folder.exists():
        # A killed process may have left an older backup, which is obsolete.
        _remove(backup)
        folder.rename(backup)
    new.rename(folder)
    _remove(backup)


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _backup(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _recover(folder: Path) -> None:
    folder = folder.resolve()
    backup = _backup(folder)
    if os.path.exists(backup) and not os.path.exists(folder):
        backup.rename(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
