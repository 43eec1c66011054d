import pytest

from teal.foundation.errors import UserError
from teal.models.weight_format import mark_weight_format, warn_of_format, weight_format_of
from tests.helpers import tiny_model


def test_format_is_float_until_it_is_marked() -> None:
    model = tiny_model("llama")
    assert weight_format_of(model) == "float"
    mark_weight_format(model, "int8")
    assert weight_format_of(model) == "int8"


def test_mark_is_not_in_the_state_dict() -> None:
    model = tiny_model("llama")
    before = list(model.state_dict())
    mark_weight_format(model, "int8")
    assert list(model.state_dict()) == before


def test_model_that_transformers_quantized_is_refused() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UserError, match=r"opened this model quantized\. Give its folder"):
        weight_format_of(model)


def test_format_other_than_that_of_calibration_is_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_format("int8", "int8")
    assert not caplog.messages
    warn_of_format("float", "int4")
    (message,) = caplog.messages
    assert "calibrated with float weights, the model has int4 ones" in message
    assert "\n" not in message
