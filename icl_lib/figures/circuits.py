"""Figures about sparse feature circuits: faithfulness, specificity, quality of the estimates, sizes (Fig 6, App. E).

Faithfulness of a set of nodes = (m(C) - m(empty)) / (m(M) - m(empty)): 1 is the whole model, 0 the ablated one.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icl_lib.figures.style import (
    FAINT,
    KIND_COLOURS,
    OKABE_ITO,
    ROLE_COLOURS,
    Number,
    Values,
    axes_for,
    band,
    checked,
    colours_for,
    faint,
    heatmap,
    in_order,
    mean,
    missing,
    need_columns,
    plain_log,
    role_name,
)

MODES = {
    "keep": ("nodes kept, all others ablated", OKABE_ITO["blue"]),
    "ablate": ("nodes ablated, all others kept", OKABE_ITO["vermillion"]),
}


def faithfulness_curve(
    n_nodes: Values,
    faithfulness: Values,
    *,
    mode: str,
    control: Values | None = None,
    level: Number | None = 0.5,
    ax: Axes | None = None,
) -> Axes:
    """Faithfulness (task, n_nodes) against the number of nodes kept (`mode="keep"`) or ablated (`mode="ablate"`).

    Faint lines are tasks, bold is their mean with its standard error; `control` (task, n_nodes) is the same with random
    active nodes, drawn dashed. The y axis runs from -0.25 to 1.25: tasks whose own gap m(M) - m(empty) is small leave
    it.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    n_nodes = checked("n_nodes", n_nodes, n_nodes=None)
    values = checked("faithfulness", faithfulness, task=None, n_nodes=len(n_nodes))
    words, colour = MODES[mode]
    ax = axes_for(ax, width=4.8, height=3.4)
    faint(ax, n_nodes, values, colour)
    silent = int((~np.isfinite(values)).all(axis=1).sum())
    label = f"top nodes, mean of {len(values) - silent} tasks ± s.e.{missing(silent, 'task')}"
    band(ax, n_nodes, values, label=label, colour=colour)
    if control is not None:
        control = checked("control", control, task=None, n_nodes=len(n_nodes))
        ax.plot(n_nodes, mean(control, axis=0), "--", color="black", linewidth=1.3, label="random active nodes")
    if level is not None:
        ax.axhline(level, color="black", linestyle=":", linewidth=1)
    ax.set(xlabel=words, ylabel="faithfulness", ylim=(-0.25, 1.25))
    if (n_nodes > 0).all() and n_nodes.max() / n_nodes.min() > 20:
        plain_log(ax.xaxis)
    ax.legend(loc="lower left" if mode == "ablate" else "lower right")
    return ax


def faithfulness_panels(
    n_nodes: Values,
    keep: Values,
    ablate: Values,
    *,
    keep_control: Values | None = None,
    ablate_control: Values | None = None,
) -> Figure:
    """Both faithfulness curves side by side: left keeping, right ablating the top nodes; shapes as
    `faithfulness_curve`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    faithfulness_curve(n_nodes, keep, mode="keep", control=keep_control, ax=left)
    faithfulness_curve(n_nodes, ablate, mode="ablate", control=ablate_control, ax=right)
    right.set_ylabel("")
    return figure


def ablation_matrix(
    change: Values, tasks: Sequence[str], groups: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Fig 6: change of faithfulness of the tested task (column) when the circuit of another task (row) is ablated.

    `change` (ablated, tested), negative where the tested task suffers. With `groups` the tasks are set group by group,
    with lines between them. The title gives the means on and off the diagonal.
    """
    n = len(tasks)
    change = checked("change", change, ablated=n, tested=n)
    order = np.arange(n)
    if groups is not None:
        if len(groups) != n:
            raise ValueError(f"groups must name the group of each of the {n} tasks, got {len(groups)}")
        first = {group: i for i, group in reversed(list(enumerate(groups)))}
        order = np.array(sorted(range(n), key=lambda i: first[groups[i]]))
    change, names = change[order][:, order], [tasks[i] for i in order]
    ax = axes_for(ax, width=7.6, height=2.2 + 0.17 * n)
    heatmap(ax, change, names, names, colour_label="change of faithfulness", signed=True)
    if groups is not None:
        edges = [i - 0.5 for i in range(1, n) if groups[order[i]] != groups[order[i - 1]]]
        ax.hlines(edges, -0.5, n - 0.5, color="black", linewidth=0.6)
        ax.vlines(edges, -0.5, n - 0.5, color="black", linewidth=0.6)
    ax.set(xlabel="task tested", ylabel="task whose nodes are ablated")
    if n > 1:
        off = change[~np.eye(n, dtype=bool)]
        ax.set_title(f"mean own task {mean(np.diag(change)):.2f}, other tasks {mean(off):.2f}")
    return ax


def ie_scatter(
    estimated: Values,
    exact: Values,
    groups: Sequence[object] | None = None,
    *,
    unit: str = "units of m",
    ax: Axes | None = None,
) -> Axes:
    """App. E: effect of ablating each node alone, estimated by the gradient (x) and measured (y), both (node,).

    `unit` is that of the metric m, such as "logits" for a logit or "nats" for a log-probability.
    `groups` (kind, group or layer of each node) colours the dots. Axes are linear within 1 % of the largest effect and
    logarithmic outside; the title gives Pearson's r of the plain values where both vary, and how many have none.
    """
    x = checked("estimated", estimated, node=None)
    y = checked("exact", exact, node=len(x))
    names = np.array([role_name(group) for group in groups] if groups is not None else ["nodes"] * len(x))
    if len(names) != len(x):
        raise ValueError(f"groups must name the group of each of the {len(x)} nodes, got {len(names)}")
    known = np.isfinite(x) & np.isfinite(y)
    lost = int((~known).sum())
    x, y, names = x[known], y[known], names[known]
    ax = axes_for(ax, width=4.6, height=4.2)
    most = max(np.abs([*x, *y]).max(initial=0), 1e-12)
    for name, colour in colours_for(names.tolist(), KIND_COLOURS | ROLE_COLOURS).items():
        rows, style = names == name, {"alpha": 0.5, "markersize": 4, "rasterized": True}
        ax.plot(x[rows], y[rows], ".", color=colour, label=f"{name} ({rows.sum()})", **style)
    ax.plot([-most, most], [-most, most], color="black", linewidth=0.8, linestyle="--")
    decades = [float(f"1e{k}") for k in range(-12, 6) if 0.012 * most < 10.0**k <= most]
    ticks = [*(-d for d in reversed(decades)), 0.0, *decades]
    ax.set_xscale("symlog", linthresh=0.01 * most)
    ax.set_yscale("symlog", linthresh=0.01 * most)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    limits = (-1.6 * most if min([*x, *y], default=0) < -0.01 * most else -0.02 * most, 1.6 * most)
    ax.set(xlim=limits, ylim=limits, xlabel=f"estimated effect ({unit})", ylabel=f"measured effect ({unit})")
    varied = len(x) > 1 and x.std() > 0 and y.std() > 0
    r = f", r = {np.corrcoef(x, y)[0, 1]:.2f}" if varied else ""
    ax.set_title(f"{len(x)} nodes{r}{missing(lost, 'node')}")
    if groups is not None:
        ax.legend(loc="upper left", markerscale=2)
    return ax


def node_counts(nodes: pd.DataFrame) -> Figure:
    """Number of nodes per layer and per group of tokens, stacked by SAE kind, as the columns `layer`, `kind`, `group`
    say.
    """
    need_columns("nodes", nodes, ("layer", "kind", "group"))
    if not len(nodes):
        raise ValueError("nodes is empty: lower the threshold of the circuit")
    kinds, groups = nodes["kind"], nodes["group"].map(role_name)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), sharey=False, layout="constrained")
    by_layer = pd.crosstab(nodes["layer"].astype(int), kinds)
    by_group = pd.crosstab(groups, kinds).reindex(in_order(groups, ROLE_COLOURS))
    for ax, counts, label in ((left, by_layer, "layer"), (right, by_group, "group of tokens")):
        bottom = np.zeros(len(counts))
        for kind, colour in colours_for(sorted(counts.columns), KIND_COLOURS).items():
            ax.bar(counts.index, counts[kind], 0.7, bottom=bottom, color=colour, label=kind)
            bottom += counts[kind].to_numpy()
        for x, total in zip(counts.index, bottom, strict=True):
            ax.annotate(f"{total:.0f}", (x, total), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
        ax.set(xlabel=label, ylabel="nodes")
        ax.grid(axis="x", visible=False)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(loc="best")
    return figure


def halving_bars(counts: Values, tasks: Sequence[str], *, bar: Number | None = None, ax: Axes | None = None) -> Axes:
    """How many nodes are ablated until a task's own faithfulness is below 0.5, `counts` (task,), sorted; NaN: it never
    is.

    The dashed line is the median over tasks, `bar` a level asked for.
    """
    counts = checked("counts", counts, task=len(tasks))
    ax = axes_for(ax, height=1.0 + 0.165 * len(tasks))
    order, y = np.argsort(np.where(np.isfinite(counts), counts, np.inf)), np.arange(len(tasks))
    shown = counts[order]
    most = np.nanmax(shown) if np.isfinite(shown).any() else 1.0
    ax.barh(y, np.nan_to_num(shown), 0.7, color=OKABE_ITO["vermillion"], alpha=0.6)
    for i in y[~np.isfinite(shown)]:
        ax.text(0.01 * most, i, "not reached", va="center", fontsize=7, color=FAINT)
    if np.isfinite(shown).any():
        # a task that never falls counts as above every other one
        median = np.median(np.where(np.isfinite(counts), counts, np.inf))
        if np.isfinite(median):
            ax.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median {median:.0f}")
    if bar is not None:
        ax.axvline(bar, color="black", linestyle=":", linewidth=1, label=f"bar {bar:g}")
    ax.set_yticks(y, [tasks[i] for i in order], fontsize=7 if len(tasks) > 12 else 8)
    ax.set_ylim(len(tasks) - 0.3, -0.7)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="nodes ablated until faithfulness < 0.5")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper right")
    return ax
