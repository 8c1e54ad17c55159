"""Figures made of tokens: a prompt with its roles (Fig 2) and max-activating examples (Fig 4)."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

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
    ax: Axes,
    x: Number,
    y: Number,
    width: Number,
    text: str,
    size: Number,
    face: object,
    edge: str = "none",
    bold: bool = False,
) -> None:
    """One token in a box whose left edge is at x and whose middle is at y, in points."""
    high = size * 1.55
    box = FancyBboxPatch(
        (x, y - high / 2),
        width,
        high,
        boxstyle="round,pad=0,rounding_size=2",
        facecolor=face,
        edgecolor=edge,
        linewidth=0.8,
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

    One row per example, its peak in bold with the value in front; long rows are cut at the page's width around the
    peak.
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


def checked_examples(
    examples: Sequence[Sequence[str]], activations: Sequence[Values]
) -> list[tuple[list[str], np.ndarray]]:
    """Pairs of tokens and activations (token,); raises `ValueError` where the two lengths differ."""
    if len(examples) != len(activations) or not len(examples):
        raise ValueError(f"one activation row per example, got {len(examples)} examples and {len(activations)} rows")
    return [
        (list(tokens), checked(f"activations[{i}]", values, token=len(tokens)))
        for i, (tokens, values) in enumerate(zip(examples, activations, strict=True))
    ]


def around(tokens: Sequence[str], peak: int, width: Number, size: Number) -> list[tuple[int, float, float]]:
    """(index, left, width) in points of the tokens near `peak` that fit on one line, 60 % of the room before it."""
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
