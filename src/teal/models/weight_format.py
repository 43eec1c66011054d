"""Of what the weights of a model in memory are: floats, or the values of codes of few bits."""

import logging

from torch import nn

from teal.foundation.errors import UserError
from teal.quantization import FLOAT

_MARK = "_teal_weight_format"

logger = logging.getLogger(__name__)


def weight_format_of(model: nn.Module) -> str:
    """Return whose values the weights of the projections are.

    Args:
        model: A Hugging Face causal language model.

    Returns:
        "float", "int8", "int4" or "fp8", or several of them with "+" between.

    Raises:
        UserError: transformers opened it quantized, so that its weights are no matrices of floats.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise UserError(
            "transformers opened this model quantized. Give its folder to teal.load_model or "
            "teal.Engine."
        )
    found: str = model.__dict__.get(_MARK, FLOAT)
    return found


def mark_weight_format(model: nn.Module, weight_format: str) -> None:
    """Note whose values the weights of the projections are, for `weight_format_of`."""
    model.__dict__[_MARK] = weight_format


def warn_of_format(calibrated: str, weight_format: str) -> None:
    """Say in the log that a plan was calibrated with weights of another format, if it was.

    Args:
        calibrated: Format of the weights during calibration.
        weight_format: Format of the weights of the model at hand.
    """
    if calibrated != weight_format:
        logger.warning(
            "The plan was calibrated with %s weights, the model has %s ones. It works; for "
            "thresholds of its own, calibrate the model as it is opened here.",
            calibrated,
            weight_format,
        )
