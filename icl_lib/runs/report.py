"""The report of a run: its ledger, and its notebooks as HTML that opens from the file system.

`python -m icl_lib.commands.report runs/tiny`; a card, params/tiny.yaml, names its run as well.
"""

import datetime
import html
from pathlib import Path
from typing import Any

import pandas as pd

from icl_lib.files.hashes import code_version
from icl_lib.files.write import write_bytes
from icl_lib.runs.ledger import merge, number, verdict
from icl_lib.runs.store import StoreError

_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.holds { color: #00664b; } .misses { color: #a33c00; font-weight: bold; }
footer { margin-top: 2rem; color: #666; font-size: 14px; }
"""


def build(run_dir: Path) -> tuple[Path, pd.DataFrame]:
    """Write `<run_dir>/report/`: one page a notebook and `index.html` with the ledger; returns the index and the
    ledger.

    Raises `StoreError` if the run has no executed notebook, or a ledger file is damaged.
    """
    notebooks = sorted((run_dir / "notebooks").glob("*.ipynb"))
    if not notebooks:
        raise StoreError(
            f"{run_dir} holds no executed notebook; run the card first: `snakemake --configfile CARD --cores 2`"
        )
    table = merge(run_dir)
    folder = run_dir / "report"
    pages = [(write_page(path, folder), title) for path in notebooks for title in [_title(path)]]
    index = folder / "index.html"
    write_bytes(index, _index(run_dir, pages, table).encode())
    return index, table


def write_page(notebook: Path, folder: Path) -> Path:
    """One executed notebook as a page; a page newer than its notebook is left as it is."""
    from icl_lib.runs.pages import page_of  # imports nbconvert, which is slow and only needed here

    page = folder / f"{notebook.stem}.html"
    if not (page.is_file() and page.stat().st_mtime > notebook.stat().st_mtime):
        write_bytes(page, page_of(notebook).encode())
    return page


def _title(notebook: Path) -> str:
    """The first heading of a notebook."""
    import nbformat

    for cell in nbformat.read(notebook, as_version=4).cells:
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else []:
            if line.startswith("# "):
                return line[2:].strip()
    return notebook.stem


def _index(run_dir: Path, pages: list[tuple[Path, str]], table: pd.DataFrame) -> str:
    """The front page."""
    links = "\n".join(f'<li><a href="{_e(p.name)}">{_e(p.stem[:2])}</a> {_e(title)}</li>' for p, title in pages)
    rows = "\n".join(_row(e) for e in table.to_dict("records"))
    head = "".join(f"<th>{h}</th>" for h in ("Notebook", "Item", "What", "Published", "Ours", "Criterion", "Verdict"))
    version = code_version()
    made = f"{datetime.date.today().isoformat()}, commit {version['commit']}, library {version['library']}"
    name = _e(run_dir.name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Run {name}</title><style>{_STYLE}</style></head><body>
<h1>Run <code>{name}</code></h1>
<ol start="0">{links}</ol>
<h2>Ledger</h2>
<p>{int(table["holds"].sum())} of {len(table)} criteria hold.
Published values are the papers', on their models; a criterion is about shape, not digits.</p>
<table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table>
<footer>Made {_e(made)}.</footer>
</body></html>
"""


def _row(entry: dict[str, Any]) -> str:
    """One ledger entry as a table row."""
    notebook = _e(entry["notebook"])
    mark = "holds" if entry["holds"] else "misses"
    return (
        f'<tr><td><a href="{notebook}.html">{notebook[:2]}</a></td><td>{_e(entry["item"])}</td>'
        f"<td>{_e(entry['key'])}</td>"
        f'<td class="n">{_e(number(entry["published"]))}</td>'
        f'<td class="n">{_e(number(entry["ours"]))} {_e(entry["unit"])}</td>'
        f'<td>{_e(entry["criterion"])}</td><td class="{mark}">{verdict(entry)}</td></tr>'
    )


def _e(text: Any) -> str:
    return html.escape(str(text))
