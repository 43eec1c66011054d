"""The command line run as a user runs it, on the model of the repository."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from teal.cli import stdlib_text
from teal.cli.main import main

MODEL = str(Path(__file__).parents[2] / "models/py-16m")
WINDOW = "64"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def is_error(self, *words: str) -> bool:
        """Tell whether it failed with one line that says all of `words`."""
        lines = self.err.strip().splitlines()
        told = len(lines) == 1 and lines[0].startswith("error: ")
        return self.code == 2 and told and all(word in lines[0] for word in words)


Teal = Callable[..., Outcome]


def run(capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> Outcome:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return Outcome(int(stopped.value.code or 0), out, err)


@pytest.fixture
def teal(capsys: pytest.CaptureFixture[str]) -> Teal:
    """Run a command and return its outcome."""
    return lambda *arguments: run(capsys, arguments)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, statistics and a plan, made by commands."""
    folder = tmp_path_factory.mktemp("workspace")
    calibration = stdlib_text.calibration_text().documents
    (folder / "calibration.txt").write_text("<|endoftext|>".join(calibration)[:60_000])
    held_out = stdlib_text.held_out_text().documents
    (folder / "held-out.txt").write_text("<|endoftext|>".join(held_out)[:20_000])
    commands = [
        ["calibrate", MODEL, "--text", folder / "calibration.txt", "--tokens", "1024",
         "--sequence-length", WINDOW, "--out", folder / "stats"],
        ["allocate", folder / "stats", "--sparsity", "0.5", "--out", folder / "plan"],
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in command])
        assert stopped.value.code == 0
    return folder
