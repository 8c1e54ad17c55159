"""The ledger: our number beside the published one, with the criterion and its verdict.

Each notebook writes `<run_dir>/ledger/<notebook>.json`; the report merges them into `<run_dir>/ledger.json`. A number
that misses its criterion is recorded like any other.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from icl_lib.files.write import write_bytes
from icl_lib.runs.store import Store, StoreError

COLUMNS = ["notebook", "key", "item", "unit", "published", "ours", "criterion", "holds"]
_LINES = 30  # that the terminal is given


class Ledger:
    """The entries of one notebook."""

    def __init__(self, store: Store, notebook: str):
        """`notebook` is the file name without its ending; it names the ledger file."""
        self.path = store.run_dir / "ledger" / f"{notebook}.json"
        self.notebook, self.card = notebook, store.card
        self.entries: dict[str, dict[str, Any]] = {}

    def record(
        self, key: str, *, item: str, published: Any, ours: Any, criterion: str, holds: Any, unit: str = ""
    ) -> None:
        """Add one number.

        `item` is the figure, table or section; `published` the paper's value (None where it gives none); `criterion`
        the shape or tolerance in words; `holds` its verdict. Raises `ValueError` for a key used twice, or a verdict
        that is not a truth value.
        """
        if key in self.entries:
            raise ValueError(f"ledger key {key!r} is already recorded in {self.notebook}; give each number its own key")
        if not isinstance(holds.item() if getattr(holds, "shape", None) == () else holds, bool):
            raise ValueError(f"holds must be one True or False, got {holds!r} for {key!r}")
        self.entries[key] = {
            "notebook": self.notebook,
            "key": key,
            "item": item,
            "unit": unit,
            "published": _json_number(published),
            "ours": _json_number(ours),
            "criterion": criterion,
            "holds": bool(holds),
        }

    def table(self) -> pd.DataFrame:
        """The entries as a table, one row a number."""
        return pd.DataFrame(list(self.entries.values()), columns=COLUMNS)

    def write(self) -> None:
        """Write the notebook's file, replacing the one of an earlier run."""
        write_bytes(self.path, _dump(list(self.entries.values())))


def merge(run_dir: Path) -> pd.DataFrame:
    """All notebooks' entries, written to `<run_dir>/ledger.json` and returned, in the order of the notebooks.

    Raises `StoreError` naming a file that cannot be read.
    """
    entries: list[dict[str, Any]] = []
    for path in sorted((run_dir / "ledger").glob("*.json")):
        entries += _read(path)
    write_bytes(run_dir / "ledger.json", _dump(entries))
    return pd.DataFrame(entries, columns=COLUMNS)


def show(table: pd.DataFrame, width: int = 100) -> str:
    """What does not hold, a line each, then the count of every notebook: at most 30 lines of `width` columns."""
    if table.empty:
        return "The ledger is empty: no notebook of this run has recorded a number yet."
    misses, notebooks = table[~table["holds"].astype(bool)], table.groupby("notebook")["holds"]
    counts = [f"  {name}: {int(held.sum())} of {len(held)}" for name, held in notebooks]
    lines = [_short(_said(e), width) for e in misses.to_dict("records")]
    if len(lines) > (room := max(1, _LINES - len(counts) - 3)):
        lines = [*lines[: room - 1], f"  and {len(lines) - room + 1} more, which the report lists"]
    head = ["What does not hold:"] if lines else []
    total = f"{int(table['holds'].sum())} of {len(table)} criteria hold, by notebook:"
    return "\n".join([*head, *lines, total, *(_short(line, width) for line in counts)])


def _said(entry: dict[str, Any]) -> str:
    """One number in words."""
    what = re.sub(r"[_\s]+", " ", entry["key"]).strip()
    published = "" if entry["published"] is None else f" (published {number(entry['published'])})"
    ours = number(entry["ours"]) + _unit(entry)
    return f"  {entry['notebook'][:2]} {entry['item']}, {what}: {ours}{published}; expected: {entry['criterion']}"


def _short(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."


def number(value: Any) -> str:
    """A value with three significant digits; `-` for none; lists joined."""
    if isinstance(value, list):
        return ", ".join(number(v) for v in value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def verdict(entry: dict[str, Any]) -> str:
    """The verdict in words."""
    return "holds" if entry["holds"] else "DOES NOT HOLD"


def _unit(entry: dict[str, Any]) -> str:
    return f" {entry['unit']}" if entry["unit"] else ""


def _json_number(value: Any) -> Any:
    """NumPy and JAX numbers and arrays as Python ones; NaN and infinities as None, which JSON can say."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [_json_number(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dump(entries: list[dict[str, Any]]) -> bytes:
    return (json.dumps(entries, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _read(path: Path) -> list[dict[str, Any]]:
    """The entries of one file, or a `StoreError` that names it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        complete = all(set(COLUMNS) <= set(e) for e in entries)
    except (ValueError, TypeError) as err:
        raise StoreError(f"{path} was cut short or altered ({err}); run notebooks/{path.stem}.ipynb again") from err
    if not complete:
        raise StoreError(f"{path} lacks fields of a ledger entry; run notebooks/{path.stem}.ipynb again")
    return entries
