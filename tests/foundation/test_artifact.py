import json
import os
import re
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from teal.foundation.artifact import (
    check_destination,
    load_artifact,
    read_json,
    replace_folder,
    save_artifact,
    well_formed,
    write_text,
)
from teal.foundation.errors import UserError
from tests.helpers import kill_before_file_event

TENSORS = {
    "half": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
    "strided": torch.arange(6).reshape(2, 3).T,
    "empty": torch.empty(0, dtype=torch.int64),
}


def save(folder: Path, text: str = "new", *, force: bool = False) -> None:
    save_artifact(folder, "plan", {"schema_version": 1, "text": text}, TENSORS, force=force)


def load(folder: Path) -> str:
    payload, tensors = load_artifact(folder, "plan", 1)
    assert tensors.keys() == TENSORS.keys()
    return str(payload["text"])


def edit_json(folder: Path, **changes: object) -> None:
    path = folder / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path / "plan")
    payload, tensors = load_artifact(tmp_path / "plan", "plan", 1)
    assert (payload["kind"], payload["schema_version"], payload["text"]) == ("plan", 1, "new")
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_artifact_without_tensors_is_one_file(tmp_path: Path) -> None:
    save_artifact(tmp_path / "plan", "plan", {"schema_version": 1}, {})
    assert [path.name for path in (tmp_path / "plan").iterdir()] == ["plan.json"]
    assert load_artifact(tmp_path / "plan", "plan", 1)[1] == {}


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)]
)
def test_files_get_the_permissions_that_the_user_chose(
    umask: int, file: int, folder: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path / "plan")
        write_text(tmp_path / "note.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plan").stat().st_mode) == folder
    for path in [*(tmp_path / "plan").iterdir(), tmp_path / "note.txt"]:
        assert stat.S_IMODE(path.stat().st_mode) == file


def test_existing_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    save(tmp_path / "plan", "old")
    with pytest.raises(UserError, match=r"already exists\. Choose another, or .* --force"):
        save(tmp_path / "plan")
    assert load(tmp_path / "plan") == "old"
    save(tmp_path / "plan", force=True)
    assert load(tmp_path / "plan") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_link_goes_on_pointing_to_what_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "plan", "old")
    (tmp_path / "link").symlink_to("plan")
    save(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "plan") == "new"


def test_missing_parents_are_made(tmp_path: Path) -> None:
    save(tmp_path / "a/b/plan")
    assert load(tmp_path / "a/b/plan") == "new"


def test_destination_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for action in (partial(check_destination, kind="plan"), save):
        with pytest.raises(UserError, match=r"file' is not a writable folder\. Choose another"):
            action(tmp_path / "file/sub/plan")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_destination_in_a_locked_folder_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    with pytest.raises(UserError, match=r"locked' is not a writable folder\. Choose another"):
        check_destination(locked / "plan", "plan")


def test_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"File name too long\. Make room or choose another"):
        save(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "is not a folder"),
        (".", "plan.json' does not exist"),
        ("x" * 300, "not a folder"),
    ],
    ids=["missing", "working folder", "too long"],
)
def test_folder_without_an_artifact_is_refused(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{reason}.*(Give a folder|Check the path)"):
        load_artifact(Path(name), "plan", 1)


@pytest.mark.parametrize(
    "changes",
    [{"kind": "stats"}, {"kind": None}, {"schema_version": None}, {"schema_version": "1"}],
    ids=["another kind", "no kind", "no version", "version in words"],
)
def test_foreign_json_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    save(tmp_path / "plan")
    edit_json(tmp_path / "plan", **changes)
    with pytest.raises(UserError, match=r"plan\.json' was not written by teal\. Make it anew"):
        load(tmp_path / "plan")


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "plan")
    edit_json(tmp_path / "plan", schema_version=2)
    with pytest.raises(UserError, match=r"version 2, this teal reads up to 1\. Update teal"):
        load(tmp_path / "plan")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged or not JSON"),
        (b'{"kind": "pl', "damaged or not JSON"),
        (b"\xff\xfe", "damaged or not JSON"),
        (b"[" * 100_000, "damaged or not JSON"),
        (b"[1, 2]", "holds no JSON object"),
    ],
    ids=["empty", "truncated", "not text", "nested without end", "a list"],
)
def test_damaged_json_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"plan\.json' (is )?{reason}.*\. Make it anew"):
        read_json(path)


def test_json_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Cannot read .*: Is a directory"):
        read_json(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_last_bit, Path.unlink])
def test_damaged_tensors_are_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path / "plan")
    damage(tmp_path / "plan/plan.safetensors")
    with pytest.raises(UserError, match=r"safetensors' is missing or damaged\. Make the artifact"):
        load(tmp_path / "plan")


def test_tensors_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "plan")
    (tmp_path / "plan/plan.safetensors").write_bytes(b"")
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    edit_json(tmp_path / "plan", tensors_sha256=nothing)
    with pytest.raises(UserError, match=r"safetensors' is missing or damaged"):
        load(tmp_path / "plan")


@pytest.mark.parametrize(
    "error", [KeyError("text"), TypeError("no"), ValueError("no"), OverflowError("no")], ids=repr
)
def test_malformed_content_becomes_one_sentence(error: Exception) -> None:
    with (
        pytest.raises(
            UserError, match=rf"'plan' is damaged \({type(error).__name__}.*Make it anew"
        ),
        well_formed(Path("plan")),
    ):
        raise error


def test_error_with_a_cure_passes_unchanged() -> None:
    cure = UserError("Do this.")
    with pytest.raises(UserError) as caught, well_formed(Path("plan")):
        raise cure
    assert caught.value is cure


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_old_artifact_and_no_litter(
    error: type[BaseException], tmp_path: Path
) -> None:
    save(tmp_path / "plan", "old")
    with pytest.raises(error), replace_folder(tmp_path / "plan", "plan", force=True) as temporary:
        (temporary / "plan.json").write_text("half of")
        raise error
    assert load(tmp_path / "plan") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_kill_at_any_moment_leaves_the_old_artifact_or_the_new(tmp_path: Path) -> None:
    found = []
    for moment in range(100):
        folder = tmp_path / str(moment) / "plan"
        save(folder, "old")
        killed = kill_before_file_event(moment, partial(save, folder, force=True))
        found.append(load(folder))
        save(folder, "newest", force=True)
        assert load(folder) == "newest"
        if not killed:
            break
    assert not killed
    assert re.fullmatch("(old){6,}(new){2,}", "".join(found))


def test_kill_at_any_moment_leaves_the_old_text_or_the_new(tmp_path: Path) -> None:
    found = []
    for moment in range(100):
        path = tmp_path / f"{moment}.txt"
        write_text(path, "old")
        killed = kill_before_file_event(moment, partial(write_text, path, "new"))
        found.append(path.read_text())
        if not killed:
            break
    assert not killed
    assert re.fullmatch("(old){2,}(new)+", "".join(found))
