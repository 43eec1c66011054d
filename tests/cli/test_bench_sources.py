import weakref

from teal.benchmark.decode import measure
from teal.benchmark.model import Workload
from teal.cli.bench_sources import Sources
from teal.quantization import Scheme
from tests.cli.conftest import MODEL

SIZES = "hidden=64,intermediate=96,layers=2,heads=4,kv-heads=2,vocab=50"
FORMATS = [(None, False), (Scheme(format="int8"), True)]
WORKLOAD = Workload(prompt_tokens=4, new_tokens=4, repeats=1)


def test_the_memory_of_a_model_is_free_before_the_next_takes_any() -> None:
    sources = Sources([MODEL], [SIZES], FORMATS, device="cpu", dtype="bfloat16")
    gone = []
    for model in sources.benchmark_models(WORKLOAD):
        assert all(reference() is None for reference in gone)
        measure(model, [0.5], [], bandwidth=1e9)
        gone.append(weakref.ref(model._weights.embedding))
        del model
    assert len(gone) == 4
