from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.tuned_configs import TABLE, Task, read_table, table_text, tuned_config

STEP_FORMS, PRODUCT_FORMS = ("hidden", "attention", "gated"), ("plain", "gated")


def task(**changes: object) -> Task:
    usual = Task(
        kernel="step", form="gated", bits=16, is_dense=False, in_features=14336, out_features=4096
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def test_a_table_survives_being_written(tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    path.write_text(table_text(read_table(), "some GPU"))
    assert read_table(path) == read_table()


def test_a_task_of_the_table_gets_its_own_cut() -> None:
    for known, config in read_table().items():
        assert tuned_config(known) == config


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_kind_of_task_gets_a_cut(bits: int) -> None:
    for form, is_dense in product(STEP_FORMS, (False, True)):
        assert tuned_config(task(form=form, bits=bits, is_dense=is_dense)).threads
    for form in PRODUCT_FORMS:
        config = tuned_config(task(kernel="product", form=form, bits=bits))
        assert form == "plain" or config.warps_n % 2 == 0


def test_rows_of_a_folder_replace_those_of_the_package(tmp_path: Path) -> None:
    config = replace(tuned_config(task()), warps_k=2)
    (tmp_path / TABLE.file).write_text(table_text({task(): config}, "some GPU"))
    shipped, own = read_table(), read_table(str(tmp_path))
    assert own == {**shipped, task(): config}
    assert next(iter(own)) == task()


def test_another_size_gets_the_cut_of_the_nearest() -> None:
    assert tuned_config(task(in_features=10500, out_features=4000)) == tuned_config(
        task(in_features=11008)
    )
    assert tuned_config(task(in_features=16000, out_features=5000)) == tuned_config(task())
