import pytest
import torch

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.attention import Attention, attention_config
from teal.kernels.cuda.decode_step import StepMemory
from teal.kernels.cuda.embed_argmax import embed_argmax_config
from teal.kernels.cuda.kernel_config import KernelConfig, header


def test_the_header_has_typed_constants_in_one_struct() -> None:
    lines = header(embed_argmax_config(torch.bfloat16, cluster=8)).splitlines()
    assert lines[:4] == [
        "#pragma once",
        '#include "types.cuh"',
        "#define TEAL_CLUSTER __cluster_dims__(1, 8)",
        "namespace teal {",
    ]
    assert "  static constexpr Dtype DTYPE = Dtype::BFLOAT16;" in lines
    assert "  static constexpr int CLUSTER = 8;" in lines


def test_kernels_without_clusters_have_no_cluster_attribute() -> None:
    assert "#define TEAL_CLUSTER\n" in header(embed_argmax_config(torch.bfloat16))


@pytest.mark.parametrize("name", ["has_norm_weights", "has_softcap"])
def test_flags_are_booleans(name: str) -> None:
    config: KernelConfig = _attention()
    assert f"  static constexpr bool {name.upper()} = false;" in header(config).splitlines()


def test_equal_configurations_share_a_kernel_and_others_do_not() -> None:
    assert _attention() == _attention()
    assert hash(_attention()) == hash(_attention())
    assert _attention(splits=4) != _attention()
    assert header(_attention(splits=4)) != header(_attention())


def _attention(splits: int = 8) -> KernelConfig:
    keys = torch.empty(1, 2, 8, 64, dtype=torch.float16, device="meta")
    memory = StepMemory(8, 8, 8, (4, splits, 64), keys.dtype, keys.device)
    return attention_config(Attention(scale=1.0), keys, memory)
