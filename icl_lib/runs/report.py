"""The report of a run: its ledger, and its notebooks as HTML that opens from the file system.

`python -m icl_lib.commands.report runs/tiny`; a card, params/tiny.yaml, names its run as well. The code of a notebook
is folded; the cell tags `hide-input`, `remove-input` and `remove-cell` mean what they mean in Jupyter Book. The figures
of the front page are those of the first three cells tagged `report`.
"""

import base64
import datetime
import re
import tempfile
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from icl_lib.files.hashes import code_version
from icl_lib.runs.ledger import merge, number, verdict
from icl_lib.runs.store import StoreError

_CAPTION = re.compile(r"\*\*Figure [^*]*\*\*\s*")


def build(run_dir: Path) -> tuple[Path, pd.DataFrame]:
    """Write `<run_dir>/report/`: one page a notebook and `index.html` with the ledger; returns the index and the
    ledger.

    Raises `StoreError` if the run has no executed notebook, or a ledger file is damaged.
    """
    from icl_lib.runs.pages import build_pages  # imports Sphinx, which is slow and only needed here

    paths = sorted((run_dir / "notebooks").glob("*.ipynb"))
    if not paths:
        raise StoreError(
            f"{run_dir} holds no executed notebook; run the card first: `snakemake --configfile CARD --cores 2`"
        )
    table = merge(run_dir)
    version = code_version()
    made = f"Made {datetime.date.today().isoformat()}, commit {version['commit']}, library {version['library']}."
    with tempfile.TemporaryDirectory() as temporary:
        sources = Path(temporary) / "sources"
        sources.mkdir()
        notebooks = {path.stem: nbformat.read(path, as_version=4) for path in paths}
        for name, notebook in notebooks.items():
            _prepare(notebook, name)
            nbformat.write(notebook, sources / f"{name}.ipynb")
        (sources / "index.md").write_text(_index(run_dir.name, notebooks, table, sources), encoding="utf-8")
        build_pages(sources, run_dir / "report", title=f"Run {run_dir.name}", footer=made)
    return run_dir / "report" / "index.html", table


def _prepare(notebook: Any, name: str) -> None:
    """Fold the code of a notebook, and give its figures alternative texts, where myst-nb looks for both."""
    section = name
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        section = [section, *_headings(cell)][-1]
        if cell.cell_type == "code":
            cell.metadata.tags = sorted({*cell.metadata.get("tags", []), "hide-input"})
            caption = _caption(cell) or (_caption(after) if after else "")
            said = [o.metadata.get(kind, {}).get("alt") for o, kind in _images(cell)]
            alt = next(filter(None, said), None) or _plain(caption) or f"Figure in the section: {_plain(section)}"
            cell.metadata.setdefault("mystnb", {})["image"] = {"alt": alt}
            cell.metadata["caption"] = caption or section


def _headings(cell: Any) -> list[str]:
    """The headings of a Markdown cell, but not what stands in blocks of code."""
    text = re.sub(r"^```.*?^```", "", cell.source, flags=re.S | re.M) if cell.cell_type == "markdown" else ""
    return re.findall(r"^#+ (.+)$", text, re.M)


def _images(cell: Any) -> list[tuple[Any, str]]:
    """The outputs of a code cell that are images, each with its MIME type."""
    outputs = [o for o in cell.get("outputs", []) if "data" in o]
    return [(o, kind) for o in outputs for kind in ("image/png", "image/svg+xml") if kind in o.data]


def _caption(cell: Any) -> str:
    """What a cell says or shows after "**Figure 3.**", as Markdown; "" if it has no caption."""
    shown = [o.data.get("text/markdown", "") for o in cell.get("outputs", []) if "data" in o]
    texts = [cell.source] if cell.cell_type == "markdown" else shown
    found = [text for text in texts if _CAPTION.match(text)]
    return _CAPTION.sub("", found[0].split("\n\n")[0], count=1).strip() if found else ""


def _plain(markdown: str) -> str:
    """Markdown as plain text on one line: links as their texts, no marks of emphasis, code and formulas."""
    return " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[*`$]", "", markdown)).split())


def _figures(notebooks: dict[str, Any]) -> list[tuple[str, Any]]:
    """The cells with the front page's figures, each with its notebook's name: the first three tagged `report`; without
    any, the last ones of the last three notebooks that have figures.
    """
    cells = [(name, c) for name, notebook in notebooks.items() for c in notebook.cells if _images(c)]
    tagged = [(name, c) for name, c in cells if "report" in c.metadata.get("tags", [])]
    return tagged[:3] or list(dict(cells).items())[-3:]


def _index(run: str, notebooks: dict[str, Any], table: pd.DataFrame, sources: Path) -> str:
    """The front page as Markdown; its figures are written beside it."""
    holds, misses = int(table["holds"].sum()), int((~table["holds"].astype(bool)).sum())
    parts = [
        f"# Run {run}",
        f"This report shows {len(notebooks)} executed notebooks on how language models learn in context. "
        f"Of {len(table)} criteria, each on one number that has a published counterpart or that the argument needs, "
        f"{holds} hold and {misses} do not; published values are the papers', on their models.",
    ]
    for i, (name, cell) in enumerate(_figures(notebooks)):
        parts.append(_figure(f"figure_{i}", name, cell, sources))
    parts.append("## Ledger")
    titles = {name: next((h for c in n.cells for h in _headings(c)), name) for name, n in notebooks.items()}
    for name, title in titles.items():
        part = table[table["notebook"] == name]
        parts.append(f"### {name[:2]}. [{title}]({name}.ipynb)")
        parts.append(_entries(part) if len(part) else "This notebook records no number.")
    listed = "\n".join(f"{name[:2]}. {title} <{name}>" for name, title in titles.items())
    parts.append(f"```{{toctree}}\n:hidden:\n\n{listed}\n```")
    return "\n\n".join(parts) + "\n"


def _figure(stem: str, name: str, cell: Any, sources: Path) -> str:
    """The first figure of a cell, written to a file, with its caption and a link to its notebook."""
    output, kind = _images(cell)[0]
    data = output.data[kind]
    path = sources / (stem + (".png" if kind == "image/png" else ".svg"))
    path.write_bytes(base64.b64decode(data) if kind == "image/png" else data.encode())
    alt = cell.metadata["mystnb"]["image"]["alt"]
    caption = " ".join(cell.metadata["caption"].split())
    return f"````{{figure}} {path.name}\n:alt: {alt}\n\n{caption} ([Notebook {name[:2]}]({name}.ipynb))\n````"


def _entries(part: pd.DataFrame) -> str:
    """The ledger entries of one notebook as a sentence and a table."""
    rows = [
        {
            "Criterion": f"<b>{escape(e['key'].replace('_', ' '))}</b>: {escape(e['criterion'])} ({escape(e['item'])})",
            "Published": escape(number(e["published"])),
            "Ours": escape(f"{number(e['ours'])} {e['unit']}".strip()),
            "Verdict": f'<span class="{"holds" if e["holds"] else "misses"}">{verdict(e).lower()}</span>',
        }
        for e in part.to_dict("records")
    ]
    body = pd.DataFrame(rows).to_html(index=False, escape=False, border=0, justify="left", classes="table ledger")
    return f"{int(part['holds'].sum())} of {len(part)} criteria hold.\n\n<div class='wide'>\n{body}\n</div>"
