"""Figures made of tokens: a prompt with its roles (Fig 2), the mechanism (Fig 1), max-activating examples (Fig 4)."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from icl_lib.figures.style import OKABE_ITO, ROLE_COLOURS, Number, Values, checked, pale, role_name

MONO_WIDTH = 0.602  # advance of DejaVu Sans Mono in units of the font size
WIDTH = 9.0  # inches: a notebook's column


def visible(token: str) -> str:
    """A token as it is printed: newline as ↵, tab as →|, leading space dropped, empty as ∅."""
    text = token.replace("\n", "↵").replace("\t", "→|").replace("▁", " ").strip()
    return text or "∅"


def flow(tokens: Sequence[str], width: Number, size: Number, gap: Number) -> list[tuple[int, float, float]]:
    """(line, left, box width) in points for tokens set one after another; a line ends after a newline or when full."""
    places, line, left = [], 0, 0.0
    for token in tokens:
        wide = MONO_WIDTH * size * len(visible(token)) + 5
        if left > 0 and left + wide > width:
            line, left = line + 1, 0.0
        places.append((line, left, wide))
        left += wide + gap
        if "\n" in token:
            line, left = line + 1, 0.0
    return places


def text_figure(height: Number) -> tuple[Figure, Axes]:
    """An empty figure of the notebook's width whose axes count points from the upper left corner."""
    figure = plt.figure(figsize=(WIDTH, height / 72), layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH * 72), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def word(
    ax: Axes, x: Number, y: Number, width: Number, text: str, size: Number, face: object, edge: str = "none", bold: bool = False
) -> None:
    """One token in a box whose left edge is at x and whose middle is at y, in points."""
    high = size * 1.55
    box = FancyBboxPatch(
        (x, y - high / 2), width, high, boxstyle="round,pad=0,rounding_size=2", facecolor=face, edgecolor=edge, linewidth=0.8
    )
    ax.add_patch(box)
    weight = "bold" if bold else "normal"
    ax.text(
        x + width / 2, y, visible(text), ha="center", va="center_baseline", fontsize=size, family="DejaVu Sans Mono",
        weight=weight, parse_math=False,
    )  # fmt: skip


def prompt_roles(tokens: Sequence[str], roles: Sequence[object], *, size: Number = 10.0) -> Figure:
    """Fig 2: a prompt set as text boxes coloured by token role, one line of the prompt per line.

    `tokens` are strings (a newline token holds a newline), `roles` one name or `Role` per token.
    """
    if len(tokens) != len(roles) or not tokens:
        raise ValueError(f"prompt_roles takes one role per token, got {len(tokens)} tokens and {len(roles)} roles")
    names = [role_name(role) for role in roles]
    places = flow(tokens, WIDTH * 72 - 20, size, gap=3)
    step = 1.95 * size
    figure, ax = text_figure(height=(places[-1][0] + 1) * step + 42)
    for token, name, (line, left, wide) in zip(tokens, names, places, strict=True):
        colour = ROLE_COLOURS.get(name, ROLE_COLOURS["other"])
        word(ax, 10 + left, 10 + (line + 0.5) * step, wide, token, size, pale(colour, 0.45), colour)
    used = [role for role in ROLE_COLOURS if role in names]
    boxes = [Patch(facecolor=pale(ROLE_COLOURS[role], 0.45), edgecolor=ROLE_COLOURS[role], label=role) for role in used]
    ax.legend(handles=boxes, loc="lower left", ncols=len(used), fontsize=9, borderaxespad=0.4)
    return figure


def examples_figure(
    examples: Sequence[Sequence[str]],
    activations: Sequence[Values],
    *,
    title: str = "",
    size: Number = 8.5,
    maximum: Number | None = None,
) -> Figure:
    """Fig 4: max-activating examples of one latent; shading is activation over `maximum` (default: the largest shown).

    One row per example, its peak in bold with the value in front; long rows are cut at the page's width around the peak.
    """
    rows = checked_examples(examples, activations)
    maximum = maximum or max(max(values.max() for _, values in rows), 1e-12)
    step, top = 2.0 * size, 24 if title else 8
    figure, ax = text_figure(height=len(rows) * step + top + 6)
    ax.text(8, 12, title, fontsize=10, va="center", parse_math=False)
    for i, (tokens, values) in enumerate(rows):
        y = top + (i + 0.5) * step
        ax.text(42, y, f"{values.max():.2g}", fontsize=8, ha="right", va="center_baseline", color="#555555")
        peak = int(values.argmax())
        for j, x, wide in around(tokens, peak, WIDTH * 72 - 60, size):
            shade = pale(OKABE_ITO["orange"], 0.9 * float(np.clip(values[j] / maximum, 0, 1)))
            word(ax, 50 + x, y, wide, tokens[j], size, shade, bold=j == peak)
    return figure


def checked_examples(examples: Sequence[Sequence[str]], activations: Sequence[Values]) -> list[tuple[list[str], np.ndarray]]:
    """Pairs of tokens and activations (token,); raises `ValueError` where the two lengths differ."""
    if len(examples) != len(activations) or not len(examples):
        raise ValueError(f"one activation row per example, got {len(examples)} examples and {len(activations)} rows")
    return [
        (list(tokens), checked(f"activations[{i}]", values, token=len(tokens)))
        for i, (tokens, values) in enumerate(zip(examples, activations, strict=True))
    ]


def around(tokens: Sequence[str], peak: int, width: Number, size: Number) -> list[tuple[int, float, float]]:
    """(index, left, width) in points of the tokens near `peak` that fit on one line: 60 % of the room goes before it."""
    wide = [MONO_WIDTH * size * len(visible(token)) + 4 for token in tokens]
    first, room = peak, 0.6 * width - wide[peak]
    while first > 0 and wide[first - 1] + 1 <= room:
        first -= 1
        room -= wide[first] + 1
    places, left = [], 0.0
    for j in range(first, len(tokens)):
        if left + wide[j] > width:
            break
        places.append((j, left, wide[j]))
        left += wide[j] + 1
    return places


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
    ax.text(middles[2] - 8, 106, "attention, MLP", fontsize=8.5, color=ROLE_COLOURS["output"], ha="right", style="italic")
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
