"""Every figure draws from small arrays, names its axes, refuses shapes that do not fit, and stays a small PNG."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from icl_lib import figures
from icl_lib.figures import graph
from icl_lib.figures.style import checked, mean_and_error

TASKS = [f"location_language_{i}" for i in range(25)]
GROUPS = ["knowledge"] * 10 + ["linguistic"] * 8 + ["translation"] * 7
ROLES = ["prompt", "input", "arrow", "output", "newline"]
N = len(TASKS)
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def agg():
    """Draw without a window, with our style, and leave neither figures nor settings behind."""
    backend = plt.get_backend()
    plt.switch_backend("agg")
    with plt.rc_context():
        figures.use_style()
        yield
    plt.close("all")
    plt.switch_backend(backend)


def curves(k: int) -> np.ndarray:
    return np.linspace(1, 0.1, k) * rng.uniform(0.5, 1, (N, 1)) + 0.03 * rng.normal(size=(N, k))


def suite_table() -> pd.DataFrame:
    rows = [(kind, layer) for kind in ("residual", "attention", "transcoder") for layer in range(6)]
    table = pd.DataFrame(rows, columns=["kind", "layer"])
    return table.assign(l0=rng.uniform(5, 40, 18), fvu=rng.uniform(0, 0.2, 18), ce_recovered=rng.uniform(0.9, 1, 18))


def sweep_table() -> pd.DataFrame:
    return pd.DataFrame(
        {"d_sae": np.repeat([256, 1024], 3), "l0": [40, 9, 20, 8, 50, 18], "fvu": [1, 3, 2, 4, 0.5, 1.5]}
    )


def circuit(n: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": rng.integers(0, 6, n),
            "kind": rng.choice(["residual", "attention", "transcoder"], n),
            "latent": rng.integers(-1, 1024, n),
            "group": rng.choice(ROLES, n, p=[0.05, 0.1, 0.6, 0.2, 0.05]),
            "effect": rng.normal(size=n),
        }
    )


def edges(n_nodes: int) -> pd.DataFrame:
    ends = rng.integers(0, n_nodes, (40, 2))
    return pd.DataFrame({"source": ends[:, 0], "target": ends[:, 1], "effect": rng.normal(size=40)})


K = np.array([5, 10, 50, 100, 500])
DRAWINGS = {
    "accuracy_vs_shots": (40, lambda: figures.accuracy_vs_shots(range(6), curves(6), GROUPS, chance=0.1)),
    "training_curve": (
        40,
        lambda: figures.training_curve(range(1, 50), {"train": 5 / np.arange(1, 50), "test": np.ones(49)}),
    ),
    "sae_quality": (60, lambda: figures.sae_quality(suite_table(), bar=0.95)),
    "width_lines": (40, lambda: figures.width_lines(sweep_table(), "fvu")),
    "group_bars": (40, lambda: figures.group_bars(curves(1)[:, 0], GROUPS, ylabel="accuracy")),
    "layer_curves": (
        45,
        lambda: figures.layer_curves(
            range(6), {m: -curves(6) for m in ("TVC", "task vector", "ITO(5)", "new")}, mark=3
        ),
    ),
    "l0_bars": (40, lambda: figures.l0_bars({"SAE encoding": K, "TVC": [1, 2, 3]}, published={"TVC": 3.78})),
    "sweep_scatter": (45, lambda: figures.sweep_scatter({"ITO": (rng.uniform(0, 3, 99), rng.normal(size=99))})),
    "sweep_panels": (45, lambda: figures.sweep_panels([1e-3, 1e-2, 1e-1], curves(3), curves(3), reference=0.5)),
    "pareto_front": (40, lambda: figures.pareto_front({"TVC": (rng.integers(1, 30, 50), rng.normal(size=50))})),
    "equal_l0": (55, lambda: figures.equal_l0(-curves(1)[:, 0], -curves(1)[:, 0], TASKS, np.ones(N))),
    "effect_vs_shots": (40, lambda: figures.effect_vs_shots([1, 2, 4], {"TVC": -curves(3)})),
    "task_latent_heatmap": (
        80,
        lambda: figures.task_latent_heatmap(
            rng.normal(size=(N, 43)),
            TASKS,
            np.arange(43).tolist(),
            normalised=False,
            encoded=rng.random((N, 43)) < 0.2,
            survives=rng.random((N, 43)) < 0.1,
            what="executor of layer 3",
        ),
    ),
    "role_mass": (
        50,
        lambda: figures.role_mass(rng.dirichlet([1.0] * 5, N), TASKS, ROLES, published=[0, 0, 0.9, 0.1, 0]),
    ),
    "link_heatmap": (80, lambda: figures.link_heatmap(rng.random((N, 20)), TASKS, TASKS[:20], same_task=np.eye(N, 20))),
    "latent_control": (
        55,
        lambda: figures.latent_control(curves(1)[:, 0], 0.1 * rng.normal(size=(N, 50)), TASKS, bar=0.2),
    ),
    "scale_sweep": (
        50,
        lambda: figures.scale_sweep([1, 4, 16, 64], {"best": curves(4), "random": curves(4)}, chosen=16),
    ),
    "faithfulness_curve": (45, lambda: figures.faithfulness_curve(K, curves(5), mode="ablate", control=curves(5))),
    "faithfulness_panels": (60, lambda: figures.faithfulness_panels(K, curves(5), curves(5), keep_control=curves(5))),
    "ablation_matrix": (80, lambda: figures.ablation_matrix(-rng.random((N, N)), TASKS, GROUPS)),
    "ie_scatter": (
        45,
        lambda: figures.ie_scatter(rng.normal(size=200), rng.normal(size=200), ["residual", "transcoder"] * 100),
    ),
    "node_counts": (40, lambda: figures.node_counts(circuit(200))),
    "halving_bars": (50, lambda: figures.halving_bars([np.nan, *range(10, 250, 10)], TASKS, bar=300)),
    "circuit_graph": (160, lambda: figures.circuit_graph(circuit(80), edges(80), title="a task")),
}


def panels(drawn: object) -> tuple[Figure, list]:
    figure = drawn if isinstance(drawn, Figure) else drawn.figure
    return figure, figure.axes


def png_kilobytes(figure: Figure) -> float:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return len(buffer.getvalue()) / 1024


@pytest.mark.parametrize("name", DRAWINGS)
def test_figure_is_labelled_and_small(name):
    limit, draw = DRAWINGS[name]
    figure, axes = panels(draw())
    assert any(ax.get_xlabel() or ax.get_title(loc="left") for ax in axes)
    for ax in axes:
        assert ax.get_ylabel() or ax.get_xlabel(), f"an axes of {name} has no label"
    assert png_kilobytes(figure) <= limit
    assert figure.get_size_inches()[0] <= 9.01


@pytest.mark.parametrize(
    "name", ["task_latent_heatmap", "ablation_matrix", "link_heatmap", "latent_control", "equal_l0"]
)
def test_tick_labels_of_25_tasks_do_not_overlap(name):
    figure, axes = panels(DRAWINGS[name][1]())
    figure.canvas.draw()
    for axis in (axes[0].xaxis, axes[0].yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        for a, b in zip(boxes, boxes[1:], strict=False):
            assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)


def test_displayed_divides_rows_and_drops_small_values():
    effects = [[0.8, 0.4, 0.1, -0.5], [0.05, 0.2, 0.041, 0.039], [-1.0, -0.1, 0.0, -0.2]]
    expected = [[1.0, 0.5, 0.0, 0.0], [0.25, 1.0, 0.205, 0.0], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(figures.displayed(effects), expected)


def test_diagonal_order_sorts_a_shuffled_diagonal():
    rows, columns = rng.permutation(6), rng.permutation(6)
    effects = np.diag(np.arange(6, 0, -1.0))[rows][:, columns]
    got_rows, got_columns = figures.diagonal_order(effects)
    np.testing.assert_array_equal(effects[got_rows][:, got_columns], np.diag(np.arange(6, 0, -1.0)))
    assert len(figures.diagonal_order(effects, 4)[1]) == 4


def test_heatmap_shows_the_row_maximum_on_a_kept_column():
    effects = rng.random((5, 12))
    ax = figures.task_latent_heatmap(effects, TASKS[:5], list(range(12)), n_latents=6)
    shown = np.asarray(ax.images[0].get_array())
    names = [int(label.get_text()) for label in ax.get_xticklabels()]
    tasks = [TASKS.index(label.get_text().split(" ")[0]) for label in ax.get_yticklabels()]
    assert shown.shape == (5, 6) and set(names) == set(np.argsort(-effects.max(axis=0))[:6])
    np.testing.assert_allclose(shown, figures.displayed(effects)[tasks][:, names])


def test_ablation_matrix_groups_tasks_and_centres_colours():
    change = np.arange(9.0).reshape(3, 3) - 2
    ax = figures.ablation_matrix(change, ["a", "b", "c"], ["x", "y", "x"])
    np.testing.assert_array_equal(ax.images[0].get_array(), change[[0, 2, 1]][:, [0, 2, 1]])
    low, high = ax.images[0].get_clim()
    assert low == -high and high >= 6


def test_lines_that_hide_each_other_come_apart_in_a_panel_of_differences():
    own = curves(6)
    figure = figures.layer_curves(range(6), {"task vector": own, "TVC": own + 0.1}, mark=2, reference="task vector")
    left, right = figure.axes
    assert [line.get_label() for line in right.get_lines() if not line.get_label().startswith("_")] == ["TVC"]
    np.testing.assert_allclose(right.get_lines()[0].get_ydata(), 0.1, atol=1e-9)
    np.testing.assert_allclose(left.get_lines()[1].get_ydata() - left.get_lines()[0].get_ydata(), 0.1, atol=1e-9)
    assert "minus the task vector's" in right.get_ylabel() and len(figure.legends[0].texts) == 2


def test_a_row_without_an_effect_is_grey_and_each_row_says_what_it_was_divided_by():
    effects = np.array([[0.8, 0.2], [0.01, 0.04]])
    ax = figures.task_latent_heatmap(effects, ["good", "none"], ["1 a", "2 b"])
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["good (0.80)", "none (0.04)"] and np.isnan(shown[1]).all() and shown[0].max() == 1


def test_pareto_equals_brute_force():
    l0, gain = rng.integers(1, 15, 60).astype(float), rng.integers(0, 20, 60).astype(float)
    beaten = [
        any((l0[j] <= l0[i]) & (gain[j] >= gain[i]) & ((l0[j] < l0[i]) | (gain[j] > gain[i])) for j in range(60))
        for i in range(60)
    ]
    wanted = {(l0[i], gain[i]) for i in range(60) if not beaten[i]}
    front = figures.pareto(l0, gain)
    assert {(l0[i], gain[i]) for i in front} == wanted
    assert (np.diff(l0[front]) > 0).all()


def test_width_lines_sorts_each_width_by_x():
    ax = figures.width_lines(sweep_table(), "fvu", suffix=", here")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert drawn["256 latents, here"] == [[9, 3], [20, 2], [40, 1]]
    assert drawn["1024 latents, here"] == [[8, 4], [18, 1.5], [50, 0.5]]


def test_mean_and_error_against_pandas():
    values = rng.normal(size=(7, 4))
    values[2, 1] = np.nan
    mean, error = mean_and_error(values)
    np.testing.assert_allclose(mean, pd.DataFrame(values).mean())
    np.testing.assert_allclose(error, pd.DataFrame(values).sem())


def test_role_mass_table_holds_published_numbers():
    mass = np.array([[0.0, 0.1, 0.9, 0.0, 0.0], [0.0, 0.3, 0.5, 0.2, 0.0]])
    table = figures.role_mass_table(mass, ROLES, {"arrow": 89.8})
    assert table.loc["arrow", "mean %"] == pytest.approx(70)
    assert table.loc["arrow", "s.d. %"] == pytest.approx(np.std([90, 50], ddof=1))
    assert table.loc["arrow", "published %"] == 89.8 and np.isnan(table.loc["input", "published %"])


@pytest.mark.parametrize("n", [5, 60, 300])
def test_nodes_of_a_circuit_never_share_a_slot(n):
    layout = graph.place_nodes(circuit(n))
    for row in np.unique(layout.y):
        assert (np.diff(np.sort(layout.x[layout.y == row])) >= 1 - 1e-9).all()
    spans = [span for span in layout.groups.values()]
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_circuit_layers_rise_and_kinds_follow_the_model():
    nodes = circuit(60)
    layout = graph.place_nodes(nodes)
    kind = nodes["kind"].map({"residual": 0, "attention": 1, "transcoder": 2})
    depth = (nodes["layer"] * 3 + kind).to_numpy()
    for i in range(60):
        assert (layout.y[depth > depth[i]] > layout.y[i]).all()


def test_groups_and_kinds_that_are_not_known_are_drawn():
    nodes = circuit(8).assign(kind=["gate", "residual"] * 4, group=[str(i % 3) for i in range(8)], layer=1)
    layout = graph.place_nodes(nodes)
    assert list(layout.rows) == [(1, "residual"), (1, "gate")] and list(layout.groups) == ["0", "1", "2"]
    figures.circuit_graph(nodes)
    figures.node_counts(nodes)


def words(drawn) -> str:
    """Titles, labels and legends of a figure as one text."""
    figure, axes = panels(drawn)
    parts = [t for ax in axes for t in (ax.get_title(loc="left"), ax.get_title(), ax.get_xlabel(), ax.get_ylabel())]
    return " ".join([*parts, *(text.get_text() for ax in axes if ax.get_legend() for text in ax.get_legend().texts)])


def gone(values, *where) -> np.ndarray:
    """The values with NaN at the given rows."""
    values = np.array(values, float)
    values[list(where)] = np.nan
    return values


MISSING = {
    "never fires": lambda: figures.role_mass(gone(np.eye(5), 1), TASKS[:5], ROLES),
    "mean of 0": lambda: figures.role_mass(gone(np.eye(5), 0, 1, 2, 3, 4), TASKS[:5], ROLES),
    "2 tasks without value": lambda: figures.faithfulness_curve(K, gone(curves(5), 0, 3), mode="keep"),
    "1 node without value": lambda: figures.ie_scatter(gone(np.arange(9), 2), np.arange(9)),
    "0 nodes": lambda: figures.ie_scatter([np.nan], [np.nan]),
    "no random latents left": lambda: figures.latent_control(curves(1)[:, 0], np.zeros((N, 0)), TASKS),
    "1 task without value": lambda: figures.latent_control(gone(curves(1)[:, 0], 1), curves(9), TASKS),
    "1 point without value": lambda: figures.sweep_scatter({"TVC": (gone(np.ones(9), 0), np.ones(9))}),
    "3 tasks without value": lambda: figures.sweep_panels([1, 2], gone(curves(2), 1, 2, 3), curves(2)),
    "4 tasks without value": lambda: figures.equal_l0(gone(np.ones(N), 1, 2, 3, 4), np.ones(N), TASKS, np.ones(N)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_drawn_and_named(what):
    drawn = MISSING[what]()
    drawn = drawn.figure if hasattr(drawn, "figure") and drawn.figure is not None else drawn
    text = words(drawn) + " ".join(label.get_text() for ax in drawn.axes for label in ax.get_yticklabels())
    assert what in text
    drawn.canvas.draw()


@pytest.mark.filterwarnings("error")
def test_heatmaps_of_nothing_are_grey_and_say_so():
    nothing = np.full((N, 3), np.nan)
    for drawn in (
        figures.link_heatmap(nothing, TASKS, TASKS[:3], same_task=np.eye(N, 3)),
        figures.task_latent_heatmap(nothing, TASKS, [1, 2, 3]),
        figures.task_latent_heatmap(nothing, TASKS, [1, 2, 3], normalised=False),
        figures.ablation_matrix(np.full((3, 3), np.nan), TASKS[:3]),
        figures.layer_curves(range(3), {"TVC": nothing}),
        figures.l0_bars({"TVC": np.full(3, np.nan)}),
        figures.accuracy_vs_shots(range(3), nothing, GROUPS),
    ):
        assert not len(drawn.images) or "grey: no value" in words(drawn)
    table = figures.role_mass_table(np.full((2, 5), np.nan), ROLES)
    assert table.isna().all().all()


def test_prompt_roles_starts_a_line_after_each_newline():
    tokens = ["<bos>", "Follow", ":", "\n", "hot", "->", "cold", "\n", "big", "->", "small"]
    roles = ["other", "prompt", "prompt", "newline"] + ["input", "arrow", "output", "newline"] * 2
    figure = figures.prompt_roles(tokens, roles[:-1])
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts][3] == "↵"
    assert len({text.get_position()[1] for text in texts}) == 3


def test_schematic_shows_words_and_layers():
    figure = figures.schematic([("hot", "cold"), ("fast", "slow")], detector_layer=11, executor_layer=12)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"hot", "cold", "fast", "slow", "layer 11", "layer 12"} <= texts
    with pytest.raises(ValueError, match="an example and a query"):
        figures.schematic([("hot", "cold")], detector_layer=1, executor_layer=2)
    with pytest.raises(ValueError, match="do not fit"):
        figures.schematic([("a long phrase",) * 2] * 9, detector_layer=1, executor_layer=2)


def test_cleaning_overview_is_one_loop():
    axes = figures.cleaning_overview().axes[0]
    assert sum("theta" in text.get_text() for text in axes.texts) == 4 and len(axes.patches) == 7


def test_examples_keep_the_peak_inside_the_page():
    tokens = [f"word{i}" for i in range(80)]
    values = np.zeros(80)
    values[70] = 2.0
    figure = figures.examples_figure([tokens], [values], title="$5 latent")
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_weight() == "bold"]
    assert bold == ["word70"]
    figure.canvas.draw()
    assert max(text.get_window_extent().x1 for text in figure.axes[0].texts) <= figure.bbox.x1


def test_style_table_is_reproducible_and_escaped():
    table = pd.DataFrame({"task": ["<b>x</b>", "y"], "l0": [1.234, 5.0], "n": [3, 4]})
    first, second = (figures.style_table(table, caption="a & b", digits={"l0": 1}, shade=["l0"]).data for _ in range(2))
    assert first == second and "<b>x" not in first and "a &amp; b" in first
    assert ">1.2<" in first and ">3<" in first
    with pytest.raises(ValueError, match="no column"):
        figures.style_table(table, shade=["fvu"])


BAD = {
    "effects": lambda: figures.task_latent_heatmap(np.ones((3, 4)), TASKS[:4], [1, 2, 3]),
    "change": lambda: figures.ablation_matrix(np.ones((3, 4)), TASKS[:3]),
    "groups": lambda: figures.ablation_matrix(np.ones((3, 3)), TASKS[:3], GROUPS),
    "accuracy": lambda: figures.accuracy_vs_shots(range(3), np.ones((3, 25)), GROUPS),
    r"decrease\['TVC'\]": lambda: figures.layer_curves(range(3), {"TVC": np.ones((5, 4))}),
    "mass must sum to 1": lambda: figures.role_mass(np.ones((2, 5)), ["a", "b"], ROLES),
    "mode must be": lambda: figures.faithfulness_curve(K, np.ones((2, 5)), mode="inverse"),
    "l1 is drawn": lambda: figures.sweep_panels([0.0, 1.0], np.ones((2, 2)), np.ones((2, 2))),
    r"\['fvu'\] missing": lambda: figures.sae_quality(suite_table().drop(columns="fvu")),
    "no edge starts or ends": lambda: figures.circuit_graph(circuit(5), edges(5).assign(source=99, target=98)),
    "one role per token": lambda: figures.prompt_roles(["a", "b"], ["input"]),
    "one activation row": lambda: figures.examples_figure([["a"]], []),
    r"activations\[0\]": lambda: figures.examples_figure([["a", "b"]], [[1.0]]),
    "nodes is empty": lambda: figures.node_counts(circuit(3).head(0)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_checked_names_axes_and_shape():
    with pytest.raises(ValueError, match=r"f must have the axes \(task = 2, layer\), got shape \(3, 4\)"):
        checked("f", np.ones((3, 4)), task=2, layer=None)
