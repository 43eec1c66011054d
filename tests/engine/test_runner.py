import pytest
import torch

from teal.engine import runner as session_module
from teal.engine.decoder import Decoder
from teal.engine.request import GenerationSettings
from teal.engine.runner import Session
from teal.engine.weights.loader import open_model
from tests.helpers import tiny_model

SETTINGS = GenerationSettings(max_new_tokens=6)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


@pytest.fixture
def opened(device):
    return open_model(tiny_model("llama").to(device))


def rows(session, decoder, settings=SETTINGS, prompts=PROMPTS):
    with torch.inference_mode():
        session.prepare(decoder, settings)
    return [tokens for tokens, _ in session.rows(decoder, settings, prompts)]


def test_a_session_used_again_gives_the_same(opened):
    session = Session(opened.architecture, opened.weights, 2, 16)
    decoder = Decoder(opened.architecture, opened.weights)
    first = rows(session, decoder)
    sampled = GenerationSettings(max_new_tokens=6, temperature=1.0, repetition_penalty=1.3)
    rows(session, decoder, sampled, PROMPTS[::-1])
    assert rows(session, decoder) == first


def test_a_session_fits_its_number_of_streams_and_up_to_its_capacity(opened):
    session = Session(opened.architecture, opened.weights, 2, 16)
    assert session.fits(2, 16)
    assert not session.fits(2, 17)
    assert not session.fits(1, 16)


def test_only_so_many_steps_are_kept(opened, monkeypatch):
    monkeypatch.setattr(session_module, "_STEPS", 2)
    session = Session(opened.architecture, opened.weights, 2, 16)
    decoders = [Decoder(opened.architecture, opened.weights) for _ in range(3)]
    results = [rows(session, decoder) for decoder in (*decoders, decoders[0])]
    assert results == [results[0]] * 4
    assert len(session._steps) == 2
