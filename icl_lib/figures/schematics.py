"""Figures that show how something works, not a result: the mechanism (Fig 1) and task vector cleaning (Fig 10)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from icl_lib.figures.prompts import MONO_WIDTH, WIDTH, text_figure, visible, word
from icl_lib.figures.style import OKABE_ITO, ROLE_COLOURS, Number, pale


def schematic(
    pairs: Sequence[tuple[str, str]],
    *,
    detector_layer: int,
    executor_layer: int,
    detector: str = "detectors",
    executor: str = "executor",
) -> Figure:
    """Fig 1: detectors fire on the outputs, attention carries them to the arrow, an executor there makes the answer.

    `pairs` are the examples and, last, the query with the answer that the model gives. Raises `ValueError` for fewer
    than two pairs.
    """
    if len(pairs) < 2:
        raise ValueError(f"the schematic needs an example and a query, got {len(pairs)} pair(s)")
    tokens = [text for x, y in pairs for text in (x, "→", y)][:-1]
    wide = [MONO_WIDTH * 11 * len(visible(token)) + 8 for token in tokens]
    weights = np.array([3.0 if i % 3 == 2 else 1.0 for i in range(len(tokens))])  # pairs stand apart
    spare = WIDTH * 72 - 150 - sum(wide)
    if spare < 0:
        raise ValueError(f"{len(pairs)} pairs do not fit on one line of {WIDTH} inches: give fewer or shorter words")
    figure, ax = text_figure(height=214)
    left, middles = 95.0, []
    for i, token in enumerate(tokens):
        role = ("input", "arrow", "output")[i % 3]
        word(ax, left, 186, wide[i], token, 11, pale(ROLE_COLOURS[role], 0.45), ROLE_COLOURS[role])
        middles.append(left + wide[i] / 2)
        left += wide[i] + spare * weights[i] / weights.sum()
    heights = {"answer": 26.0, "executor": 78.0, "detector": 132.0}
    labels = {"detector": f"layer {detector_layer}", "executor": f"layer {executor_layer}", "answer": "output"}
    for name, y in (*heights.items(), ("prompt", 186.0)):
        ax.text(8, y, labels.get(name, name), fontsize=9, va="center", color="#555555")
        ax.axhline(y, 84 / (WIDTH * 72), 0.985, color="#ececec", linewidth=0.8, zorder=0)
    target = (middles[-1], heights["executor"])
    for x in middles[2:-1:3]:
        stem(ax, (x, 176), (x, heights["detector"] + 9), "#777777")
        stem(ax, (x, heights["detector"] - 9), (target[0] - 10, target[1] + 9), ROLE_COLOURS["output"], bend=-0.12)
        badge(ax, x, heights["detector"], detector, ROLE_COLOURS["output"])
    stem(ax, (middles[-1], 176), (target[0], target[1] + 10), "#777777")
    stem(ax, (target[0], target[1] - 10), (target[0], heights["answer"] + 10), ROLE_COLOURS["arrow"])
    badge(ax, *target, executor, ROLE_COLOURS["arrow"])
    badge(ax, target[0], heights["answer"], pairs[-1][1], "#444444")
    ax.text(
        middles[2] - 8, 106, "attention, MLP", fontsize=8.5, color=ROLE_COLOURS["output"], ha="right", style="italic"
    )
    return figure


def badge(ax: Axes, x: Number, y: Number, text: str, colour: str) -> None:
    """A rounded label centred at (x, y)."""
    box = {"boxstyle": "round,pad=0.35", "facecolor": pale(colour, 0.25), "edgecolor": colour}
    ax.text(x, y, text, ha="center", va="center", fontsize=9.5, bbox=box, zorder=4, parse_math=False)


def stem(ax: Axes, start: tuple[Number, Number], end: tuple[Number, Number], colour: str, bend: Number = 0.0) -> None:
    """An arrow from start to end, bent by a fraction of its length."""
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=10, color=colour, linewidth=1.3,
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=1, zorder=2,
        )
    )  # fmt: skip


def cleaning_overview() -> Figure:
    """Fig 10: what task vector cleaning does in one step, from the task vector to the change of its pre-activations."""
    figure, ax = text_figure(height=190)
    blue, orange, grey = OKABE_ITO["blue"], ROLE_COLOURS["arrow"], "#444444"
    top, bottom = 50.0, 140.0
    places = {
        "vector": (72, top, "task vector\n$v$", grey),
        "theta": (216, top, "pre-activations\n$\\theta$", blue),
        "f": (352, top, "latents\n$f = \\mathrm{act}(\\theta)$", blue),
        "v": (502, top, "$v_\\theta = f W_{dec} + b_{dec}$\nadded at the arrow", orange),
        "nll": (502, bottom, "blocks above, frozen:\nloss of the answers", orange),
        "loss": (300, bottom, "$\\mathrm{NLL}(v_\\theta) + \\lambda \\sum_i f_i$", grey),
    }
    for x, y, text, colour in places.values():
        box = {"boxstyle": "round,pad=0.45", "facecolor": pale(colour, 0.2), "edgecolor": colour}
        ax.text(x, y, text, ha="center", va="center", fontsize=9.5, bbox=box, zorder=4)
    stem(ax, (108, top), (174, top), grey)
    ax.text(139, top - 14, "encode,\nonce", ha="center", va="bottom", fontsize=8, color=grey, style="italic")
    for start, end in (
        ((262, top), (324, top)),
        ((384, top), (446, top)),
        ((502, top + 22), (502, bottom - 22)),
        ((442, bottom), (344, bottom)),
    ):
        stem(ax, start, end, grey)
    stem(ax, (352, top + 22), (320, bottom - 16), blue)
    stem(ax, (257, bottom), (210, top + 20), blue, bend=-0.3)
    ax.text(
        186,
        112,
        "Adam step;\nwhat falls below its\nthreshold stays off",
        ha="right",
        va="center",
        fontsize=8,
        color=blue,
        style="italic",
    )
    return figure
