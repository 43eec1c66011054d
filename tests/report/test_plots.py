from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from teal.calibration import CalibrationStats
from teal.calibration.input_statistics import InputStatistics
from teal.foundation.identity import ModelIdentity
from teal.methods import MaskRule
from teal.models.families import FUSED_PROJECTIONS, SEVEN_PROJECTIONS
from teal.plan import PlannedProjection, SparsityPlan
from teal.report import (
    DenseRow,
    SparseRow,
    figures,
    histogram_figure,
    perplexity_figure,
    sparsity_figure,
)
from tests.helpers import plan_of

CHANNELS = 8
DENSE = DenseRow(perplexity=8.0, perplexity_error=0.125)


def row(strategy: str, sparsity: float, perplexity: float, error: float | None = None) -> SparseRow:
    return SparseRow(
        strategy=strategy,
        target_sparsity=0.5,
        effective_sparsity=sparsity,
        perplexity=perplexity,
        perplexity_error=error,
        kl=0.1,
        top1_agreement=0.9,
    )


def plan_at(
    sparsity: float, *, layers: int = 2, inputs: Mapping[str, Sequence[str]] = SEVEN_PROJECTIONS
) -> SparsityPlan:
    """Plan sparsity s as the threshold s for every projection of a family."""
    kinds = [kind for kinds in inputs.values() for kind in kinds]
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    identity = ModelIdentity(model_type="llama", shapes=dict.fromkeys(names, (CHANNELS, CHANNELS)))
    return plan_of(identity, dict.fromkeys(names, planned(sparsity)))


def planned(sparsity: float, **vectors: torch.Tensor) -> PlannedProjection:
    return PlannedProjection(target_sparsity=sparsity, rule=MaskRule(threshold=sparsity, **vectors))


def changed(plan: SparsityPlan, changes: Mapping[str, PlannedProjection]) -> SparsityPlan:
    return plan_of(plan.model, {**plan.projections, **changes})


def stats_of(plan: SparsityPlan, *, dtype: torch.dtype = torch.float32) -> CalibrationStats:
    """Measure activations spread evenly between -1 and 1, whose s-quantile of |x| is s."""
    x = torch.linspace(-1.0, 1.0, 4096 * CHANNELS).view(-1, CHANNELS).to(dtype)
    layers = sorted({name.split(".")[2] for name in plan.model.shapes})
    inputs = {}
    for layer in layers:
        for name, kinds in SEVEN_PROJECTIONS.items():
            inputs[f"model.layers.{layer}.{name}"] = InputStatistics(
                projections=tuple(f"model.layers.{layer}.{kind}" for kind in kinds),
                in_features=CHANNELS,
                dtype=str(dtype).removeprefix("torch."),
            )
            inputs[f"model.layers.{layer}.{name}"].add(x)
    return CalibrationStats(
        model=plan.model,
        text=plan.calibration,
        dtype=str(dtype).removeprefix("torch."),
        inputs=inputs,
        library_version="0",
    )


def thresholds_drawn(axes: Axes) -> dict[str, float]:
    return {str(line.get_label()): float(line.get_xdata()[0]) for line in axes.lines}


def cell_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def area_of(corners: np.ndarray) -> float:
    x, y = corners.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


def test_each_strategy_is_one_line_starting_at_dense_in_order_of_sparsity() -> None:
    rows = [row("uniform", 0.6, 11.0), row("uniform", 0.4, 9.0), row("greedy", 0.5, 8.5)]
    axes = perplexity_figure(DENSE, rows).axes[0]
    lines = {container.get_label(): container[0].get_xydata() for container in axes.containers}
    assert lines.keys() == {"uniform", "greedy"}
    np.testing.assert_array_equal(lines["uniform"], [(0.0, 8.0), (0.4, 9.0), (0.6, 11.0)])
    np.testing.assert_array_equal(lines["greedy"], [(0.0, 8.0), (0.5, 8.5)])


def test_error_bars_show_one_standard_error_where_it_is_known() -> None:
    rows = [row("uniform", 0.4, 9.0), row("uniform", 0.6, 11.0, 0.25)]
    (container,) = perplexity_figure(DENSE, rows).axes[0].containers
    ends = [segment[:, 1] for segment in container[2][0].get_segments() if len(segment)]
    known = [tuple(pair) for pair in ends if not np.isnan(pair).any()]
    assert known == [(10.75, 11.25)]


def test_dense_is_a_horizontal_line() -> None:
    axes = perplexity_figure(DENSE, [row("uniform", 0.5, 9.0)]).axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "dense"]
    assert list(line.get_ydata()) == [8.0, 8.0]


@pytest.mark.parametrize(("worst", "scale"), [(79.0, "linear"), (81.0, "log")])
def test_perplexity_axis_is_logarithmic_beyond_ten_times_dense(worst: float, scale: str) -> None:
    assert perplexity_figure(DENSE, [row("uniform", 0.9, worst)]).axes[0].get_yscale() == scale


def test_heat_map_has_a_row_per_kind_and_a_column_per_layer() -> None:
    plan = changed(plan_at(0.5), {"model.layers.1.mlp.up_proj": planned(0.25)})
    axes = sparsity_figure(plan).axes[0]
    grid = np.full((7, 2), 0.5)
    grid[5, 1] = 0.25
    np.testing.assert_array_equal(axes.images[0].get_array(), grid)
    assert [label.get_text() for label in axes.get_yticklabels()][5] == "up_proj"


def test_heat_map_shows_each_sparsity_as_a_percentage() -> None:
    plan = changed(plan_at(0.5), {"model.layers.1.mlp.up_proj": planned(0.25)})
    assert sorted(cell_texts(sparsity_figure(plan))) == ["25", *13 * ["50"]]


def test_heat_map_of_a_fused_family_has_four_rows() -> None:
    axes = sparsity_figure(plan_at(0.5, inputs=FUSED_PROJECTIONS)).axes[0]
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    assert kinds == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_heat_map_of_eighty_layers_is_in_numerical_order_without_numbers() -> None:
    plan = changed(plan_at(0.5, layers=80), {"model.layers.10.self_attn.q_proj": planned(0.25)})
    figure = sparsity_figure(plan)
    grid = figure.axes[0].images[0].get_array()
    assert grid is not None
    assert grid.shape == (7, 80)
    assert grid[0, 10] == 0.25
    assert cell_texts(figure) == []


def test_heat_map_leaves_unplanned_projections_blank() -> None:
    whole = plan_at(0.5)
    name = "model.layers.0.self_attn.o_proj"
    plan = plan_of(whole.model, {n: p for n, p in whole.projections.items() if n != name})
    grid = sparsity_figure(plan).axes[0].images[0].get_array()
    assert grid is not None
    assert np.argwhere(np.ma.getmaskarray(grid)).tolist() == [[3, 0]]


def test_projections_with_the_same_threshold_share_a_line() -> None:
    plan = plan_at(0.5)
    figure = histogram_figure(stats_of(plan), plan, ["model.layers.1.attention_input"])
    assert thresholds_drawn(figure.axes[0]) == {"q, k, v 50 %": 0.5}


def test_each_distinct_threshold_has_a_line_in_the_colour_of_its_first_projection() -> None:
    plan = changed(plan_at(0.5), {"model.layers.0.self_attn.k_proj": planned(0.25)})
    (axes,) = histogram_figure(stats_of(plan), plan, ["model.layers.0.attention_input"]).axes
    assert thresholds_drawn(axes) == {"q, v 50 %": 0.5, "k 25 %": 0.25}
    assert [to_hex(line.get_color()) for line in axes.lines] == ["#d55e00", "#009e73"]


def test_dense_projections_and_rules_with_a_score_scale_have_no_line() -> None:
    dense = PlannedProjection(target_sparsity=0.0, rule=None)
    plan = changed(
        plan_at(0.5),
        {
            "model.layers.0.mlp.gate_proj": dense,
            "model.layers.0.mlp.up_proj": planned(0.5, score_scale=torch.ones(CHANNELS)),
        },
    )
    (axes,) = histogram_figure(stats_of(plan), plan, ["model.layers.0.mlp_input"]).axes
    assert thresholds_drawn(axes) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_area_left_of_a_threshold_is_the_fraction_dropped(dtype: torch.dtype) -> None:
    plan = plan_at(0.4)
    figure = histogram_figure(stats_of(plan, dtype=dtype), plan, ["model.layers.0.o_input"])
    (dropped, _) = figure.axes[0].collections
    corners = dropped.get_paths()[0].vertices
    assert corners[:, 0].max() == pytest.approx(0.4)
    assert area_of(corners) == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uniform_activations_look_flat(dtype: torch.dtype) -> None:
    plan = plan_at(0.4)
    figure = histogram_figure(stats_of(plan, dtype=dtype), plan, ["model.layers.0.o_input"])
    heights = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert heights[heights > 0].min() == pytest.approx(1.0, abs=0.15)
    assert heights.max() == pytest.approx(1.0, abs=0.15)


def test_axis_extends_to_a_threshold_beyond_the_shown_quantile() -> None:
    plan = plan_at(0.99)
    (axes,) = histogram_figure(stats_of(plan), plan, ["model.layers.0.o_input"]).axes
    assert axes.get_xlim()[1] > 0.99


def test_all_zero_inputs_can_be_drawn() -> None:
    plan = plan_at(0.0)
    stats = stats_of(plan)
    name = "model.layers.0.down_input"
    stats.inputs[name] = InputStatistics(
        projections=stats.inputs[name].projections, in_features=CHANNELS, dtype="float32"
    )
    stats.inputs[name].add(torch.zeros(4, CHANNELS))
    (axes,) = histogram_figure(stats, plan, [name]).axes
    assert axes.get_xlim() == (0.0, 1.0)


def test_figures_show_inputs_of_first_middle_and_last_layer() -> None:
    plan = plan_at(0.5, layers=5)
    drawn = figures(DENSE, [row("uniform", 0.5, 9.0)], stats_of(plan), plan)
    titles = [axes.get_title(loc="left") for axes in drawn["activations-and-thresholds"].axes]
    assert [title.split(" · ")[0] for title in titles] == [
        *4 * ["layer 0"], *4 * ["layer 2"], *4 * ["layer 4"]
    ]  # fmt: skip
