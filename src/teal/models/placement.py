"""The device a model runs on and the dtype of its weights, resolved from a user's choice."""

import torch

from teal.foundation.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


def resolve_device(device: str) -> torch.device:
    """Turn one of `DEVICES` into an available device; "auto" prefers CUDA.

    Raises:
        UserError: The name is unknown, or CUDA was asked for and is not available.
    """
    if device not in DEVICES:
        raise UserError(f"Unknown device {device!r}. Known: {', '.join(DEVICES)}.")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("No CUDA device is available here. Use --device cpu.")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def resolve_dtype(dtype: str) -> torch.dtype | str:
    """Turn one of `DTYPES` into what `from_pretrained` takes: a torch dtype, or "auto".

    Raises:
        UserError: The name is unknown.
    """
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
    return dtype if dtype == "auto" else getattr(torch, dtype)
