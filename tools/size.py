"""Report the largest files and functions of the package; fail above the ceilings."""

import ast
import sys
from pathlib import Path

FILE_LINES = 300
KERNEL_LINES = 400
FUNCTION_LINES = 50
SHOWN = 5

ROOT = Path(__file__).parents[1] / "src" / "teal"


def file_ceiling(path: Path) -> int:
    """Return how many lines a file may have."""
    return KERNEL_LINES if path.parent.name == "kernels" else FILE_LINES


def body_lines(function: ast.FunctionDef) -> int:
    """Return the lines of a function's body, without its docstring."""
    code = function.body[1:] if ast.get_docstring(function) else function.body
    return code[-1].end_lineno - code[0].lineno + 1 if code else 0


def functions(path: Path) -> list[tuple[int, str]]:
    """Return size of the body in lines and name of every function of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        (body_lines(node), f"{path.relative_to(ROOT)}:{node.name}")
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    ]


def main() -> int:
    """Print the tables and return the exit code."""
    paths = sorted(ROOT.rglob("*.py"))
    sizes = {path: len(path.read_text().splitlines()) for path in paths}
    is_kernel = {path: path.parent.name == "kernels" for path in paths}
    every = sorted((f for path in paths for f in functions(path)), reverse=True)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:SHOWN]
    print(f"{len(paths)} files, {sum(sizes.values())} lines")
    for path, lines in largest:
        print(f"{lines:5} {path.relative_to(ROOT)}")
    for lines, name in every[:SHOWN]:
        print(f"{lines:5} {name}")
    kernels = {str(path.relative_to(ROOT)) for path in paths if is_kernel[path]}
    too_long = [str(path.relative_to(ROOT)) for path in paths if sizes[path] > file_ceiling(path)]
    too_long += [
        name
        for lines, name in every
        if lines > FUNCTION_LINES and name.split(":")[0] not in kernels
    ]
    for name in too_long:
        print(f"error: {name} is above its ceiling. Split it.", file=sys.stderr)
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
