"""The look of every figure, and the few drawing parts that several figures share.

Figures take plain arrays (anything `numpy.asarray` reads), lists of names and DataFrames; they know neither models nor
stores. A shape that does not fit its names is refused before anything is drawn, with the name of the argument.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import as_file, files
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import CenteredNorm, to_rgb
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Values = Any  # what numpy.asarray(..., dtype=float) reads: numpy and JAX arrays, lists, Series
Number = float | int | np.integer

OKABE_ITO = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
CYCLE = tuple(OKABE_ITO.values())
FAINT = "#9a9a9a"  # single tasks behind a mean, random controls

ROLE_COLOURS = {
    "prompt": OKABE_ITO["sky"],
    "input": OKABE_ITO["blue"],
    "arrow": OKABE_ITO["orange"],
    "output": OKABE_ITO["green"],
    "newline": OKABE_ITO["purple"],
    "other": "#bdbdbd",
}
KIND_COLOURS = {
    "residual": OKABE_ITO["blue"],
    "attention": OKABE_ITO["vermillion"],
    "transcoder": OKABE_ITO["green"],
    "mlp": OKABE_ITO["purple"],
}


def use_style() -> None:
    """Apply `icl.mplstyle` to everything drawn afterwards. Call it once per notebook."""
    with as_file(files(__package__) / "icl.mplstyle") as path:
        plt.style.use(path)


def role_name(role: object) -> str:
    """The lower-case name of a token role given as a string or as a member of an enum (`Role.ARROW` -> `arrow`)."""
    return str(getattr(role, "name", role)).lower()


def colours_for(names: Sequence[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """One colour per name: the known one, else the next colour of the cycle that is not taken."""
    known = known or {}
    chosen = {name: known[name] for name in names if name in known}
    free = [colour for colour in CYCLE if colour not in chosen.values()] or list(CYCLE)
    rest = [name for name in dict.fromkeys(names) if name not in chosen]
    return chosen | {name: free[i % len(free)] for i, name in enumerate(rest)}


def checked(name: str, values: Values, **axes: int | None) -> np.ndarray:
    """`values` as a float64 array whose axes have the given sizes (None: any size above 0).

    Raises `ValueError` that names the argument, the expected axes and the shape that came.
    """
    array = np.asarray(values, dtype=np.float64)
    sizes = tuple(axes.values())
    fits = array.ndim == len(sizes) and all(
        got > 0 and want in (None, got) for got, want in zip(array.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join(axis if size is None else f"{axis} = {size}" for axis, size in axes.items())
        raise ValueError(
            f"{name} must have the axes ({wanted}), got shape {array.shape}; transpose it, or give as many names as "
            "it has rows and columns"
        )
    return array


def need_columns(name: str, frame: Any, columns: Sequence[str]) -> None:
    """Raise `ValueError` if the table `name` lacks one of the columns."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"{name} needs the columns {list(columns)}, {missing} missing; it has {list(frame.columns)}")


def axes_for(ax: Axes | None, width: Number = 6.4, height: Number = 3.4) -> Axes:
    """`ax` itself, or the only axes of a new figure of that size in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and its standard error sd/sqrt(n) with sd about the mean (ddof 1); 0 for n = 1.

    NaN entries (a task that has no value there) are left out, n counts the others.
    """
    n, middle = np.isfinite(values).sum(axis=0), mean(values, axis=0)
    squares = np.where(np.isfinite(values), (values - middle) ** 2, 0.0).sum(axis=0)
    error = np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1))
    return middle, np.where(n > 0, error, np.nan)


def band(ax: Axes, x: np.ndarray, values: np.ndarray, *, label: str, colour: str, marker: str = "o") -> None:
    """Draw the mean over the first axis of `values` (n, x) with its standard error as a band."""
    middle, error = mean_and_error(values)
    ax.plot(x, middle, color=colour, label=label, marker=marker, markersize=3, zorder=3)
    ax.fill_between(x, middle - error, middle + error, color=colour, alpha=0.18, linewidth=0, antialiased=False)


def faint(ax: Axes, x: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draw single tasks, `values` (n, x), as thin pale lines behind a mean; one flat colour makes a smaller PNG than
    alpha.
    """
    ax.plot(x, values.T, color=pale(colour, 0.25), linewidth=0.4, antialiased=False, zorder=1.5)


def pale(colour: str, strength: Number) -> tuple[float, float, float]:
    """`colour` mixed with white; strength 1 is the colour, 0 is white."""
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))


def ink(colour: object) -> str:
    """The colour of text that can be read on `colour`: white on dark, black on light."""
    return "white" if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.5 else "black"


def mean(values: Values, axis: int | None = None) -> np.ndarray:
    """The mean of what is not NaN; NaN, and no warning, where nothing else is there."""
    values = np.asarray(values, dtype=np.float64)
    n = np.isfinite(values).sum(axis=axis)
    total = np.where(np.isfinite(values), values, 0.0).sum(axis=axis)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def in_order(names: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """The distinct names: those of `known` in its order, then the others as they come first."""
    return [name for name in known if name in set(names)] + [n for n in dict.fromkeys(names) if n not in known]


def missing(n: Number, of: str) -> str:
    """A remark for a title or label on `n` missing values, empty where none is: "; 2 tasks without value"."""
    return f"; {n} {of}{'s' if n > 1 else ''} without value" if n else ""


def plain_log(axis: Axis) -> None:
    """A logarithmic axis with ticks 1, 2, 5, 10, ... written as plain numbers."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def heatmap(
    ax: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colour_label: str,
    signed: bool = False,
) -> AxesImage:
    """A labelled matrix: `cividis` from 0 for magnitudes, `PuOr` centred on 0 for signed effects, NaN grey."""
    image = ax.imshow(
        values,
        cmap=plt.get_cmap("PuOr" if signed else "cividis").with_extremes(bad="#d9d9d9"),
        norm=CenteredNorm() if signed else None,
        aspect="auto",
    )
    known = np.asarray(values)[np.isfinite(values)]
    if not signed and known.size and known.min() >= 0:
        image.set_clim(0, max(float(known.max()), 1e-12))
    size = 8 if max(len(rows), len(columns)) <= 20 else 7
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    ax.set_yticks(range(len(rows)), rows, fontsize=size)
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.015, fraction=0.035, aspect=30)
    bar.set_label(colour_label if known.size == np.size(values) else f"{colour_label} (grey: no value)")
    bar.outline.set_visible(False)
    return image
