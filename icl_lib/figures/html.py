"""Views that a notebook shows as HTML: shaded token examples and tables with a caption. Everything is escaped."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd
from IPython.display import HTML

from icl_lib.figures.prompts import checked_examples, visible
from icl_lib.figures.style import Number, Values

SHADE = "230,159,0"  # Okabe-Ito orange, as the r,g,b of a CSS rgba()
CELL = "padding:1px 8px 1px 0;text-align:left;vertical-align:top"


def examples_html(
    examples: Sequence[Sequence[str]], activations: Sequence[Values], *, title: str = "", maximum: Number | None = None
) -> str:
    """Max-activating examples as an HTML table: peak value, then the tokens shaded by activation over `maximum`.

    The peak token is bold and underlined, so that the table also reads where a page strips colours; the value of each
    active token is its tooltip. Show it with `IPython.display.HTML`.
    """
    rows = checked_examples(examples, activations)
    maximum = maximum or max(max(values.max() for _, values in rows), 1e-12)
    lines = [
        f'<tr><td style="{CELL};color:#666">{values.max():.3g}</td>'
        f'<td style="{CELL};font-family:monospace">{" ".join(spans(tokens, values, maximum))}</td></tr>'
        for tokens, values in rows
    ]
    caption = f'<caption style="text-align:left">{escape(title)}</caption>' if title else ""
    return f'<table style="border-collapse:collapse">{caption}{"".join(lines)}</table>'


def spans(tokens: Sequence[str], values: np.ndarray, maximum: Number) -> list[str]:
    """One `<span>` per token; only tokens with a positive activation carry a shade and a tooltip."""
    peak = int(values.argmax())
    made = []
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        text = escape(visible(token))
        text = f"<b><u>{text}</u></b>" if i == peak else text
        alpha = float(np.clip(value / maximum, 0, 1))
        shade = f' style="background:rgba({SHADE},{alpha:.2f})" title="{value:.3g}"' if value > 0 else ""
        made.append(f"<span{shade}>{text}</span>")
    return made


def style_table(
    table: pd.DataFrame, *, caption: str = "", digits: int | Mapping[str, int] = 2, shade: Sequence[str] = ()
) -> HTML:
    """`table` with a caption, rounded numbers, and the columns in `shade` coloured by size (`cividis`, column by column).

    `digits` is one number of decimals or one per column (others get 2); whole-number columns stay whole. The CSS id
    comes from the caption and columns, so a notebook run twice gives the same output. Raises `ValueError` for a column
    that the table lacks.
    """
    per_column = dict(digits) if isinstance(digits, Mapping) else {}
    unknown = [name for name in (*shade, *per_column) if name not in table.columns]
    if unknown:
        raise ValueError(f"style_table: no column {unknown}; the table has {list(table.columns)}")
    floats = table.select_dtypes("floating").columns
    common = digits if isinstance(digits, int) else 2
    formats = {name: f"{{:.{per_column.get(name, common)}f}}" for name in floats}
    identity = "t" + "".join(
        c for c in "".join(map(str, [caption[:20], *table.columns])) if c.isalnum() and c.isascii()
    )
    styler = (
        table.style.set_uuid(identity[:40])
        .format(formats, na_rep="–", escape="html")
        .format_index(escape="html", axis=0)
    )
    styler = styler.format_index(escape="html", axis=1).set_table_styles(
        [
            {"selector": "caption", "props": "text-align:left;font-weight:bold;padding-bottom:4px"},
            {"selector": "td, th", "props": "text-align:right;padding:2px 8px"},
        ]
    )
    if shade:
        styler = styler.background_gradient(cmap="cividis", subset=list(shade), axis=0)
    styler = styler.set_caption(escape(caption)) if caption else styler
    return HTML(styler.to_html())  # a Styler's own text form is its address in memory, new at every run
