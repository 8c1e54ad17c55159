"""Figures about the model and its SAEs: learning in context, training, quality of the suite."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from icl_lib.figures.style import (
    KIND_COLOURS,
    Number,
    Values,
    axes_for,
    band,
    checked,
    colours_for,
    faint,
    mean,
    mean_and_error,
    need_columns,
    plain_log,
)


def accuracy_vs_shots(
    shots: Values, accuracy: Values, groups: Sequence[str], *, ax: Axes | None = None, chance: Number | None = None
) -> Axes:
    """Accuracy against the number of examples in the prompt.

    `accuracy` (task, shots) in [0, 1]; `groups` names the group of each task and colours its faint line. The black
    line is the mean over tasks, its band the standard error; `chance` draws a dashed level.
    """
    shots = checked("shots", shots, shots=None)
    accuracy = checked("accuracy", accuracy, task=len(groups), shots=len(shots))
    ax = axes_for(ax)
    colours = colours_for(groups)
    for group, colour in colours.items():
        rows = accuracy[[name == group for name in groups]]
        faint(ax, shots, rows, colour)
        ax.plot(shots, mean(rows, axis=0), color=colour, linewidth=1.3, label=f"{group} ({len(rows)})")
    band(ax, shots, accuracy, label=f"mean of {len(groups)} tasks ± s.e.", colour="black")
    if chance is not None:
        ax.axhline(chance, color="black", linestyle=":", linewidth=1, label="chance")
    ax.set(xlabel="examples in the prompt (shots)", ylabel="accuracy of the answer's first token", ylim=(-0.02, 1.03))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def training_curve(
    steps: Values, curves: Mapping[str, Values], *, ax: Axes | None = None, ylabel: str = "loss (nats per token)"
) -> Axes:
    """One line per entry of `curves` (name -> (step,)) against the step; logarithmic where all are positive."""
    steps = checked("steps", steps, step=None)
    ax = axes_for(ax, height=2.8)
    lines = {name: checked(f"curves[{name!r}]", values, step=len(steps)) for name, values in curves.items()}
    for name, values in lines.items():
        ax.plot(steps, values, label=name, linewidth=1.3)
    if all((values > 0).all() for values in lines.values()):
        plain_log(ax.yaxis)
    ax.set(xlabel="training step", ylabel=ylabel)
    if len(lines) > 1:
        ax.legend()
    return ax


def sae_quality(table: pd.DataFrame, *, recovered: str = "ce_recovered", bar: Number | None = None) -> Figure:
    """Left: FVU about the mean against L0, one point per SAE with its layer beside it. Right: CE recovered per layer.

    `table` has one row per SAE and the columns `kind`, `layer`, `l0` (latents per token), `fvu`, and
    `recovered`, the fraction of the cross-entropy recovered. `bar` draws the level asked for.
    """
    need_columns("table", table, ("kind", "layer", "l0", "fvu", recovered))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for kind, colour in colours_for(table["kind"].tolist(), KIND_COLOURS).items():
        rows = table[table["kind"] == kind].sort_values("layer")
        left.plot(rows["l0"], rows["fvu"], "o", color=colour, label=kind)
        for layer, x, y in zip(rows["layer"], rows["l0"], rows["fvu"], strict=True):
            left.annotate(str(int(layer)), (x, y), xytext=(4, 2), textcoords="offset points", fontsize=7, color=colour)
        right.plot(rows["layer"], rows[recovered], "o-", color=colour, label=kind, markersize=4, linewidth=1.3)
    left.set(
        xlabel="L0 (active latents per token)", ylabel="FVU (0 perfect, 1 the mean)", xlim=(0, None), ylim=(0, None)
    )
    left.set_title("sparsity and error (number: layer)")
    right.set(xlabel="layer", ylabel="CE loss recovered", title="what the model keeps with the SAE in place")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    if bar is not None:
        right.axhline(bar, color="black", linestyle=":", linewidth=1, label=f"bar {bar:g}")
    right.legend(loc="best")
    return figure


def width_lines(
    table: pd.DataFrame,
    column: str,
    *,
    ax: Axes | None = None,
    style: str = "o-",
    suffix: str = "",
    legend: bool = True,
) -> Axes:
    """One column of a table of SAEs of several widths and sparsities against their L0: one line a width, narrow dark to
    wide bright.

    `table` has one row per SAE and the columns `d_sae` and `l0`; `suffix` is added to the name of each line, which
    `legend` keeps.
    """
    need_columns("table", table, ("d_sae", "l0", column))
    ax = axes_for(ax, height=3.2)
    widths = sorted(set(table["d_sae"]))
    for width, colour in zip(widths, plt.get_cmap("cividis")(np.linspace(0, 0.85, len(widths))), strict=True):
        rows = table[table["d_sae"] == width].sort_values("l0")
        label = f"{width} latents{suffix}" if legend else None
        ax.plot(rows["l0"], rows[column], style, color=colour, linewidth=1.3, label=label)
    plain_log(ax.xaxis)
    ax.set(xlabel="L0 of the SAE (active latents per token)", ylabel=column)
    return ax


def group_bars(values: Values, groups: Sequence[str], *, ylabel: str, ax: Axes | None = None) -> Axes:
    """Mean ± standard error of `values` (task,) within each group, single tasks as dots beside their bar."""
    values = checked("values", values, task=len(groups))
    ax = axes_for(ax, width=5.6, height=2.8)
    colours = colours_for(groups)
    for i, (group, colour) in enumerate(colours.items()):
        rows = values[[name == group for name in groups]]
        middle, error = mean_and_error(rows)
        ax.bar(i, middle, 0.6, color=colour, alpha=0.5, yerr=error, ecolor="black", capsize=3)
        ax.plot([i + 0.38] * len(rows), rows, ".", color=colour, markersize=4)
    ax.set_xticks(range(len(colours)), list(colours))
    ax.set(ylabel=ylabel, title="bars: mean ± s.e., dots: tasks")
    return ax
