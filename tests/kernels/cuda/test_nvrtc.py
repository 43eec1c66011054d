import pytest
import torch

pytest.importorskip("cuda.bindings")

from cuda.bindings import driver

from teal.kernels.cuda import decode_step, embed_argmax
from teal.kernels.cuda.nvrtc import Definitions, can_compile, compiled, function, function_of_step


def test_kernels_compile_for_gpus_that_the_compiler_knows_and_that_have_what_they_need() -> None:
    assert can_compile((8, 0))
    assert can_compile((9, 0))
    # Known to the compiler, but without asynchronous copies and bfloat16.
    assert not can_compile((7, 5))
    assert not can_compile((3, 7))


def test_a_source_that_does_not_compile_is_shown_with_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)decode_step.cu does not compile:\n.*CHUNK"):
        compiled(decode_step.SOURCE, (), "sm_90")


@pytest.mark.gpu
def test_kernels_of_a_step_divide_the_memory_of_a_multiprocessor_alike() -> None:
    split = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    definitions: Definitions = embed_argmax.definitions_of(torch.bfloat16)
    for wanted, percent in ((function_of_step, 60), (function, -1)):
        kernel = wanted(embed_argmax.SOURCE, "embed", definitions, 0)
        assert driver.cuFuncGetAttribute(split, kernel.handle)[1] == percent
