"""Figures about task vectors and their cleaning: layers, number of latents, sweeps (Fig 3 and App. D.1 of ICL-SFC).

Relative loss decrease = (L_0 - L) / L_0, with L the summed NLL of the first answer tokens and L_0 that with nothing
inserted: positive is better, 1 leaves no loss.
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
DECREASE = "relative loss decrease, $(L_0 - L)/L_0$"


def layer_curves(
    layers: Values, decrease: Mapping[str, Values], *, mark: int | None = None, reference: str | None = None
) -> Figure:
    """Fig 3a: relative loss decrease against the layer of insertion, one line per method, `decrease[method]` (task,
    layer).

    Lines are means over tasks, bands their standard errors; `mark` draws the layer used afterwards. A second panel
    shows the other methods less that of `reference`, task by task, so that lines that lie on one another come apart.
    """
    layers = checked("layers", layers, layer=None)
    values = {m: checked(f"decrease[{m!r}]", v, task=None, layer=len(layers)) for m, v in decrease.items()}
    panels = [("", values)]
    if reference is not None:
        others = {method: rows - values[reference] for method, rows in values.items() if method != reference}
        panels.append((f" minus the {reference}'s", others))
    width = 3.8 * len(panels) + 1.8
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.3), layout="constrained", squeeze=False)
    colours, marker = colours_for(list(decrease), METHOD_COLOURS), dict(zip(decrease, MARKERS * 3, strict=False))
    for ax, (minus, curves) in zip(axes[0], panels, strict=True):
        for method, rows in curves.items():
            band(ax, layers, rows, label=method, colour=colours[method], marker=marker[method])
        ax.axhline(0, color="black", linewidth=0.8)
        if mark is not None:
            ax.axvline(mark, color="black", linestyle=":", linewidth=1)
        ax.set(xlabel="layer of insertion", ylabel=f"loss decrease{minus}" if minus else DECREASE)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_title(f"mean of {len(next(iter(values.values())))} tasks ± s.e.; higher is better")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


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


def pareto(l0: Values, decrease: Values) -> np.ndarray:
    """Indices of the points that no other point beats (no more latents and no smaller decrease), by rising L0."""
    l0 = checked("l0", l0, point=None)
    decrease = checked("decrease", decrease, point=len(l0))
    kept, best = [], -np.inf
    for i in np.lexsort((-decrease, l0)):
        if decrease[i] > best:
            kept.append(i)
            best = decrease[i]
    return np.asarray(kept, dtype=int)


def pareto_front(
    points: Mapping[str, tuple[Values, Values]], *, ylabel: str = DECREASE, ax: Axes | None = None
) -> Axes:
    """Loss decrease against the number of latents, `points[method] = (l0, decrease)`, each method's front as steps."""
    ax = axes_for(ax, height=3.6)
    colours = colours_for(list(points), METHOD_COLOURS)
    for method, (l0, decrease) in points.items():
        l0 = checked(f"points[{method!r}][0]", l0, point=None)
        decrease = checked(f"points[{method!r}][1]", decrease, point=len(l0))
        front = pareto(l0, decrease)
        ax.plot(l0, decrease, ".", color=colours[method], alpha=0.3, markersize=4, rasterized=True)
        ax.step(l0[front], decrease[front], where="post", color=colours[method], label=method)
        ax.plot(l0[front], decrease[front], "o", color=colours[method])
    ax.set(xlabel="active latents (L0)", ylabel=ylabel, title="dots: settings, steps: Pareto front")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
    return ax


def equal_l0(ito: Values, tvc: Values, tasks: Sequence[str], l0: Values, *, ax: Axes | None = None) -> Axes:
    """Per task, the relative loss decrease by ITO and by TVC at the same number of latents `l0` (all (task,)).

    One row per task, its L0 in brackets, sorted by TVC; the bar between the two dots is the gain of TVC over ITO.
    """
    ito = checked("ito", ito, task=len(tasks))
    tvc = checked("tvc", tvc, task=len(tasks))
    l0 = checked("l0", l0, task=len(tasks))
    ax = axes_for(ax, height=0.9 + 0.165 * len(tasks))
    order, y = np.argsort(tvc), np.arange(len(tasks))
    lost = int((~np.isfinite(tvc) | ~np.isfinite(ito)).sum())
    ax.hlines(y, ito[order], tvc[order], color="#c4c4c4", linewidth=1.5)
    ax.plot(ito[order], y, "o", color=METHOD_COLOURS["ITO"], label="ITO")
    ax.plot(tvc[order], y, "s", color=METHOD_COLOURS["TVC"], label="TVC")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(y, [f"{tasks[i]} ({l0[i]:.0f})" for i in order], fontsize=7 if len(tasks) > 12 else 8)
    ax.set_ylim(-0.7, len(tasks) - 0.3)
    ax.set(
        xlabel=DECREASE,
        title=f"TVC ahead on {np.sum(tvc > ito)} of {len(tasks)} tasks (in brackets: L0){missing(lost, 'task')}",
    )
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.legend(loc="best")
    return ax


def effect_vs_shots(
    shots: Values, decrease: Mapping[str, Values], *, ax: Axes | None = None, ylabel: str = DECREASE
) -> Axes:
    """How a vector's effect depends on the number of examples it was read from: `decrease[method]` (task, shots)."""
    shots = checked("shots", shots, shots=None)
    ax = axes_for(ax, height=3.0)
    colours = colours_for(list(decrease), METHOD_COLOURS)
    for i, (method, values) in enumerate(decrease.items()):
        values = checked(f"decrease[{method!r}]", values, task=None, shots=len(shots))
        band(ax, shots, values, label=method, colour=colours[method], marker=MARKERS[i % len(MARKERS)])
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="examples in the prompts of extraction (shots)", ylabel=ylabel, title="mean over tasks ± s.e.")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best")
    return ax
