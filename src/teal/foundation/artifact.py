"""Folders on disk that are written whole or not at all: one JSON file and one safetensors file."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from teal.foundation.errors import UserError

# One of these files in a folder says that it may be replaced.
_MARKS = ("plan.json", "quantization.json", "report.html", "stats.json")


def check_destination(folder: Path, *, force: bool = False) -> None:
    """Fail early where `folder` could not be written at the end of a long job.

    Raises:
        UserError: It exists and `force` is not set or it is not an output of this library, or its
            parent cannot be written.
    """
    _recover(folder)
    if os.path.lexists(folder) and not force:
        raise UserError(
            f"Output {str(folder)!r} already exists. Choose another, or replace it with --force."
        )
    if os.path.lexists(folder) and not _is_output(folder):
        raise UserError(
            f"{str(folder)!r} holds something that teal did not write, which --force would delete. "
            "Choose another output."
        )
    parent = folder.parent
    # Not Path.exists, which raises where a folder may not be searched or a name is too long.
    while not os.path.exists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"Cannot write {str(folder)!r}: {str(parent)!r} is not a writable folder. "
            "Choose another output."
        )


@contextmanager
def replace_folder(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error.

    A kill at any moment leaves the old content whole: either still in place, or in a backup next
    to it that the next read or write puts back.

    Raises:
        UserError: As `check_destination`.
    """
    check_destination(folder, force=force)
    # Behind a link, what the link points to is replaced.
    folder = folder.resolve()
    temporary = _temporary(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _exchange(folder, temporary)
    except OSError as error:
        raise UserError(
            f"Cannot write {str(folder)!r}: {error.strerror}. Make room or choose another output."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to `path`, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part."""
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
    """Write `{kind}.json` and, where there are tensors, `{kind}.safetensors` to `folder`.

    Args:
        folder: Destination; replaced whole when it exists and `force` is set.
        kind: What the artifact is, such as "plan"; it names the files and is checked on loading.
        payload: JSON content, with a "schema_version".
        tensors: Named tensors, any dtype.
        force: Replace an existing folder.

    Raises:
        UserError: The destination cannot be written.
    """
    with replace_folder(folder, force=force) as temporary:
        content = {"kind": kind, **payload}
        if tensors:
            # Not save_file: it hides the file from other users, whatever the umask.
            data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            (temporary / f"{kind}.safetensors").write_bytes(data)
            content["tensors_sha256"] = hashlib.sha256(data).hexdigest()
        (temporary / f"{kind}.json").write_text(json.dumps(content, indent=2) + "\n")


def load_artifact(
    folder: Path, kind: str, schema_version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_artifact` wrote.

    Args:
        folder: The artifact.
        kind: What it has to be.
        schema_version: The newest version that the caller understands.

    Returns:
        JSON content and named tensors.

    Raises:
        UserError: Nothing there, another kind of artifact, damaged, or of a newer schema.
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
        UserError: Missing, unreadable, damaged, or not an object.
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
    """Turn the errors of taking apart a malformed artifact into one sentence.

    Raises:
        UserError: The block raised because a key is missing or a value has the wrong form.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{str(folder)!r} is damaged ({type(error).__name__}: {error}). Make it anew."
        ) from error


def _is_output(folder: Path) -> bool:
    """Tell whether `folder` is empty or holds an artifact or a report."""
    if not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir()}
    return not names or bool(names & set(_MARKS))


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
        # A kill may have left an older backup, of which nothing is needed any more.
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
