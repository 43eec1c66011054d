import pytest

from teal.benchmark.model import BenchmarkModel, Workload
from teal.benchmark.model_configs import config_of
from teal.benchmark.tuning.decode_step import tune
from teal.cli.bench_sources import Format, Sources
from teal.foundation.errors import UserError

CONFIG = "hidden=256,intermediate=512,layers=12,heads=4,kv-heads=2,vocab=512,context=512"
WORKLOAD = Workload(prompt_tokens=8, new_tokens=4, repeats=1)


def model_on(device: str, quantize: list[Format]) -> BenchmarkModel:
    sources = Sources((), [CONFIG], quantize, device=device, dtype="bfloat16", most_layers=2)
    return next(sources.benchmark_models(WORKLOAD))


def test_configurations_keep_a_few_layers() -> None:
    assert config_of(CONFIG).num_hidden_layers == 12
    assert model_on("cpu", [(None, False)]).bytes_of_cache() == 2 * 2 * 128 * 128 * 2


def test_tuning_a_step_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="not on a GPU"):
        next(tune(model_on("cpu", [(None, False)])))


@pytest.mark.gpu
def test_every_product_of_a_step_is_tuned_dense_and_sparse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("teal.benchmark.tuning.search._DRAWN", 6)
    monkeypatch.setattr("teal.benchmark.tuning.search._NEIGHBOURS", 3)
    tasks = [task for task, _ in tune(model_on("cuda", [(None, False)]))]
    assert len(set(tasks)) == len(tasks) == 8
    assert {task.is_dense for task in tasks} == {True, False}
    assert {task.form for task in tasks} == {"hidden", "attention", "gated"}
