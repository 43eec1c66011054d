"""Report the largest files and functions; fail above the ceilings."""

import ast
import sys
from pathlib import Path

FILE_LINES = 300
KERNEL_LINES = 400
FUNCTION_LINES = 50
SHOWN = 5

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "examples", "tools")


def is_kernel(path: Path) -> bool:
    """Tell whether a file holds kernels, which may be longer."""
    return "kernels" in path.parts


def body_lines(function: ast.FunctionDef) -> int:
    """Return the lines of a function's body, without its docstring."""
    code = function.body[1:] if ast.get_docstring(function) else function.body
    return (code[-1].end_lineno or 0) - code[0].lineno + 1 if code else 0


def functions(path: Path) -> list[tuple[int, str]]:
    """Return lines and name of every function in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        (body_lines(node), f"{path.relative_to(ROOT)}:{node.name}")
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    ]


def main() -> int:
    """Print the largest of both and return the exit code."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files = {path: len(path.read_text().splitlines()) for path in paths}
    bodies = {path: functions(path) for path in paths}
    too_long = [
        str(path.relative_to(ROOT))
        for path, lines in files.items()
        if lines > (KERNEL_LINES if is_kernel(path) else FILE_LINES)
    ]
    too_long += [
        name
        for path, entries in bodies.items()
        for lines, name in entries
        if lines > FUNCTION_LINES and not is_kernel(path)
    ]
    print(f"{len(files)} files, {sum(files.values())} lines")
    for path, lines in sorted(files.items(), key=lambda entry: -entry[1])[:SHOWN]:
        print(f"{lines:5} {path.relative_to(ROOT)}")
    every = [entry for entries in bodies.values() for entry in entries]
    for lines, name in sorted(every, reverse=True)[:SHOWN]:
        print(f"{lines:5} {name}")
    for name in too_long:
        print(f"error: {name} is above its ceiling. Split it.", file=sys.stderr)
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
