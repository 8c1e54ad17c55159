"""`python -m icl_lib.commands.demo params/tiny.yaml --cores 2`: run a card from end to end, then its report.

What an earlier run finished is kept, also where that run was killed: its lock on the folder is taken away if nobody
holds it.
"""

import argparse
import subprocess
import sys

from icl_lib.cards.card import Card, CardError, check_card
from icl_lib.commands import report
from icl_lib.files.lock import someone_runs
from icl_lib.files.paths import root, run_folder
from icl_lib.runs import watch
from icl_lib.runs.needs import needs


def main(argv: list[str] | None = None) -> int:
    """Run the card's notebooks with snakemake and build the report; exit status of the first that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.demo", description="Run a card from end to end, then make its report."
    )
    parser.add_argument("card", nargs="?", default="params/tiny.yaml", help="a card (default: %(default)s)")
    parser.add_argument("--cores", default=2, type=int, help="notebooks at a time (default: %(default)s; 1 on a GPU)")
    options = parser.parse_args(argv)
    try:
        card = check_card(options.card)
    except CardError as err:
        print(err, file=sys.stderr)
        return 2
    if someone_runs():
        print(f"another run is going on in {root()}: wait until it has ended, or end it", file=sys.stderr)
        return 2
    print(_announced(card, options.cores), flush=True)
    start = [sys.executable, "-m", "snakemake", "--configfile", options.card, "--cores", str(options.cores)]
    locks = root() / ".snakemake" / "locks"
    if locks.is_dir() and any(locks.iterdir()):  # of a run that was killed
        subprocess.run([*start, "--unlock", "--quiet", "all"], cwd=root(), check=False)
    command = [*start, "--rerun-incomplete", "--keep-going", "--quiet", "all"]
    ran = watch.follow(command, root(), run_folder(card.run_dir))
    if ran == 130:  # interrupted
        return ran
    reported = report.main([options.card])  # of what is there, also where a notebook failed
    if ran:
        print("Not all notebooks ran: see FAILED above. The report holds those that did.", file=sys.stderr)
    return ran or reported


def _announced(card: Card, cores: int) -> str:
    """How many notebooks, and for how long, as far as that is known."""
    notebooks = needs()
    known = watch.minutes(run_folder(card.run_dir), notebooks, cores)
    if known is not None:
        took = f"about {max(1, round(known))} min if all run again, by the last run's times; those up to date are kept"
    else:
        took = "how long is known after a first whole run (the embedded model's card: minutes on two cores)"
    return f"{len(notebooks)} notebooks, {took}"


if __name__ == "__main__":
    sys.exit(main())
