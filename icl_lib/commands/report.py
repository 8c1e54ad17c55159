"""`python -m icl_lib.commands.report params/tiny.yaml`: the report of a card's run, or of a run folder, and its ledger
on the terminal.
"""

import argparse
import shutil
import sys
from pathlib import Path

from icl_lib.cards.card import CardError, check_card
from icl_lib.files.paths import run_folder
from icl_lib.runs.ledger import show
from icl_lib.runs.report import build
from icl_lib.runs.store import StoreError


def main(argv: list[str] | None = None) -> int:
    """Build the report of a run folder or of a card, print what of the ledger does not hold, and where things are."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.report", description="Make the report of a run, and show its ledger in short."
    )
    parser.add_argument("target", nargs="?", default="runs/tiny", help="card or run folder (default: %(default)s)")
    target = parser.parse_args(argv).target
    try:
        run_dir = run_folder(check_card(target).run_dir if Path(target).suffix in (".yaml", ".yml") else target)
        print("making the report", flush=True)
        index, table = build(run_dir)
    except (CardError, StoreError) as err:
        print(err, file=sys.stderr)
        return 2
    print(show(table, min(100, shutil.get_terminal_size((100, 24)).columns)))
    print(f"\nExecuted notebooks: {run_dir / 'notebooks'}\nWhole ledger:       {run_dir / 'ledger.json'}")
    print(f"Report:             {index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
