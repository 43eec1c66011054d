import subprocess
import sys
from pathlib import Path
from typing import Never

import pytest

from teal.cli.main import VERBS
from teal.foundation.version import __version__
from tests.cli.conftest import MODEL, Teal


def test_help_lists_every_verb(teal: Teal) -> None:
    outcome = teal("--help")
    assert outcome.code == 0
    assert all(verb in outcome.out for verb in VERBS)


def test_help_waits_for_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from teal.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'triton', 'numba'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_every_verb_ends_with_two_examples(teal: Teal, verb: str) -> None:
    outcome = teal(verb, "--help")
    assert outcome.code == 0
    examples = outcome.out.split("Examples:")[1]
    assert examples.count(f"teal {verb}") >= 2


def test_version_is_printed(teal: Teal) -> None:
    assert teal("--version").out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["evalute"], ["No such command"], id="unknown verb"),
        pytest.param(["evaluate"], ["Missing", "MODEL"], id="missing argument"),
        pytest.param(["evaluate", MODEL], ["--text"], id="missing option"),
        pytest.param(["evaluate", MODEL, "--txt", "x"], ["--txt"], id="unknown option"),
        pytest.param(
            ["allocate", "s", "--sparsity", "half", "--out", "p"],
            ["--sparsity", "number"],
            id="not a number",
        ),
    ],
)
def test_wrong_usage_is_one_line_that_points_to_help(
    teal: Teal, arguments: list[str], words: list[str]
) -> None:
    assert teal(*arguments).is_error(*words, "--help")


def test_an_interrupt_is_one_line(
    teal: Teal, monkeypatch: pytest.MonkeyPatch, workspace: Path
) -> None:
    def interrupt(*args, **kwargs) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setattr("teal.plan.SparsityPlan.save", interrupt)
    outcome = teal("allocate", workspace / "stats", "--sparsity", "0.3", "--out", workspace / "x")
    assert outcome.code == 130
    assert outcome.err.startswith("error: Interrupted")
    assert not (workspace / "x").exists()


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "teal", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == __version__
