from pathlib import Path

import pytest

from teal.checkpoints.location import check_source, folder_of, load_config
from teal.foundation.errors import UserError
from tests.helpers import tiny_model


def test_configuration_is_read_without_weights(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).model_type == "llama"


def test_folder_of_a_local_model_is_the_folder_itself(tmp_path: Path) -> None:
    assert folder_of(str(tmp_path)) == tmp_path


def test_folder_of_a_hub_name_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(source: str, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        return str(tmp_path / source)

    monkeypatch.setattr("teal.checkpoints.location.snapshot_download", download)
    assert folder_of("someone/something") == tmp_path / "someone/something"


def test_source_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for source in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(UserError, match=r"is not a model folder\. Give a folder with config"):
            load_config(str(source))
    with pytest.raises(UserError, match=r"no config\.json\. Give a folder that save_pretrained"):
        load_config(str(tmp_path))


def test_source_that_looks_like_a_hub_name_is_accepted() -> None:
    check_source("someone/something")


def test_name_that_the_hub_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(source: str, **options: object) -> None:
        raise OSError(f"{source} is not there.\nMany more lines.")

    monkeypatch.setattr("teal.checkpoints.location.AutoConfig.from_pretrained", offline)
    with pytest.raises(UserError) as caught:
        load_config("someone/something")
    assert str(caught.value) == (
        "Cannot open the model configuration of 'someone/something': someone/something is not "
        "there. Check the folder or name."
    )


def test_damaged_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"^Cannot open the model configuration .* Check the fold"):
        load_config(str(tmp_path))
