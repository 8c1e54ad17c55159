"""`python -m icl_lib.commands.front_page`: what README shows, from the executed notebooks and their run in `runs/tiny`.

The pictures of cells tagged `report` go to assets/figures, under the name of the cell's other tag, and the ledger to
notebooks/ledger.json, to which the claims of README are held.
"""

import argparse
import base64
import shutil
import sys
from pathlib import Path

import nbformat

from icl_lib.cards.card import notebook_files
from icl_lib.files.paths import root, run_folder
from icl_lib.files.write import write_bytes
from icl_lib.runs.ledger import merge


def pictures() -> dict[str, bytes]:
    """Name -> PNG of the first picture of every cell of the notebooks that is tagged `report`."""
    found = {}
    for path in notebook_files():
        for cell in nbformat.read(path, as_version=4).cells:
            tags = cell.metadata.get("tags", [])
            if "report" in tags:
                (name,) = set(tags) - {"report"}
                data = [o["data"]["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
                found[name] = base64.b64decode(data[0])
    return found


def main(argv: list[str] | None = None) -> int:
    """Write the pictures and the ledger of the front page."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.front_page", description="Renew the pictures and the ledger that README shows."
    )
    parser.parse_args(argv)
    for name, png in pictures().items():
        write_bytes(root() / "assets" / "figures" / f"{name}.png", png)
    run: Path = run_folder("runs/tiny")
    merge(run)
    shutil.copyfile(run / "ledger.json", root() / "notebooks" / "ledger.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
