"""Docs and examples are true: commands run, links lead somewhere, everything public is named.

Every page is one session in an empty folder with `models` and `examples` linked into it. Fences:
`bash` lines and `python` blocks run; `console` shows commands that fail, with their whole error;
the word `no-run` after the language leaves a block out, and only its options are checked.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.core import TyperGroup

import teal
from teal.allocation import STRATEGIES
from teal.cli.main import VERBS, app, main
from teal.data import TokenWindows
from teal.foundation.provenance import TextProvenance
from teal.kernels.dispatch import BACKENDS
from teal.methods import METHODS
from teal.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [
    *DOCS,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()),
    ROOT / "models/py-16m/README.md",
]

FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
REPOSITORY_PATH = re.compile(r"`((?:src|tests|docs|examples|models|benchmarks)/[\w./-]+)`")
INLINE_COMMAND = re.compile(r"`(teal [a-z][^`\n]+)`")

# Windows of each text that the commands of a page run on.
RUN_WINDOWS = 2

UsageError: Any = typer.BadParameter.__base__


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    language: str
    is_run: bool
    code: str


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def keep_few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands run on the first windows of their texts; their tests need not take as long."""
    whole = TokenWindows.__init__

    def shortened(self: TokenWindows, tokens: Tensor, provenance: TextProvenance) -> None:
        whole(self, tokens[:RUN_WINDOWS], provenance)

    monkeypatch.setattr(TokenWindows, "__init__", shortened)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder beside the models, and registries that forget what a page adds."""
    keep_few_windows(monkeypatch)
    for name in ("models", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        for registry in (FAMILIES, METHODS, STRATEGIES):
            stack.enter_context(mock.patch.dict(registry))
        # Backends are put into the lists of a device in place.
        backends = {device: list(known) for device, known in BACKENDS.items()}
        stack.enter_context(mock.patch.dict(BACKENDS, backends))
        yield


@every_page
def test_code_blocks_of_a_page_run_in_their_order(
    page: Path, workplace: None, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    runners: Mapping[str, Callable[[str], None]] = {
        "bash": run_shell,
        "console": lambda code: run_failing(code, capsys),
        "python": lambda code: exec(compile(code, page_id(page), "exec"), namespace),
    }
    for block in blocks_of(page):
        if block.is_run and block.language in runners:
            runners[block.language](block.code)


@every_page
def test_teal_commands_name_verbs_and_options_that_exist(page: Path) -> None:
    for command in teal_commands_of(page):
        assert not unknown_words_of(shlex.split(command)[1:]), command


@pytest.mark.parametrize(
    ("command", "unknown"),
    [
        ("calibrat m --text t", ["calibrat"]),
        ("calibrate m --text t --speed", ["--speed"]),
        ("bench", []),
        ("bench gemm 64x64", ["gemm"]),
        ("bench gemv 64x64 --rows=2 --prompt p", ["--prompt"]),
        ("--version", []),
    ],
)
def test_unknown_verbs_and_options_are_found_also_where_verbs_are_nested(
    command: str, unknown: list[str]
) -> None:
    assert unknown_words_of(shlex.split(command)) == unknown


@every_page
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target, anchor in LINK.findall(without_code(page)):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors_of(linked), f"{target}#{anchor}"


@every_page
def test_paths_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    missing = [path for path in REPOSITORY_PATH.findall(page.read_text()) if not exists(path)]
    assert not missing


@pytest.mark.parametrize("name", teal.__all__)
def test_docs_name_everything_public(name: str) -> None:
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in DOCS)


@pytest.mark.parametrize("verb", VERBS)
def test_docs_name_every_verb(verb: str) -> None:
    assert any(f"teal {verb}" in page.read_text() for page in DOCS)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_index_names_every_supported_family(family: str) -> None:
    assert f"`{family}`" in (ROOT / "docs/index.md").read_text()


def test_architecture_shows_the_floors_of_the_import_contracts() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    layers = next(c["layers"] for c in tools["importlinter"]["contracts"] if "layers" in c)
    floors = [f"{len(layers) - index}  {layer}" for index, layer in enumerate(layers)]
    assert "\n".join(floors) in (ROOT / "docs/architecture.md").read_text()


def test_training_example_builds_the_model_of_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples/train_py_16m")
    built = import_module("model").build().state_dict()
    trained = load_file(ROOT / "models/py-16m/model.safetensors")
    assert {name: tensor.shape for name, tensor in built.items()} == {
        name: tensor.shape for name, tensor in trained.items()
    }


def blocks_of(page: Path) -> list[Block]:
    return [
        Block(language, "no-run" not in words.split(), textwrap.dedent(code))
        for _, language, words, code in FENCE.findall(page.read_text())
    ]


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def lines_of(code: str) -> list[str]:
    joined = code.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.startswith("#")]


def teal_commands_of(page: Path) -> list[str]:
    shell = [block.code for block in blocks_of(page) if block.language in ("bash", "console")]
    lines = [line.removeprefix("$ ") for code in shell for line in lines_of(code)]
    inline = INLINE_COMMAND.findall(without_code(page))
    return [line for line in [*lines, *inline] if line.startswith("teal ")]


def run_shell(code: str) -> None:
    for line in lines_of(code):
        if line.startswith("teal "):
            assert run_teal(line) == 0, line
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            subprocess.run(["bash", "-euc", line], check=True, env={**os.environ, "PATH": path})


def run_teal(command: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[1:])
    return stopped.value.code


def run_failing(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    for session in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        command, shown = session.replace("\\\n", " ").split("\n", 1)
        capsys.readouterr()
        assert run_teal(command) == 2, command
        assert capsys.readouterr().err.strip() == shown.strip()


def unknown_words_of(words: list[str]) -> list[str]:
    """Return the word of a command that should name a verb, or those that should name options."""
    command: Any = typer.main.get_command(app)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        try:
            _, command, words = command.resolve_command(typer.Context(command), words)
        except UsageError:
            return words[:1]
    options = {"--help", *(option for parameter in command.params for option in parameter.opts)}
    given = [word.split("=")[0] for word in words if word.startswith("--")]
    return [option for option in given if option not in options]


def anchors_of(page: Path) -> set[str]:
    headings = HEADING.findall(without_code(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(path: str) -> bool:
    return (ROOT / path).exists()
