import pytest
import torch

pytest.importorskip("cuda.bindings")

from cuda.bindings import driver

from teal.kernels.cuda import decode_step, embed_argmax
from teal.kernels.cuda.nvrtc import can_compile, compiled, function, function_of_step


def test_kernels_compile_for_known_gpus_with_bfloat16_and_asynchronous_copies() -> None:
    assert can_compile((8, 0))
    assert can_compile((9, 0))
    # Known to the compiler, but without bfloat16 and asynchronous copies.
    assert not can_compile((7, 5))
    assert not can_compile((3, 7))


def test_a_compile_error_shows_the_source_and_the_words_of_the_compiler() -> None:
    config = embed_argmax.embed_argmax_config(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"(?s)decode_step.cu does not compile:\n.*CHUNK"):
        compiled(decode_step.SOURCE, config, "sm_90")


@pytest.mark.gpu
def test_kernels_of_a_decode_step_prefer_the_same_carve_out() -> None:
    carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    config = embed_argmax.embed_argmax_config(torch.bfloat16)
    for wanted, percent in ((function_of_step, 60), (function, -1)):
        kernel = wanted(embed_argmax.SOURCE, "embed", config, 0)
        assert driver.cuFuncGetAttribute(carveout, kernel.handle)[1] == percent
