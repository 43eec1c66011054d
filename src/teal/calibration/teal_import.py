"""Importing the activation histograms that TEAL published, instead of calibrating."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.calibration.artifact import CalibrationStats
from teal.calibration.histogram import Histogram
from teal.calibration.input_statistics import InputStatistics
from teal.foundation.artifact import read_json
from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity
from teal.foundation.provenance import TextProvenance
from teal.foundation.version import __version__
from teal.models.families import SEVEN_PROJECTIONS, family_named

# TEAL's file and key for each input. Its "h1.5", the output of the activation function, is not
# the input of a projection.
_PUBLISHED = {
    "attention_input": ("self_attn", "h1"),
    "o_input": ("self_attn", "h2"),
    "mlp_input": ("mlp", "h1"),
    "down_input": ("mlp", "h2"),
}
# The published files do not record the dtype, and their bins are wider than its steps.
_DTYPE = "float32"
_TAIL_POINTS = 1024
# Counts were summed in float32 over equal numbers of tokens.
_COUNT_TOLERANCE = 1e-4


def import_teal(
    folder: str | Path, config: str | Path, *, allow_missing: bool = False
) -> CalibrationStats:
    """Read TEAL's `histograms/layer-N/{self_attn,mlp}/histograms.pt` into statistics.

    The signed bins become a histogram of |x| without moments. The thresholds that TEAL derives
    from them assume that x is symmetric; they are off by up to 25 % and can be negative.

    Args:
        folder: Folder of one model in TEAL's `models/`, with `histograms/` in it.
        config: `config.json` of the model, for its type and shapes.
        allow_missing: Whether to accept missing layers. A plan then has to name the others as its
            target modules; missing layers stay dense.

    Returns:
        Statistics of every distinct projection input. Only the number of tokens of the text is
        known; its sequence length is 0.

    Raises:
        UserError: A file or layer is missing or damaged, or the config does not fit.
    """
    identity, num_layers = _identity_of(Path(config))
    histograms = Path(folder) / "histograms"
    inputs: dict[str, InputStatistics] = {}
    for layer in _layers(histograms, num_layers, allow_missing=allow_missing):
        inputs |= _layer_inputs(histograms / f"layer-{layer}", layer, identity)
    num_tokens = _agreed_count(inputs)
    return CalibrationStats(
        model=identity,
        text=TextProvenance(
            source=f"TEAL's published histograms of {Path(folder).name}",
            sha256=None,
            offset=0,
            num_tokens=num_tokens,
            sequence_length=0,
        ),
        dtype=_DTYPE,
        inputs=inputs,
        library_version=__version__,
    )


def _identity_of(path: Path) -> tuple[ModelIdentity, int]:
    config = read_json(path)
    model_type = str(config.get("model_type"))
    family = family_named(model_type)
    if family.inputs != SEVEN_PROJECTIONS:
        raise UserError(
            f"Model type {model_type!r} fuses projections, TEAL's histograms are of seven. "
            "Calibrate the model instead."
        )
    hidden = _size(config, "hidden_size", path)
    intermediate = _size(config, "intermediate_size", path)
    heads = _size(config, "num_attention_heads", path)
    head_dim = _size(config, "head_dim", path, hidden // heads)
    queries = heads * head_dim
    keys = _size(config, "num_key_value_heads", path, heads) * head_dim
    shapes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    num_layers = _size(config, "num_hidden_layers", path)
    return ModelIdentity(
        model_type=model_type,
        shapes={
            f"{family.blocks}.{layer}.{name}": shape
            for layer in range(num_layers)
            for name, shape in shapes.items()
        },
    ), num_layers


def _size(config: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"{str(path)!r} has {key} = {value!r}, not a positive integer. "
            "Give the config.json of the model."
        )
    return value


def _layers(histograms: Path, num_layers: int, *, allow_missing: bool) -> list[int]:
    present = {path.name for path in histograms.glob("layer-*")}
    if not present:
        raise UserError(
            f"{str(histograms)!r} holds no layer-0, layer-1, …. "
            "Give one model's folder of TEAL's models/."
        )
    expected = {f"layer-{layer}": layer for layer in range(num_layers)}
    foreign = sorted(present - expected.keys())
    if foreign:
        raise UserError(
            f"{str(histograms)!r} holds {foreign[0]}, but the config has {num_layers} layers. "
            "Give the config.json of that model."
        )
    missing = [str(layer) for name, layer in expected.items() if name not in present]
    if missing and not allow_missing:
        raise UserError(
            f"{str(histograms)!r} lacks the layers {', '.join(missing)} of {num_layers}. "
            "Download them, or take those that are there with --allow-missing."
        )
    return [layer for name, layer in expected.items() if name in present]


def _layer_inputs(folder: Path, layer: int, identity: ModelIdentity) -> dict[str, InputStatistics]:
    block = f"{family_named(identity.model_type).blocks}.{layer}"
    files = {module: folder / module / "histograms.pt" for module in ("self_attn", "mlp")}
    contents = {module: _read(path) for module, path in files.items()}
    inputs = {}
    for name, (module, key) in _PUBLISHED.items():
        projections = tuple(f"{block}.{projection}" for projection in SEVEN_PROJECTIONS[name])
        in_features = identity.shapes[projections[0]][0]
        counts, centres = _bins(contents[module], key, files[module])
        inputs[f"{block}.{name}"] = InputStatistics(
            projections=projections,
            in_features=in_features,
            dtype=_DTYPE,
            histogram=_folded(counts, centres),
            count=round(float(counts.sum()) / in_features),
        )
    return inputs


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} does not exist. Download it again.") from None
    # A damaged pickle can raise anything at all.
    except Exception as error:
        raise UserError(
            f"{str(path)!r} is damaged or not a file of tensors. Download it again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is not one of TEAL's histograms. Download it again.")
    return content


def _bins(content: Mapping[str, Any], key: str, path: Path) -> tuple[Tensor, Tensor]:
    """Return counts and centres of the signed bins, (bins,) each, float64."""
    counts, centres = content.get(key), content.get(f"{key}_centers")
    if not (isinstance(counts, Tensor) and isinstance(centres, Tensor)):
        raise UserError(f"{str(path)!r} has no {key!r} with its centers. Download it again.")
    counts, centres = counts.double(), centres.double()
    sound = (
        counts.dim() == 1
        and counts.shape == centres.shape
        and len(counts) > 3
        and bool(counts.isfinite().all() and centres.isfinite().all())
        and bool((counts >= 0).all() and counts.any())
        and bool((centres.diff() > 0).all())
    )
    if not sound:
        raise UserError(
            f"{str(path)!r}: {key!r} is not a histogram over rising centers. Download it again."
        )
    return counts, centres


def _folded(counts: Tensor, centres: Tensor) -> Histogram:
    """Convert a histogram of x to one of |x|.

    The values of an inner bin are placed at its centre. The first and last bin hold the outliers,
    1 % each, between the inner bins and the extremes; most of them lie near the inner bins, so
    they are distributed evenly over log |x| rather than |x|.
    """
    histogram = Histogram(_DTYPE)
    histogram.add(centres[1:-1], counts[1:-1])
    half_width = (centres[-2] - centres[1]) / (len(centres) - 3) / 2
    steps = (torch.arange(_TAIL_POINTS, dtype=torch.float64) + 0.5) / _TAIL_POINTS
    for end, neighbour in ((0, 1), (-1, -2)):
        inner = float(centres[neighbour].abs() + half_width)
        outer = float(2 * centres[end].abs() - inner)
        tail = inner * (max(outer, inner) / inner) ** steps
        histogram.add(tail, torch.full_like(tail, float(counts[end]) / _TAIL_POINTS))
    return histogram


def _agreed_count(inputs: Mapping[str, InputStatistics]) -> int:
    """Return the number of tokens, which is the same for all inputs if the config fits."""
    counts = {name: statistics.count for name, statistics in inputs.items()}
    first = next(iter(counts.values()))
    for name, count in counts.items():
        if abs(count - first) > _COUNT_TOLERANCE * first:
            raise UserError(
                f"By the shapes of the config, {name} has {count} tokens and "
                f"{next(iter(counts))} {first}. Give the config.json of the model."
            )
    return first
