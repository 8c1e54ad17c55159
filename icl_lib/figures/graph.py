"""The drawing of a circuit: layers from bottom to top, groups of tokens from left to right, one box per node.

Every box has a slot of its own on a grid, so labels cannot overlap: within a layer the kinds are stacked in the order
of their colours (residual, attention, transcoder, mlp, which is that of computation; others follow as they come in the
table), and a crowded cell takes more rows.
"""

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from icl_lib.figures.style import KIND_COLOURS, ROLE_COLOURS, colours_for, in_order, ink, need_columns, role_name

SLOTS = 12  # boxes side by side in 9 inches
BOX, ROW = (0.84, 0.62), 0.30  # box in units of a slot; inches per row


class Layout(NamedTuple):
    """Places of a circuit: `x`, `y` (node,) in slots and rows, spans of the groups in x, of (layer, kind) rows in y."""

    x: np.ndarray
    y: np.ndarray
    groups: dict[str, tuple[int, int]]
    rows: dict[tuple[int, str], tuple[int, int]]


def share_slots(need: dict[str, int], slots: int) -> dict[str, int]:
    """Divide `slots` columns among the groups: one each, then always to the group whose fullest cell has most rows."""
    width = dict.fromkeys(need, 1)
    for _ in range(slots - len(need)):
        tallest = max(need, key=lambda group: need[group] / width[group])
        if width[tallest] >= need[tallest]:
            break
        width[tallest] += 1
    return width


def place_nodes(nodes: pd.DataFrame) -> Layout:
    """Give every node its slot. `nodes` has `layer`, `kind`, `group`; rows are counted from the bottom."""
    table = pd.DataFrame(
        {
            "layer": nodes["layer"].astype(int).to_numpy(),
            "kind": nodes["kind"].to_numpy(),
            "group": nodes["group"].map(role_name).to_numpy(),
        }
    )
    groups, kinds = in_order(table["group"], ROLE_COLOURS), in_order(table["kind"], KIND_COLOURS)
    sizes = table.groupby(["layer", "kind", "group"]).size()
    need = {group: int(sizes.xs(group, level="group").max()) for group in groups}
    width = share_slots(need, max(SLOTS, len(groups)))
    starts = dict(zip(groups, np.cumsum([0, *width.values()]), strict=False))
    x, y, rows, base = np.zeros(len(table)), np.zeros(len(table)), {}, 0
    order = sorted(set(zip(table["layer"], table["kind"], strict=True)), key=lambda c: (c[0], kinds.index(c[1])))
    for layer, kind in order:
        here = table[(table["layer"] == layer) & (table["kind"] == kind)]
        high = 1
        for group, cell in here.groupby("group"):
            i, w = np.arange(len(cell)), width[group]
            in_row = np.minimum(len(cell) - i // w * w, w)
            x[cell.index], y[cell.index] = starts[group] + i % w + (w - in_row) / 2, base + i // w
            high = max(high, int(i[-1]) // w + 1)
        rows[layer, kind] = (base, base + high)
        base += high
    return Layout(x, y, {group: (int(starts[group]), int(starts[group] + width[group])) for group in groups}, rows)


def circuit_graph(nodes: pd.DataFrame, edges: pd.DataFrame | None = None, *, title: str = "") -> Figure:
    """Draw the tables of a `Circuit`. Box colour: effect of the node on the metric m; edges: width by size, colour by
    sign.

    `nodes` has the columns `layer`, `kind`, `latent` (below 0: the error node), `group` (of tokens), `effect`; `edges`
    has `source` and `target`, values of the index of `nodes`, and `effect`; those that start or end at no node, as
    edges from error nodes that are not drawn, are left out. Nodes keep the order of the table inside a cell: sort it by
    effect. Raises `ValueError` for missing columns, or if no edge starts or ends at any of the nodes.
    """
    need_columns("nodes", nodes, ("layer", "kind", "latent", "group", "effect"))
    if not len(nodes) or not nodes.index.is_unique:
        raise ValueError(f"nodes needs at least one row and a unique index, got {len(nodes)} rows")
    layout = place_nodes(nodes)
    n_rows = max(top for _, top in layout.rows.values())
    columns = max(stop for _, stop in layout.groups.values())
    figure, ax = plt.subplots(figsize=(9, 1.1 + ROW * n_rows), layout="constrained")
    norm = CenteredNorm(halfrange=max(float(np.abs(nodes["effect"]).max()), 1e-12))
    draw_frame(ax, layout, columns, n_rows)
    if edges is not None and len(edges):
        draw_edges(ax, layout, nodes, edges)
    draw_boxes(ax, layout, nodes, norm, columns)
    bar = figure.colorbar(ScalarMappable(norm, "PuOr"), ax=ax, pad=0.01, fraction=0.025, aspect=30)
    bar.set_label("effect on m (units of m); edges by sign")
    bar.outline.set_visible(False)
    ax.set_title(title, pad=20)
    return figure


def draw_frame(ax: Axes, layout: Layout, columns: int, n_rows: int) -> None:
    """Names of groups above, of layers and kinds on the left, lines between layers and columns of groups."""
    ax.set(xlim=(-0.55, columns - 0.45), ylim=(-0.6, n_rows - 0.4))
    ax.set_yticks([(low + high - 1) / 2 for low, high in layout.rows.values()])
    ax.set_yticklabels([f"{layer} {kind}" for layer, kind in layout.rows], fontsize=8)
    ax.set_ylabel("layer and kind")
    ax.set_xticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for group, colour in colours_for(list(layout.groups), ROLE_COLOURS).items():
        low, high = layout.groups[group]
        ax.axvspan(low - 0.5, high - 0.5, color=colour, alpha=0.08, linewidth=0)
        ax.annotate(
            group, ((low + high - 1) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha="center", fontsize=9, weight="bold", color=colour,
        )  # fmt: skip
    layers = sorted({layer for layer, _ in layout.rows})
    for layer in layers[1:]:
        ax.axhline(
            min(low for (at, _), (low, _) in layout.rows.items() if at == layer) - 0.5, color="white", linewidth=2.5
        )


def draw_boxes(ax: Axes, layout: Layout, nodes: pd.DataFrame, norm: CenteredNorm, columns: int) -> None:
    """One rounded box per node with the latent's number, white text on dark colours."""
    wide, high = BOX[0] * min(1.0, columns / SLOTS), BOX[1]
    for x, y, latent, effect in zip(layout.x, layout.y, nodes["latent"], nodes["effect"], strict=True):
        colour = plt.get_cmap("PuOr")(norm(effect))
        ax.add_patch(
            FancyBboxPatch(
                (x - wide / 2, y - high / 2), wide, high, boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=colour, edgecolor="#555555", linewidth=0.6, zorder=3,
            )
        )  # fmt: skip
        text = "error" if latent < 0 else str(int(latent))
        ax.text(x, y, text, ha="center", va="center_baseline", fontsize=7.5, color=ink(colour), zorder=4)


def draw_edges(ax: Axes, layout: Layout, nodes: pd.DataFrame, edges: pd.DataFrame) -> None:
    """Curves from the upper side of the source to the lower side of the target; weakest first, so strong ones show;
    width and opacity follow the square root of the effect."""
    need_columns("edges", edges, ("source", "target", "effect"))
    starts, stops = (edges[end].isin(nodes.index) for end in ("source", "target"))
    if not (starts | stops).any():
        raise ValueError("no edge starts or ends at one of the nodes: source and target are values of their index")
    if not len(edges := edges[starts & stops]):
        return
    ends = nodes.index.get_indexer(edges["source"]), nodes.index.get_indexer(edges["target"])
    weight = edges["effect"].to_numpy(dtype=float)
    size = np.sqrt(np.abs(weight) / max(np.abs(weight).max(), 1e-12))
    for i in np.argsort(size):
        up = layout.y[ends[1][i]] >= layout.y[ends[0][i]]
        shift = BOX[1] / 2 if up else -BOX[1] / 2
        start = (layout.x[ends[0][i]], layout.y[ends[0][i]] + shift)
        end = (layout.x[ends[1][i]], layout.y[ends[1][i]] - shift)
        ax.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", mutation_scale=6, linewidth=0.4 + 1.6 * size[i],
                color=plt.get_cmap("PuOr")(0.88 if weight[i] > 0 else 0.18),
                alpha=0.25 + 0.6 * size[i], connectionstyle="arc3,rad=0.08", shrinkA=0, shrinkB=0, zorder=2,
            )
        )  # fmt: skip
