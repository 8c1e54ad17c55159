"""Tables with a caption that a notebook shows as HTML. Everything is escaped."""

from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd
from IPython.display import HTML


def style_table(
    table: pd.DataFrame, *, caption: str = "", digits: int | Mapping[str, int] = 2, shade: Sequence[str] = ()
) -> HTML:
    """`table` with a caption, rounded numbers, and the columns in `shade` coloured by size (`cividis`, column by
    column).

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
