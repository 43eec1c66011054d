"""Report the largest rooms, files and functions; fail above the ceilings of the house style."""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_LINES = 300
KERNEL_LINES = 400
FUNCTION_LINES = 50
ROOM_FILES = 12
# CUDA C++ needs a file per concept for what Python puts into a class.
CUDA_ROOM_FILES = 20
# Rooms of like files: one per verb, one per published method.
FAMILIES = ("src/teal/cli", "src/teal/methods")
# A function under one of these is code for a device or for a vector unit, not Python.
DEVICE_DECORATORS = {"compiled", "intrinsic", "jit", "njit"}

FOLDERS = ("src", "tests", "examples", "tools")
PYTHON = (".py",)
CUDA = (".cu", ".cuh")
SHOWN = 5


@dataclass(frozen=True)
class Size:
    """What a room, a file or a function measures, and how much it may."""

    category: str
    name: str
    size: int
    ceiling: int

    @property
    def is_too_large(self) -> bool:
        """Tell whether it is above its ceiling."""
        return self.size > self.ceiling

    @property
    def fullness(self) -> float:
        """Return its share of what it may measure."""
        return self.size / self.ceiling


def sizes(root: Path) -> list[Size]:
    """Measure everything under `root` that has a ceiling."""
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*"))]
    sources = [path for path in paths if path.suffix in PYTHON + CUDA]
    python = [path for path in sources if path.suffix in PYTHON]
    found = [*rooms(root, sources), *(file_size(root, path) for path in sources)]
    return [*found, *(size for path in python for size in functions(root, path))]


def rooms(root: Path, sources: Iterable[Path]) -> Iterator[Size]:
    """Count the files of every package of the library, and of every folder of CUDA C++."""
    counts: dict[str, int] = {}
    for path in sources:
        room = path.parent.relative_to(root).as_posix()
        is_counted = room.startswith("src/") and path.name != "__init__.py"
        if is_counted and room not in FAMILIES:
            room += " (CUDA C++)" if path.suffix in CUDA else ""
            counts[room] = counts.get(room, 0) + 1
    for room, count in counts.items():
        ceiling = CUDA_ROOM_FILES if room.endswith("(CUDA C++)") else ROOM_FILES
        yield Size("files in a room", room, count, ceiling)


def file_size(root: Path, path: Path) -> Size:
    """Count the lines of a file."""
    name = path.relative_to(root).as_posix()
    ceiling = KERNEL_LINES if "kernels" in path.relative_to(root).parts else FILE_LINES
    return Size("lines of a file", name, len(path.read_text().splitlines()), ceiling)


def functions(root: Path, path: Path) -> Iterator[Size]:
    """Count the lines of every function's body, without its docstring."""
    name = path.relative_to(root).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_device_code(node):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (code[-1].end_lineno or 0) - code[0].lineno + 1 if code else 0
            yield Size("lines of a function", f"{name}:{node.name}", lines, FUNCTION_LINES)


def is_device_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a compiler other than Python's takes the function."""
    called = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    return any(ast.unparse(name).rsplit(".", 1)[-1] in DEVICE_DECORATORS for name in called)


def main(root: Path = Path(__file__).parents[1]) -> int:
    """Print the fullest of each category and return the exit code."""
    found = sizes(root)
    for category in dict.fromkeys(size.category for size in found):
        of_kind = [size for size in found if size.category == category]
        print(f"{category} ({len(of_kind)}, {sum(size.size for size in of_kind)} in all)")
        for size in sorted(of_kind, key=lambda size: -size.fullness)[:SHOWN]:
            print(f"{size.size:5} of {size.ceiling:3}  {size.name}")
    too_large = [size for size in found if size.is_too_large]
    for size in too_large:
        text = f"{size.name}: {size.size} {size.category}, {size.ceiling} at most. Split it."
        print(f"error: {text}", file=sys.stderr)
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
