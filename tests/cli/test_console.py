import json
import subprocess
import sys

import pytest

from teal.cli.console import print_json, print_table, progress_bar, say


def test_json_is_alone_on_stdout_and_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"perplexity": 1.5, "names": ["[bold]", "×"], "none": None}
    print_json(content)
    out, err = capsys.readouterr()
    assert json.loads(out) == content
    assert not err


def test_table_keeps_every_character_of_long_cells(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.31.self_attn.q_proj" * 8
    print_table("Title", ["name", "value"], [[name, "1.5"]])
    out = capsys.readouterr().out
    assert out.startswith("Title")
    shown = "".join(character for character in out if character.isalnum() or character in "._")
    assert name in shown.replace("1.5", "")
    assert max(len(line) for line in out.splitlines()) <= 120


def test_numbers_of_a_table_are_set_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Title", ["name", "value"], [["a", "1"], ["b", "1000"]])
    rows = [line for line in capsys.readouterr().out.splitlines() if "1" in line]
    assert (
        len(
            {
                line.rstrip(" │|").rindex(value) + len(value)
                for line, value in zip(rows, ("1", "1000"), strict=True)
            }
        )
        == 1
    )


@pytest.mark.parametrize("message", ["[red]not markup[/red]", ":smile: 12 %", "x" * 300])
def test_line_for_a_person_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str], message: str
) -> None:
    say(message)
    assert capsys.readouterr().out == f"{message}\n"


def test_progress_bar_yields_every_item_and_is_silent_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(progress_bar([1, 2, 3], "count")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_libraries_are_quiet_and_settings_of_the_user_are_kept() -> None:
    program = (
        "import os\n"
        "from teal.cli.console import quiet_libraries\n"
        "quiet_libraries()\n"
        "import transformers\n"
        "print(os.environ['HF_HUB_DISABLE_PROGRESS_BARS'], os.environ['TOKENIZERS_PARALLELISM'],\n"
        "      transformers.logging.get_verbosity() == transformers.logging.ERROR)"
    )
    environment = {"TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        ["env", *(f"{name}={value}" for name, value in environment.items()),
         sys.executable, "-c", program],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "true", "True"]
