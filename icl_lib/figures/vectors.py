"""Figures about task vectors and their cleaning: layers, number of latents, sweeps (Fig 3 and App. D.1 of ICL-SFC).

Relative loss change = (L - L_zero) / L_zero with L the summed NLL of the first answer tokens: negative is better.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from icl_lib.figures.style import (
    OKABE_ITO,
    Number,
    Values,
    axes_for,
    band,
    checked,
    colours_for,
    mean,
    mean_and_error,
    missing,
)

METHOD_COLOURS = {
    "TVC": OKABE_ITO["vermillion"],
    "task vector": OKABE_ITO["black"],
    "SAE reconstruction": OKABE_ITO["blue"],
    "SAE encoding": OKABE_ITO["blue"],
    "ITO": OKABE_ITO["sky"],
    "ITO(20)": OKABE_ITO["green"],
    "ITO(5)": OKABE_ITO["sky"],
}
MARKERS = "osD^vPX"
CHANGE = "relative change of loss, $(L - L_0)/L_0$"


def layer_curves(
    layers: Values, change: Mapping[str, Values], *, ax: Axes | None = None, mark: int | None = None
) -> Axes:
    """Fig 3a: relative loss change against the layer of insertion, one line per method, `change[method]` (task, layer).

    Lines are means over tasks, bands their standard errors; `mark` draws the layer used afterwards.
    """
    layers = checked("layers", layers, layer=None)
    ax = axes_for(ax, height=3.3)
    colours = colours_for(list(change), METHOD_COLOURS)
    n_tasks = 0
    for i, (method, values) in enumerate(change.items()):
        values = checked(f"change[{method!r}]", values, task=None, layer=len(layers))
        n_tasks = len(values)
        band(ax, layers, values, label=method, colour=colours[method], marker=MARKERS[i % len(MARKERS)])
    ax.axhline(0, color="black", linewidth=0.8)
    if mark is not None:
        ax.axvline(mark, color="black", linestyle=":", linewidth=1)
    ax.set(xlabel="layer of insertion", ylabel=CHANGE)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_title(f"mean of {n_tasks} tasks ± s.e.; lower is better")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def l0_bars(l0: Mapping[str, Values], *, published: Mapping[str, Number] | None = None, ax: Axes | None = None) -> Axes:
    """Fig 3b: mean number of active latents per method, `l0[method]` (task,), with standard error and tasks as dots.

    `published[method]` is drawn as a dashed level across the bar.
    """
    ax = axes_for(ax, width=1.6 + 1.2 * len(l0), height=3.2)
    colours = colours_for(list(l0), METHOD_COLOURS)
    for i, (method, values) in enumerate(l0.items()):
        values = checked(f"l0[{method!r}]", values, task=None)
        middle, error = mean_and_error(values)
        ax.bar(i, middle, 0.62, color=colours[method], alpha=0.55, yerr=error, ecolor="black", capsize=3)
        spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1)
        ax.plot(i + spread, np.sort(values), ".", color="black", markersize=3, alpha=0.6)
    for i, method in enumerate(l0):
        if published and method in published:
            label = "published" if i == min(list(l0).index(m) for m in published if m in l0) else None
            ax.hlines(published[method], i - 0.4, i + 0.4, color="black", linestyle="--", linewidth=1.2, label=label)
    ax.set_xticks(range(len(l0)), [f"{method}\n{mean(values):.1f}" for method, values in l0.items()])
    ax.margins(y=0.15)
    ax.set(ylabel="active latents (L0)", title="mean ± s.e.; dots: tasks")
    ax.grid(axis="x", visible=False)
    if published:
        ax.legend(loc="upper left")
    return ax


def sweep_scatter(
    points: Mapping[str, tuple[Values, Values]], *, ax: Axes | None = None, floor: Number = -2.0, widest: Number = 2.0
) -> Axes:
    """App. D.1: one dot per (task, setting) of each method, `points[method] = (l0_fraction, delta)`, both (point,).

    x is L0 over the L0 of the SAE encoding; y = (L_task_vector - L_method) / L_zero, above 0 where the sparse vector
    beats the original. y is clipped at `floor`, points with x > `widest` and points without value are left out (the
    label counts them).
    """
    ax = axes_for(ax, height=3.6)
    colours = colours_for(list(points), METHOD_COLOURS)
    for method, (x, y) in points.items():
        x = checked(f"points[{method!r}][0]", x, point=None)
        y = checked(f"points[{method!r}][1]", y, point=len(x))
        known = np.isfinite(x) & np.isfinite(y)
        kept = known & (x <= widest)
        beyond = np.sum(known & ~kept)
        dropped = (f", {beyond} beyond" if beyond else "") + missing(np.sum(~known), "point")
        ax.plot(
            x[kept], np.maximum(y[kept], floor), ".", color=colours[method], alpha=0.45, markersize=5,
            label=f"{method} ({kept.sum()}{dropped})", rasterized=True,
        )  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
    ax.set(
        xlabel="L0 / L0 of the SAE encoding",
        ylabel=r"gain over the task vector, $(L_\mathrm{TV} - L)/L_0$",
        xlim=(0, None),
    )
    ax.legend(loc="lower right")
    return ax


def sweep_panels(l1: Values, decrease: Values, fraction: Values, *, reference: Number | None = None) -> Figure:
    """App. D.1: relative loss decrease and L0 fraction (task, l1) against the penalty, mean ± standard deviation.

    `reference` is the mean decrease of the original task vector, drawn dashed.
    """
    l1 = checked("l1", l1, l1=None)
    decrease = checked("decrease", decrease, task=None, l1=len(l1))
    fraction = checked("fraction", fraction, task=len(decrease), l1=len(l1))
    if (l1 <= 0).any():
        raise ValueError(f"l1 is drawn on a logarithmic axis and must be positive, got {l1.tolist()}")
    figure, panels = plt.subplots(2, 1, figsize=(6.4, 4.6), sharex=True, layout="constrained")
    for ax, values, colour in zip(
        panels, (decrease, fraction), (OKABE_ITO["vermillion"], OKABE_ITO["blue"]), strict=True
    ):
        middle = mean(values, axis=0)
        spread = np.sqrt(mean((values - middle) ** 2, axis=0))
        ax.plot(l1, middle, "o-", color=colour)
        ax.fill_between(l1, middle - spread, middle + spread, color=colour, alpha=0.18, linewidth=0, antialiased=False)
        ax.axhline(0, color="black", linewidth=0.8)
    lost = int((~np.isfinite(decrease) | ~np.isfinite(fraction)).any(axis=1).sum())
    if reference is not None:
        panels[0].axhline(reference, color="black", linestyle="--", linewidth=1, label="task vector")
        panels[0].legend(loc="best")
    panels[0].set(ylabel="relative loss decrease", title=f"mean of {len(decrease)} tasks ± s.d.{missing(lost, 'task')}")
    panels[1].set(ylabel="L0 / L0 of encoding", xlabel="sparsity penalty λ", xscale="log")
    return figure


def pareto(l0: Values, loss: Values) -> np.ndarray:
    """Indices of the points that no other point beats (no more latents and no higher loss), by rising L0."""
    l0 = checked("l0", l0, point=None)
    loss = checked("loss", loss, point=len(l0))
    kept, best = [], np.inf
    for i in np.lexsort((loss, l0)):
        if loss[i] < best:
            kept.append(i)
            best = loss[i]
    return np.asarray(kept, dtype=int)


def pareto_front(points: Mapping[str, tuple[Values, Values]], *, ylabel: str = CHANGE, ax: Axes | None = None) -> Axes:
    """Loss against the number of latents, `points[method] = (l0, loss)`, with each method's front as steps."""
    ax = axes_for(ax, height=3.6)
    colours = colours_for(list(points), METHOD_COLOURS)
    for method, (l0, loss) in points.items():
        l0 = checked(f"points[{method!r}][0]", l0, point=None)
        loss = checked(f"points[{method!r}][1]", loss, point=len(l0))
        front = pareto(l0, loss)
        ax.plot(l0, loss, ".", color=colours[method], alpha=0.3, markersize=4, rasterized=True)
        ax.step(l0[front], loss[front], where="post", color=colours[method], label=method)
        ax.plot(l0[front], loss[front], "o", color=colours[method])
    ax.set(xlabel="active latents (L0)", ylabel=ylabel, title="dots: settings, steps: Pareto front")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
    return ax


def equal_l0(ito: Values, tvc: Values, tasks: Sequence[str], l0: Values, *, ax: Axes | None = None) -> Axes:
    """Per task, the relative loss change of ITO and of TVC at the same number of latents `l0` (all (task,)).

    One row per task, its L0 in brackets, sorted by TVC; the bar between the two dots is the gain of TVC over ITO.
    """
    ito = checked("ito", ito, task=len(tasks))
    tvc = checked("tvc", tvc, task=len(tasks))
    l0 = checked("l0", l0, task=len(tasks))
    ax = axes_for(ax, height=0.9 + 0.165 * len(tasks))
    order, y = np.argsort(tvc)[::-1], np.arange(len(tasks))
    lost = int((~np.isfinite(tvc) | ~np.isfinite(ito)).sum())
    ax.hlines(y, ito[order], tvc[order], color="#c4c4c4", linewidth=1.5)
    ax.plot(ito[order], y, "o", color=METHOD_COLOURS["ITO"], label="ITO")
    ax.plot(tvc[order], y, "s", color=METHOD_COLOURS["TVC"], label="TVC")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(y, [f"{tasks[i]} ({l0[i]:.0f})" for i in order], fontsize=7 if len(tasks) > 12 else 8)
    ax.set_ylim(-0.7, len(tasks) - 0.3)
    ax.set(
        xlabel=CHANGE,
        title=f"TVC lower on {np.sum(tvc < ito)} of {len(tasks)} tasks (in brackets: L0){missing(lost, 'task')}",
    )
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.legend(loc="best")
    return ax


def effect_vs_shots(
    shots: Values, change: Mapping[str, Values], *, ax: Axes | None = None, ylabel: str = CHANGE
) -> Axes:
    """How a vector's effect depends on the number of examples it was read from: `change[method]` (task, shots)."""
    shots = checked("shots", shots, shots=None)
    ax = axes_for(ax, height=3.0)
    colours = colours_for(list(change), METHOD_COLOURS)
    for i, (method, values) in enumerate(change.items()):
        values = checked(f"change[{method!r}]", values, task=None, shots=len(shots))
        band(ax, shots, values, label=method, colour=colours[method], marker=MARKERS[i % len(MARKERS)])
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="examples in the prompts of extraction (shots)", ylabel=ylabel, title="mean over tasks ± s.e.")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
    return ax
