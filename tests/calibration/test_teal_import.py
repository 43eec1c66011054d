import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teal.calibration.artifact import CalibrationStats
from teal.calibration.teal_import import import_teal
from teal.foundation.errors import UserError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}
PUBLISHED_CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
}
PUBLISHED_TYPES = {"Llama-3-8B": "llama", "Mistral-7B": "mistral"}
INPUTS = ("attention_input", "o_input", "mlp_input", "down_input")
TOKENS = 500


def published(x: Tensor, bins: int = 400) -> tuple[Tensor, Tensor]:
    """Bin as TEAL does: even bins between the 1 % and 99 % quantiles, one wide bin at each end."""
    low, high = x.quantile(0.01), x.quantile(0.99)
    inner = torch.linspace(float(low), float(high), bins - 1)
    edges = torch.cat([x.min().view(1), inner, x.max().view(1)])
    counts = torch.histogram(x, edges)[0]
    return counts, (edges[1:] + edges[:-1]) / 2


def activations(layer: int, name: str, in_features: int) -> Tensor:
    torch.manual_seed(10 * layer + INPUTS.index(name))
    # The skewed mean is what breaks thresholds that take x for symmetric.
    return torch.randn(TOKENS * in_features) * 0.1 + 0.02


def write_model(folder: Path, layers: range = range(2)) -> Path:
    for layer in layers:
        for module, names, output_sizes in (
            ("self_attn", {"h1": "attention_input", "h2": "o_input"}, (8, 8)),
            ("mlp", {"h1": "mlp_input", "h2": "down_input"}, (8, 20)),
        ):
            content = {}
            for (key, name), width in zip(names.items(), output_sizes, strict=True):
                content[key], content[f"{key}_centers"] = published(activations(layer, name, width))
            file = folder / "histograms" / f"layer-{layer}" / module / "histograms.pt"
            file.parent.mkdir(parents=True)
            torch.save(content, file)
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIG | changes))
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


def test_imported_statistics_cover_every_projection(model: Path, tmp_path: Path) -> None:
    stats = import_teal(model, write_config(tmp_path))
    assert len(stats.model.shapes) == 14
    assert stats.model.shapes["model.layers.1.self_attn.k_proj"] == (8, 4)
    assert stats.model.shapes["model.layers.1.mlp.down_proj"] == (20, 8)
    for name in stats.model.shapes:
        assert stats.of(name).count == TOKENS
        assert stats.of(name).moments is None
    assert "tiny" in stats.text.source


@pytest.mark.parametrize("name", INPUTS)
def test_imported_thresholds_are_quantiles_of_the_magnitude(
    model: Path, tmp_path: Path, name: str
) -> None:
    statistics = import_teal(model, write_config(tmp_path)).inputs[f"model.layers.1.{name}"]
    magnitude = activations(1, name, statistics.in_features).abs()
    for sparsity in (0.05, 0.25, 0.5, 0.75, 0.95):
        reached = float((magnitude <= statistics.quantile(sparsity)).double().mean())
        # Half a bin of 1/400 of the range.
        assert reached == pytest.approx(sparsity, abs=0.01)


def test_outliers_lie_between_the_inner_bins_and_the_extremes(model: Path, tmp_path: Path) -> None:
    statistics = import_teal(model, write_config(tmp_path)).inputs["model.layers.0.down_input"]
    x = activations(0, "down_input", 20)
    assert statistics.histogram.total == x.numel()
    assert statistics.histogram.cdf(float(x.abs().max()) * 1.01) == pytest.approx(1.0)
    assert float(x.quantile(0.99)) < statistics.quantile(0.99) < float(x.abs().max())


def test_head_dim_need_not_be_hidden_size_over_heads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"o_input has 250 tokens and .*attention_input 500"):
        import_teal(write_model(tmp_path / "tiny"), write_config(tmp_path, head_dim=8))


def test_missing_layers_are_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", range(1, 2))
    config = write_config(tmp_path, num_hidden_layers=4)
    with pytest.raises(UserError, match=r"lacks the layers 0, 2, 3 of 4\. Download them"):
        import_teal(model, config)


def test_present_layers_can_be_taken_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", range(1, 2))
    stats = import_teal(model, write_config(tmp_path), allow_missing=True)
    assert list(stats.inputs) == [f"model.layers.1.{name}" for name in INPUTS]
    with pytest.raises(UserError, match=r"not 'model\.layers\.0\.self_attn\.q_proj'"):
        stats.of("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"model_type": "phi3"}, "'phi3' fuses projections"),
        ({"num_hidden_layers": 1}, r"holds layer-1, but the config has 1 layers"),
        ({"hidden_size": None}, r"hidden_size = None, not a positive integer"),
        ({"num_key_value_heads": "one"}, r"num_key_value_heads = 'one'"),
        ({"num_attention_heads": 0}, r"num_attention_heads = 0"),
        ({"intermediate_size": 10}, r"down_input has 1000 tokens .* Give the config"),
    ],
    ids=["unsupported", "fused", "layers", "absent", "text", "zero", "shape"],
)
def test_config_that_does_not_fit_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], cure: str
) -> None:
    with pytest.raises(UserError, match=cure):
        import_teal(model, write_config(tmp_path, **changes))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2000])


def replace_by_text(file: Path) -> None:
    file.write_text("<html>404</html>")


class Intruder:
    """Would leave a folder behind if its pickle were loaded without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def replace_by_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Intruder(file.parent / "intruder"), protocol=2))


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        torch.save(torch.load(file, weights_only=True) | changes, file)

    return change


@pytest.mark.parametrize(
    ("damage", "cure"),
    [
        (Path.unlink, "does not exist. Download it again"),
        (truncate, "is damaged or not a file of tensors"),
        (replace_by_text, "is damaged or not a file of tensors"),
        (replace_by_pickle, "is damaged or not a file of tensors"),
        (replace_by_folder, "is damaged or not a file of tensors"),
        (lambda file: torch.save(torch.ones(3), file), "is not one of TEAL's histograms"),
        (edit(h2=None), "has no 'h2' with its centers"),
        (edit(h1=torch.full((400,), float("nan"))), "'h1' is not a histogram"),
        (edit(h1=torch.full((400,), -1.0)), "'h1' is not a histogram"),
        (edit(h1=torch.zeros(400)), "'h1' is not a histogram"),
        (edit(h1=torch.ones(399)), "'h1' is not a histogram"),
        (edit(h1_centers=torch.ones(400)), "'h1' is not a histogram"),
    ],
    ids=[
        "missing",
        "truncated",
        "text",
        "foreign pickle",
        "folder",
        "tensor",
        "no h2",
        "nan",
        "negative",
        "empty",
        "length",
        "flat centers",
    ],
)
def test_damaged_file_is_refused_by_name_with_a_cure(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], cure: str
) -> None:
    file = model / "histograms" / "layer-1" / "mlp" / "histograms.pt"
    damage(file)
    with pytest.raises(UserError, match=cure) as caught:
        import_teal(model, write_config(tmp_path))
    assert str(file) in str(caught.value)
    assert not (file.parent / "intruder").exists()


def test_folder_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no layer-0.*Give one model's folder"):
        import_teal(tmp_path / "nothing", write_config(tmp_path))


def test_missing_config_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json' does not exist"):
        import_teal(model, model / "config.json")


@pytest.mark.parametrize("name", PUBLISHED_TYPES)
def test_published_layers_agree_with_the_magnitude_quantiles(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    folder = shared_data / "teal"
    config = write_config(tmp_path, **PUBLISHED_CONFIG, model_type=PUBLISHED_TYPES[name])
    stats = import_teal(folder / name, config, allow_missing=True)
    reference = np.load(folder / "teal_thresholds.npz")
    layers = sorted({int(name.split(".")[2]) for name in stats.inputs})
    assert len(layers) >= 3
    for layer in layers:
        for column, key in enumerate(INPUTS):
            quantile = stats.inputs[f"model.layers.{layer}.{key}"].quantile
            expected = reference[f"{name}/abs_quantile"][layer, column, 5:96]
            thresholds = [quantile(float(p)) for p in reference["p"][5:96]]
            np.testing.assert_allclose(thresholds, expected, rtol=0.01)


def test_imported_statistics_survive_saving(model: Path, tmp_path: Path) -> None:
    stats = import_teal(model, write_config(tmp_path))
    stats.save(tmp_path / "stats")
    loaded = CalibrationStats.load(tmp_path / "stats")
    assert loaded.of("model.layers.0.mlp.up_proj").quantile(0.5) == stats.of(
        "model.layers.0.mlp.up_proj"
    ).quantile(0.5)
