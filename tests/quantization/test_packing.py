import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teal.quantization.packing import pack_words, unpack_words
from tests.quantization import packers

bits_and_sizes = given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)


def drawn(bits: int, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=40)
@bits_and_sizes
def test_packing_round_trips_at_every_size(bits: int, rows: int, columns: int, seed: int) -> None:
    values = drawn(bits, rows, columns, seed)
    assert torch.equal(unpack_words(pack_words(values, bits), bits, columns), values)


@settings(deadline=None, max_examples=20)
@bits_and_sizes
def test_first_columns_are_in_the_lowest_bits(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    values = drawn(bits, rows, columns, seed)
    assert torch.equal(pack_words(values, bits), packers.words(values, bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_non_contiguous_words_are_unpacked(bits: int) -> None:
    values = drawn(bits, 6, 16, 0)
    apart = pack_words(values, bits).T.contiguous().T
    assert torch.equal(unpack_words(apart, bits, 16), values)
