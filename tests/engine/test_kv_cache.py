import pytest
import torch

from teal.engine.kv_cache import KeyValueCache
from teal.foundation.errors import UserError
from teal.models.architectures import Architecture, architecture_of
from tests.helpers import ENGINE_FAMILIES, tiny_model

CPU = torch.device("cpu")


def architecture(family: str = "llama") -> Architecture:
    return architecture_of(tiny_model(family).config)


def cache_of(batch_size: int = 2, capacity: int = 6, family: str = "llama") -> KeyValueCache:
    return KeyValueCache(architecture(family), batch_size, capacity, torch.float32, CPU)


@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_every_layer_has_memory_of_its_own(family: str) -> None:
    cache = cache_of(3, 7, family)
    tensors = [*cache.keys, *cache.values]
    assert len(cache.keys) == len(cache.values) == 2
    assert len({tensor.data_ptr() for tensor in tensors}) == 4
    for tensor in tensors:
        assert tensor.shape == (3, 2, 7, 8)
        assert tensor.is_contiguous()
        assert not tensor.any()


def test_cache_has_the_dtype_and_device_asked_for(device: torch.device) -> None:
    cache = KeyValueCache(architecture(), 1, 4, torch.bfloat16, device)
    assert {tensor.dtype for tensor in (*cache.keys, *cache.values)} == {torch.bfloat16}
    assert cache.positions.dtype == torch.int64
    tensors = (*cache.keys, *cache.values, *cache.cosines, *cache.sines, cache.positions)
    assert {tensor.device.type for tensor in tensors} == {device.type}


def test_rotary_tables_have_the_length_of_the_cache_and_are_shared() -> None:
    cache = cache_of(1, 9)
    expected = architecture().ropes[0].tables(9, CPU)
    assert torch.equal(cache.cosines[1], expected[0])
    assert torch.equal(cache.sines[1], expected[1])
    assert cache.cosines[0] is cache.cosines[1]


def test_rotary_tables_of_gemma3_differ_by_layer_type() -> None:
    cache = cache_of(1, 9, "gemma3_text")
    assert not torch.equal(cache.cosines[0], cache.cosines[1])


def test_sequences_begin_empty_and_are_reset_in_place() -> None:
    cache = cache_of(3)
    positions = cache.positions
    assert cache.lengths == [0, 0, 0]
    positions.copy_(torch.tensor([5, 2, 3]))
    cache.rewind(2)
    assert cache.lengths == [3, 0, 1]
    cache.reset()
    assert cache.lengths == [0, 0, 0]
    assert cache.positions is positions
    assert cache.batch_size == 3


def test_room_is_counted_per_sequence() -> None:
    cache = cache_of(2, 6)
    cache.positions[1] = 4
    assert cache.require_room(6, 0) == 0
    assert cache.require_room(2, 1) == 4


def test_too_many_tokens_are_refused_with_needed_and_available_room() -> None:
    cache = cache_of(2, 6)
    cache.positions[1] = 4
    with pytest.raises(UserError, match=r"^7 tokens need room and the cache has 6\. Shorten the"):
        cache.require_room(3, 1)


@pytest.mark.parametrize(("batch_size", "capacity"), [(0, 4), (1, 0)])
def test_cache_without_sequences_or_room_is_refused(batch_size: int, capacity: int) -> None:
    with pytest.raises(UserError, match=r"holds nothing\. Give 1 or more"):
        cache_of(batch_size, capacity)


def test_cache_too_large_for_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal.engine.weights.memory.free_memory", lambda device: 10**9)
    message = r"^The keys and values of 8 × 4000000 tokens need 8\.2 GB and cpu has 1\.0 GB free"
    with pytest.raises(UserError, match=message):
        cache_of(8, 4_000_000)
