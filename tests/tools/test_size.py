import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
LONG_BODY = "    x = 1\n" * 51


def load_size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("size", ROOT / "tools/size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "size", module)
        spec.loader.exec_module(module)
    return module


size = load_size()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], None]:
    """Write a file of a repository that is otherwise empty."""

    def write_file(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write_file


def errors(root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    code = size.main(root)
    lines = capsys.readouterr().err.splitlines()
    assert code == bool(lines)
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.parametrize(
    ("name", "ceiling"),
    [
        ("src/teal/a.py", 300),
        ("tests/test_a.py", 300),
        ("tools/a.py", 300),
        ("src/teal/kernels/a.py", 400),
        ("src/teal/kernels/cuda/csrc/a.cuh", 400),
        ("src/teal/kernels/cuda/csrc/a.cu", 400),
        ("tests/kernels/test_a.py", 400),
    ],
)
def test_file_may_be_as_long_as_its_ceiling_and_no_longer(
    write: Callable[[str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    ceiling: int,
) -> None:
    write(name, "\n" * ceiling)
    assert not errors(tmp_path, capsys)
    write(name, "\n" * (ceiling + 1))
    expected = f"{name}: {ceiling + 1} lines of a file, {ceiling} at most. Split it."
    assert errors(tmp_path, capsys) == [expected]


@pytest.mark.parametrize(
    ("room", "ending", "ceiling"),
    [("src/teal", "py", 12), ("src/teal/engine", "py", 12), ("src/teal/csrc", "cuh", 20)],
)
def test_room_may_hold_as_many_files_as_its_ceiling(
    write: Callable[[str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    room: str,
    ending: str,
    ceiling: int,
) -> None:
    write(f"{room}/__init__.py", "")
    for index in range(ceiling):
        write(f"{room}/a{index}.{ending}", "")
    assert not errors(tmp_path, capsys)
    write(f"{room}/one_more.{ending}", "")
    (error,) = errors(tmp_path, capsys)
    assert f"{ceiling + 1} files in a room, {ceiling} at most" in error


@pytest.mark.parametrize("room", ["src/teal/cli", "src/teal/methods", "tests/engine"])
def test_rooms_of_like_files_and_of_tests_may_grow(
    write: Callable[[str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], room: str
) -> None:
    for index in range(30):
        write(f"{room}/a{index}.py", "")
    assert not errors(tmp_path, capsys)


@pytest.mark.parametrize("decorator", ["", "@cache\n", "@dataclass(frozen=True)\n"])
@pytest.mark.parametrize("folder", ["src/teal", "src/teal/kernels", "tests/kernels"])
def test_function_of_fifty_one_lines_is_too_long_in_kernels_too(
    write: Callable[[str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    decorator: str,
) -> None:
    docstring = '    """Say what it does."""\n'
    write(f"{folder}/a.py", f"{decorator}def launch():\n{docstring}{LONG_BODY}")
    (error,) = errors(tmp_path, capsys)
    assert error.startswith(f"{folder}/a.py:launch: 51 lines of a function, 50 at most.")
    write(f"{folder}/a.py", f"{decorator}def launch():\n{docstring}{LONG_BODY[10:]}")
    assert not errors(tmp_path, capsys)


@pytest.mark.parametrize("decorator", ["@triton.jit", "@compiled(fuse=True)", "@intrinsic"])
def test_device_code_may_be_longer(
    write: Callable[[str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    decorator: str,
) -> None:
    write("src/teal/kernels/a.py", f"{decorator}\ndef kernel():\n{LONG_BODY}")
    assert not errors(tmp_path, capsys)


def test_fullest_of_each_category_is_printed(
    write: Callable[[str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("src/teal/a.py", "def add():\n    return 1\n")
    write("src/teal/b.py", "\n")
    assert size.main(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "files in a room (1, 2 in all)",
        "    2 of  12  src/teal",
        "lines of a file (2, 3 in all)",
        "    2 of 300  src/teal/a.py",
        "    1 of 300  src/teal/b.py",
        "lines of a function (1, 1 in all)",
        "    1 of  50  src/teal/a.py:add",
    ]
