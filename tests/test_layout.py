"""What holds for the repository as a whole: where files are and what they may say."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src/teal"
TESTS = ROOT / "tests"

FILE_BYTES = 1024 * 1024

TRAINED_MODEL = "models/py-16m/model.safetensors"
# Tests of more than one module, each with the reason.
UNMIRRORED = {
    "engine/test_trained_model.py": "the whole engine on the embedded model",
    "kernels/test_attention.py": "attention by every backend",
    "kernels/test_products.py": "products by every backend",
    "methods/test_conformance.py": "what every method has to keep",
    "test_docs.py": "documentation",
    "test_english.py": "words",
    "test_layout.py": "places of files",
    "test_pairwise.py": "a helper of tests",
}
# Modules that need no test file of their own, each with the reason.
UNTESTED = {
    "foundation/version.py": "one constant",
    "report/rows.py": "dataclasses without code",
}
# Folders of one machine; a path inside the repository is relative.
MACHINE_PATH = re.compile(r"(?<![\w.:/*-])/(home|Users|root|work|mnt|scratch|tmp)/\w")


def tracked(pattern: str = "*") -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    names = subprocess.run(
        ["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    return [path for path in paths if path.is_file()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def packages() -> list[Path]:
    return [path.parent for path in SOURCES.rglob("__init__.py")]


def sources() -> set[Path]:
    """Return what is tested, relative to the package, and the tools beside it."""
    found = {path.relative_to(SOURCES) for path in SOURCES.rglob("[!_]*.py")}
    return found | {path.relative_to(ROOT) for path in (ROOT / "tools").glob("*.py")}


def source_of(test: Path) -> Path | None:
    """Return the source that `test_<module>.py` or `test_<module>_<aspect>.py` mirrors."""
    words = test.stem.split("_")[1:]
    names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    # The longest name first: test_gemv_kernel.py is that of gemv_kernel.py where there is one.
    candidates = [test.with_name(f"{name}.py") for name in names]
    return next((path for path in candidates if path in sources()), None)


def sources_of_tests() -> dict[str, Path | None]:
    """Return what each test file mirrors, by its name."""
    names = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    return {name: source_of(Path(name)) for name in sorted(names - UNMIRRORED.keys())}


def test_every_test_file_mirrors_a_source() -> None:
    assert not [name for name, source in sources_of_tests().items() if source is None]


def test_every_source_has_a_test_file() -> None:
    excused = {Path(name) for name in UNTESTED}
    tested = set(sources_of_tests().values())
    assert not sorted(str(source) for source in sources() - tested - excused)


def test_files_without_tests_of_their_own_are_few_and_there() -> None:
    assert len(UNTESTED) <= 8
    assert all((SOURCES / name).is_file() for name in UNTESTED)
    tested = {str(source) for source in sources_of_tests().values()}
    assert not tested & UNTESTED.keys()


@pytest.mark.parametrize("package", packages(), ids=lambda path: path.name)
def test_no_module_carries_the_name_of_what_its_package_exports(package: Path) -> None:
    dotted = ".".join(package.relative_to(SOURCES.parent).parts)
    exported = set(getattr(importlib.import_module(dotted), "__all__", ()))
    modules = {path.stem for path in package.iterdir()}
    assert not exported & modules


def test_every_public_name_can_be_imported() -> None:
    teal = importlib.import_module("teal")
    assert all(hasattr(teal, name) for name in teal.__all__)
    assert set(dir(teal)) == set(teal.__all__)
    assert not hasattr(teal, "nothing_of_this_name")


def test_packages_have_three_levels_at_most() -> None:
    assert all(len(package.relative_to(SOURCES).parts) <= 2 for package in packages())


def test_no_tracked_file_is_large_but_the_trained_model() -> None:
    large = {name_of(path) for path in tracked() if path.stat().st_size > FILE_BYTES}
    assert large <= {TRAINED_MODEL}


def test_no_tracked_file_names_a_path_of_a_machine() -> None:
    found = [
        f"{name_of(path)}: {line.strip()[:80]}"
        for path in tracked()
        if path.suffix != ".safetensors"
        for line in path.read_text(encoding="utf-8").splitlines()
        if MACHINE_PATH.search(line)
    ]
    assert not found


@pytest.mark.parametrize("text", ["@home@a", "see @work@a", "'@tmp@a'", "(@root@a)", "=@Users@a"])
def test_path_of_a_machine_is_recognised(text: str) -> None:
    # Written with another sign, because this file may not name one either.
    assert MACHINE_PATH.search(text.replace("@", "/"))


@pytest.mark.parametrize("text", ["src/work/a", "https://x.org/home/a", "./tmp/x", "/homely/a"])
def test_path_of_the_repository_or_the_web_is_no_path_of_a_machine(text: str) -> None:
    assert not MACHINE_PATH.search(text)
