import json

import pytest
import torch

from teal.cli.bench_options import bench_dtype, print_records
from teal.foundation.errors import UserError


class Measured:
    def to_dict(self) -> dict[str, int]:
        return {"microseconds": 7}


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_dtype_is_known_by_its_name(name: str) -> None:
    assert bench_dtype(name) == getattr(torch, name)


def test_a_dtype_to_compare_in_has_to_be_named() -> None:
    with pytest.raises(UserError, match="Give a --dtype to compare in"):
        bench_dtype("auto")
    with pytest.raises(UserError, match="int3"):
        bench_dtype("int3")


def test_records_are_printed_with_the_machine_and_its_bandwidth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_records([Measured()], 1e9, torch.device("cpu"), "abc")
    printed = json.loads(capsys.readouterr().out)
    assert printed["results"] == [{"microseconds": 7}]
    assert printed["bandwidth"] == 1e9
    assert printed["machine"]["commit"] == "abc"
