import torch

from teal.benchmark.profile import profile_step
from teal.engine.decoder import Decoder
from teal.engine.weights.loader import open_model
from tests.helpers import tiny_model


def test_kernels_of_a_step_are_counted_and_sorted(device: torch.device) -> None:
    opened = open_model(tiny_model("llama").to(device))
    decoder = Decoder(opened.architecture, opened.weights)
    kernels = profile_step(decoder, [3, 4, 5], capacity=16)
    times = [kernel.microseconds for kernel in kernels]
    assert times == sorted(times, reverse=True)
    assert min(times) > 0.0
    if device.type == "cpu":
        calls = {kernel.name: kernel.calls for kernel in kernels}
        assert calls["teal::sparse_linear"] == 6
        assert calls["teal::attend"] == 2
