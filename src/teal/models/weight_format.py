"""The format that the weights of a model in memory come from: float, or a quantized one."""

import logging

from torch import nn

from teal.foundation.errors import UserError
from teal.quantization import FLOAT

_MARK = "_teal_weight_format"

logger = logging.getLogger(__name__)


def weight_format_of(model: nn.Module) -> str:
    """Return the format of the projections' weights.

    Args:
        model: A Hugging Face causal language model.

    Returns:
        "float", or the format that the weights were dequantized from: "int8", "int4", "fp8", or
        several joined with "+".

    Raises:
        UserError: transformers opened the model quantized, so its weights are not float matrices.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise UserError(
            "transformers opened this model quantized. Give its folder to teal.load_model or "
            "teal.Engine."
        )
    found: str = model.__dict__.get(_MARK, FLOAT)
    return found


def mark_weight_format(model: nn.Module, weight_format: str) -> None:
    """Record the format that the weights of `model` were dequantized from, in place.

    Args:
        model: A Hugging Face causal language model.
        weight_format: Format that `weight_format_of` returns from now on.
    """
    model.__dict__[_MARK] = weight_format


def warn_of_format(calibrated: str, weight_format: str) -> None:
    """Log a warning if a plan was calibrated with another weight format.

    Args:
        calibrated: Weight format during calibration.
        weight_format: Weight format of the model.
    """
    if calibrated != weight_format:
        logger.warning(
            "The plan was calibrated with %s weights, the model has %s ones. It works; for "
            "thresholds of its own, calibrate the model as it is opened here.",
            calibrated,
            weight_format,
        )
