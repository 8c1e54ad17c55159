"""Figures about executors and detectors (Figs 5, 7, 8 and Tables 1, 2 of ICL-SFC), with their controls.

Effect of a latent on a task = relative loss decrease (L_0 - L_f) / L_0 when its direction is added: 1 removes the
whole loss, 0 does nothing, negative harms.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from icl_lib.figures.style import (
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
    ink,
    mean,
    missing,
    plain_log,
    role_name,
)

_NOTHING = 0.05  # a row whose largest effect is below this has none that is worth dividing by


def displayed(effects: Values, threshold: Number = 0.2) -> np.ndarray:
    """Effects (task, latent) as the paper's main heatmaps show them; for display only.

    Harmful and missing effects count as 0, each row is divided by its maximum, what is then below `threshold` becomes
    0, and the result lies in [0, 1]. A row without any positive effect stays 0. Source: ICL-SFC Fig 5.
    """
    effects = np.nan_to_num(np.clip(checked("effects", effects, task=None, latent=None), 0, None))
    top = effects.max(axis=1, keepdims=True)
    shown = np.divide(effects, top, out=np.zeros_like(effects), where=top > 0)
    return np.where(shown < threshold, 0.0, np.clip(shown, 0.0, 1.0))


def _known(effects: np.ndarray) -> np.ndarray:
    """Effects for sorting: a missing one is below all others."""
    return np.where(np.isnan(effects), -np.inf, effects)


def diagonal_order(effects: Values, n_latents: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Row and column order that brings a task x latent matrix near the diagonal.

    Columns by falling maximum (ties in their old order), the first `n_latents` of them kept; then rows by the position
    of their largest kept column. Returns (rows, columns) to index with `effects[rows][:, columns]`.
    """
    effects = _known(checked("effects", effects, task=None, latent=None))
    columns = np.argsort(-effects.max(axis=0), kind="stable")[:n_latents]
    return np.argsort(effects[:, columns].argmax(axis=1), kind="stable"), columns


def task_latent_heatmap(
    effects: Values,
    tasks: Sequence[str],
    latents: Sequence[object],
    *,
    normalised: bool = True,
    n_latents: int | None = None,
    encoded: Values | None = None,
    survives: Values | None = None,
    what: str = "latent",
    ax: Axes | None = None,
) -> Axes:
    """Figs 5 and 7 (and App. F): effect of steering with each latent on each task, `effects` (task, latent).

    `normalised` shows `displayed(effects)`, with what each row is divided by in brackets behind its task and rows
    without an effect of 0.05 in grey, otherwise the raw effects with harm clipped to 0. Columns and rows follow
    `diagonal_order` of the normalised effects among the columns of largest raw effect. Masks (task, latent) put dots:
    `encoded` red, the latent is active in the code that cleaning starts from; `survives` green, it is left by TVC.
    `what` names the columns, for example "executor of layer 3".
    """
    effects = checked("effects", effects, task=len(tasks), latent=len(latents))
    strongest = np.argsort(-_known(effects).max(axis=0), kind="stable")[:n_latents]
    rows, columns = diagonal_order(displayed(effects)[:, strongest])
    columns = strongest[columns]
    top = np.nan_to_num(np.clip(effects, 0, None)).max(axis=1)
    nothing = np.isnan(effects) | (top < _NOTHING)[:, None]
    shown = np.where(nothing, np.nan, displayed(effects)) if normalised else np.clip(effects, 0, None)
    ax = axes_for(ax, width=9.0, height=1.3 + 0.17 * len(tasks) + 0.045 * max(len(str(name)) for name in latents))
    label = "loss decrease / best of its row" if normalised else "relative loss decrease"
    names = [str(latents[j]) for j in columns]
    tasks = [f"{task} ({best:.2f})" for task, best in zip(tasks, top, strict=True)] if normalised else tasks
    heatmap(ax, shown[rows][:, columns], [tasks[i] for i in rows], names, colour_label=label)
    dots = {
        "active before cleaning": (encoded, OKABE_ITO["vermillion"], 16),
        "survives cleaning": (survives, "#00D68F", 9),
    }
    for name, (mask, colour, size) in dots.items():
        if mask is not None:
            mask = checked(name, mask, task=len(tasks), latent=len(latents))[rows][:, columns] > 0
            y, x = np.nonzero(mask)
            ax.scatter(x, y, s=size, color=colour, edgecolors="white", linewidths=0.4, label=name, rasterized=True)
    if encoded is not None or survives is not None:
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2, markerscale=1.6)
    ax.set(xlabel=what)
    return ax


def role_mass(
    mass: Values,
    names: Sequence[str],
    roles: Sequence[object],
    *,
    published: Values | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Where latents fire: one stacked bar per latent, `mass` (latent, role) with rows that sum to 1.

    A latent that never fires has a row of NaN: its bar is hatched, and it is left out of the mean. The lowest bars are
    the mean over latents and, where given, the `published` mass (role,).
    """
    roles = [role_name(role) for role in roles]
    mass = checked("mass", mass, latent=len(names), role=len(roles))
    fires = ~np.isnan(mass).all(axis=1)
    if not np.allclose(mass[fires].sum(axis=1), 1, atol=1e-3):
        raise ValueError(f"mass must sum to 1 over the roles of each latent, got sums {mass.sum(axis=1).round(3)}")
    overall = mean(mass, axis=0)
    order = np.argsort(-mass[:, np.nan_to_num(overall).argmax()], kind="stable")
    bars, labels = [*mass[order], overall], [*(str(names[i]) for i in order), f"mean of {fires.sum()}"]
    if published is not None:
        bars.append(checked("published", published, role=len(roles)))
        labels.append("published mean")
    bars = np.array(bars)
    y = np.arange(len(bars)) + 0.6 * (np.arange(len(bars)) >= len(names))
    ax = axes_for(ax, width=7.5, height=1.0 + 0.19 * len(bars))
    silent = np.isnan(bars).all(axis=1)
    if silent.any():
        ax.barh(y[silent], 1.0, 0.78, color="#e6e6e6", edgecolor="#9a9a9a", hatch="///", label="never fires")
    bars = np.nan_to_num(bars)
    left, colours = np.zeros(len(bars)), colours_for(roles, ROLE_COLOURS)
    for role, column in zip(roles, bars.T, strict=True):
        if not column.any():
            continue
        colour = colours[role]
        ax.barh(y, column, 0.78, left=left, label=role, color=colour)
        for i in range(len(names), len(bars)):
            if column[i] >= 0.05:
                at = (left[i] + column[i] / 2, y[i])
                ax.text(*at, f"{100 * column[i]:.1f}", ha="center", va="center", fontsize=7, color=ink(colour))
        left += column
    ax.set_yticks(y, labels, fontsize=7)
    ax.set(xlabel="share of the latent's activation", xlim=(0, 1), ylim=(y[-1] + 0.6, -0.6))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(axis="y", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def role_mass_table(
    mass: Values, roles: Sequence[object], published: Mapping[str, Number] | None = None
) -> pd.DataFrame:
    """Tables 1 and 2: mean and standard deviation over latents of the mass per role in %, beside the published %.

    `mass` (latent, role) as fractions, rows of NaN for latents that never fire, which are left out; `published` maps
    role names to per cent, roles without an entry get NaN.
    """
    roles = [role_name(role) for role in roles]
    mass = 100 * checked("mass", mass, latent=None, role=len(roles))
    mass = mass[~np.isnan(mass).any(axis=1)]
    nothing = np.full(len(roles), np.nan)
    columns = {"mean %": mass.mean(axis=0) if len(mass) else nothing}
    columns["s.d. %"] = mass.std(axis=0, ddof=int(len(mass) > 1)) if len(mass) else nothing
    if published is not None:
        columns["published %"] = [published.get(role, np.nan) for role in roles]
    return pd.DataFrame(columns, index=pd.Index(roles, name="token type"))


def link_heatmap(
    strength: Values,
    detectors: Sequence[str],
    executors: Sequence[str],
    *,
    same_task: Values | None = None,
    what: str = "activation lost / largest loss of the task, mean over tasks",
    ax: Axes | None = None,
) -> Axes:
    """Fig 8: how much of an executor's activation goes when a detector is ablated, `strength` (detector, executor).

    `what` names the colours: by default each task is taken to be divided by the largest of its matrix before the mean
    over tasks, as in the paper, so that values compare pairs and are no shares. `same_task` (detector, executor)
    outlines the pairs of one task; the title then compares their mean with the rest.
    """
    strength = checked("strength", strength, detector=len(detectors), executor=len(executors))
    ax = axes_for(ax, width=8.0, height=2.0 + 0.17 * len(detectors))
    heatmap(ax, strength, detectors, executors, colour_label=what)
    ax.set(xlabel="executor", ylabel="detector ablated")
    if same_task is not None:
        same = checked("same_task", same_task, detector=len(detectors), executor=len(executors)) > 0
        for y, x in np.argwhere(same).tolist():
            ax.add_patch(outline(x, y))
        if same.any() and (~same).any():
            pair, rest = mean(strength[same]), mean(strength[~same])
            ax.set_title(f"same task (outlined) {pair:.2f}, other pairs {rest:.2f}")
    return ax


def outline(x: int, y: int) -> Rectangle:
    """The frame of cell (x, y) of a heatmap."""
    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=OKABE_ITO["vermillion"], linewidth=1.2)


def latent_control(
    best: Values,
    random: Values,
    tasks: Sequence[str],
    *,
    bar: Number = 0.0,
    percentile: Number = 95.0,
    ax: Axes | None = None,
) -> Axes:
    """The control of single-latent steering: the best candidate of each task, `best` (task,), against random latents.

    `random` (task, draw) are the effects of latents drawn at random; the grey bar runs from their 5th to their given
    percentile, the tick is the median. A full dot lies above the percentile and reaches `bar`, an open one does not.
    The axis begins at -2: harm beyond it is cut off. A task without an effect has no dot; without draws there is no
    bar, and no latent stands above it.
    """
    best = checked("best", best, task=len(tasks))
    random = np.asarray(random, dtype=np.float64)
    if random.shape[1:] != (0,):
        random = checked("random", random, task=len(tasks), draw=None)
    drawn = np.percentile(random, [5, 50, percentile], axis=1) if random.size else np.full((3, len(tasks)), np.nan)
    low, middle, high = drawn
    order, y = np.argsort(best), np.arange(len(tasks))
    above = (best[order] > high[order]) & (best[order] >= bar)
    ax = axes_for(ax, height=1.0 + 0.165 * len(tasks))
    ax.barh(
        y, (high - low)[order], 0.55, left=low[order], color="#cfcfcf", label=f"random: 5th to {percentile:g}th pct."
    )
    ax.plot(middle[order], y, "|", color="black", markersize=6, label="random: median")
    ax.plot(best[order][above], y[above], "o", color=OKABE_ITO["vermillion"], markersize=5, label="best candidate")
    ax.plot(best[order][~above], y[~above], "o", mfc="white", color=OKABE_ITO["vermillion"], markersize=5)
    ax.axvline(0, color="black", linewidth=0.8)
    if bar:
        ax.axvline(bar, color="black", linestyle=":", linewidth=1, label=f"bar: {bar:g}")
    ax.set_yticks(y, [tasks[i] for i in order], fontsize=7 if len(tasks) > 12 else 8)
    ax.set_ylim(-0.7, len(tasks) - 0.3)
    what = f"random latents and {bar:g}" if bar else "random latents"
    lost = missing(int(np.isnan(best).sum()), "task") + ("" if random.size else "; no random latents left")
    cut_off = ax.get_xlim()[0] < -2
    ax.set_xlim(left=-2.0 if cut_off else None)
    label = "relative loss decrease (harm beyond -2 is cut off)" if cut_off else "relative loss decrease"
    ax.set(xlabel=label, title=f"above the {what} on {above.sum()} of {len(tasks)} tasks{lost}")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def scale_sweep(
    scales: Values, decrease: Mapping[str, Values], *, chosen: Number | None = None, ax: Axes | None = None
) -> Axes:
    """Relative loss decrease against the length of the steering vector, `decrease[name]` (task, scale), log axis.

    Bold is the mean over tasks with its standard error, faint are the tasks; `chosen` marks the length used.
    """
    scales = checked("scales", scales, scale=None)
    ax = axes_for(ax, height=3.0)
    for name, colour in colours_for(list(decrease)).items():
        values = checked(f"decrease[{name!r}]", decrease[name], task=None, scale=len(scales))
        faint(ax, scales, values, colour)
        band(ax, scales, values, label=f"{name}, mean of {len(values)} tasks ± s.e.", colour=colour)
    if chosen is not None and np.isfinite(chosen):
        ax.axvline(chosen, color="black", linestyle=":", linewidth=1, label=f"used: {chosen:g}")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="scale (norm of the added direction)", ylabel="relative loss decrease")
    plain_log(ax.xaxis)
    ax.set_ylim(max(ax.get_ylim()[0], -1.5), 1.05)
    ax.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")
    return ax
