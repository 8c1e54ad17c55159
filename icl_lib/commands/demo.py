"""`python -m icl_lib.commands.demo params/tiny.yaml --cores 2`: run a card from end to end, then its report.

What an earlier run finished is kept, also where that run was killed: its lock on the folder is taken away if nobody
holds it.
"""

import argparse
import subprocess
import sys

from icl_lib.commands import report
from icl_lib.files.lock import someone_runs
from icl_lib.files.paths import root


def main(argv: list[str] | None = None) -> int:
    """Run the card's notebooks with snakemake and build the report; exit status of the first that failed."""
    parser = argparse.ArgumentParser(prog="python -m icl_lib.commands.demo", description=__doc__.splitlines()[0])
    parser.add_argument("card", nargs="?", default="params/tiny.yaml")
    parser.add_argument("--cores", default="2")
    options = parser.parse_args(argv)
    if someone_runs():
        print(f"another run is going on in {root()}: wait until it has ended, or end it", file=sys.stderr)
        return 2
    start = [sys.executable, "-m", "snakemake", "--configfile", options.card, "--cores", options.cores]
    locks = root() / ".snakemake" / "locks"
    if locks.is_dir() and any(locks.iterdir()):  # of a run that was killed
        subprocess.run([*start, "--unlock", "--quiet", "all"], cwd=root(), check=False)
    ran = subprocess.run([*start, "--rerun-incomplete", "--keep-going", "--quiet", "all"], cwd=root()).returncode
    reported = report.main([options.card])  # of what is there, also where a notebook failed
    return ran or reported


if __name__ == "__main__":
    sys.exit(main())
