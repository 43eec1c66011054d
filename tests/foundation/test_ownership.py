import json
from collections.abc import Callable
from pathlib import Path

import pytest

from teal.foundation.artifact import check_destination, replace_folder, save_artifact
from teal.foundation.errors import UserError
from teal.foundation.ownership import require_no_input, require_replaceable, write_record


def save(folder: Path, kind: str = "plan", *, force: bool = False) -> None:
    save_artifact(folder, kind, {"schema_version": 1}, {}, force=force)


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def web_project(folder: Path) -> None:
    (folder / "src").mkdir(parents=True)
    (folder / "src/app.js").write_text("run()")
    (folder / "stats.json").write_text(json.dumps({"visits": 12}))
    (folder / "report.html").write_text("<p>thesis</p>")
    (folder / "plan.json").write_text("{")


def with_a_thesis(folder: Path) -> None:
    save(folder)
    (folder / "thesis.tex").write_text("three years of work")


def with_a_folder(folder: Path) -> None:
    save(folder)
    (folder / "photos").mkdir()
    (folder / "photos/one.png").write_bytes(b"1")


def statistics(folder: Path) -> None:
    save(folder, "stats")


def a_file(folder: Path) -> None:
    folder.write_text("a file")


def of_another_tool(folder: Path) -> None:
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({"kind": "plan", "steps": ["buy milk"]}))


@pytest.mark.parametrize(
    ("fill", "named"),
    [
        (web_project, "'plan.json'"),
        (with_a_thesis, "'thesis.tex'"),
        (with_a_folder, "'photos'"),
        (statistics, "'stats.json'"),
        (a_file, "is a file"),
        (of_another_tool, "'plan.json'"),
    ],
)
def test_force_deletes_nothing_that_is_no_earlier_output_of_the_kind(
    fill: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    fill(tmp_path / "out")
    before = files_below(tmp_path)
    with pytest.raises(UserError, match=named):
        save(tmp_path / "out", force=True)
    assert files_below(tmp_path) == before


def test_an_empty_folder_and_an_earlier_output_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", force=True)
    save(tmp_path / "out", force=True)
    assert list(files_below(tmp_path)) == ["out/plan.json"]


def test_a_record_lists_the_files_that_belong_to_it(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "out", "report") as folder:
        (folder / "report.html").write_text("page")
        write_record(folder, "report", {"schema_version": 1})
    require_replaceable(tmp_path / "out", "report")
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"'notes\.txt', which teal did not write"):
        require_replaceable(tmp_path / "out", "report")


def test_a_file_that_comes_while_the_output_is_made_is_not_deleted(tmp_path: Path) -> None:
    save(tmp_path / "out")

    def replace() -> None:
        with replace_folder(tmp_path / "out", "plan", force=True):
            (tmp_path / "out/notes.txt").write_text("mine")

    with pytest.raises(UserError, match=r"notes\.txt"):
        replace()
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    inner = tmp_path / "out/plan.json"
    for given in (tmp_path / "out", inner, str(inner), tmp_path / "link"):
        with pytest.raises(UserError, match="holds the input"):
            check_destination(tmp_path / "out", "plan", force=True, inputs=(None, given))
    require_no_input(tmp_path / "out", (tmp_path, "hf:name:train", tmp_path / "missing"))
