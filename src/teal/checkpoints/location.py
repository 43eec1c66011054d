"""Where a model is, in a folder or on the Hugging Face hub, and its configuration."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from teal.foundation.errors import UserError

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Without it transformers asks on the terminal whether to run Python code of the model folder, and
# takes a "y" from whatever is piped in.
NO_CODE: Mapping[str, bool] = {"trust_remote_code": False}

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def folder_of(source: str) -> Path:
    """Return the folder of a model, downloading it if `source` is a name on the hub."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, allow_patterns=_FILES))


def load_config(source: str) -> Any:
    """Read the Hugging Face configuration of a model without its weights.

    Args:
        source: Model folder, or a name on the Hugging Face hub.

    Raises:
        UserError: There is no model, or its configuration is damaged.
    """
    check_source(source)
    try:
        return AutoConfig.from_pretrained(source, **NO_CODE)
    except Exception as error:
        raise unreadable("model configuration", source, error) from error


def check_source(source: str) -> None:
    """Check that `source` is a model folder, or could be a name on the hub.

    Raises:
        UserError: It is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{source!r} is not a model folder: it has no config.json. "
                "Give a folder that save_pretrained wrote."
            )
    # A path below an existing folder is a misspelt path, not a name on the hub.
    elif folder.exists() or folder.parent.is_dir() or not _HUB_NAME.fullmatch(source):
        raise UserError(
            f"{source!r} is not a model folder. Give a folder with config.json, weights and "
            "tokenizer, or a name on the Hugging Face hub such as 'meta-llama/Llama-3.1-8B'."
        )


def unreadable(what: str, source: str, error: Exception) -> UserError:
    """Build the error for a part of a model that a library failed to open.

    Args:
        what: The part, such as "tokenizer".
        source: Model folder, or a name on the Hugging Face hub.
        error: What the library raised; the first line of its message is kept.
    """
    if "trust_remote_code" in str(error):
        return UserError(
            f"The {what} of {source!r} needs Python code of its own, which teal never runs. Use a "
            "model of a type that transformers includes."
        )
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"Cannot open the {what} of {source!r}: {reason} Check the folder or name.")
