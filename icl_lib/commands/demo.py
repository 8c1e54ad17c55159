"""`python -m icl_lib.commands.demo params/tiny.yaml --cores 2`: run a card from end to end, then its report.

What an earlier run finished is kept, also where that run was killed: its lock on the folder is taken away if nobody
holds it.
"""

import argparse
import json
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from icl_lib.cards.card import CardError, check_card, notebook_files
from icl_lib.commands import report
from icl_lib.commands.run_notebook import progress_file
from icl_lib.embedded.catalogue import entry
from icl_lib.files.lock import someone_runs
from icl_lib.files.paths import root, run_folder

LINE_SECONDS = 30.0  # from line to line where the output is no terminal


def _known(logs: Path) -> dict[str, dict]:
    """What the notebooks of a run have said of themselves, by name."""
    found = {}
    for name in (path.stem for path in notebook_files()):
        path = progress_file(logs / f"{name}.log")
        if path.is_file():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def announcement(model: str, logs: Path, cores: int) -> str:
    """How many notebooks there are and about how long they take, from the times of an earlier run or the catalogue."""
    names, times = notebook_files(), [said["seconds"] for said in _known(logs).values() if "seconds" in said]
    if len(times) == len(names):
        about = f", about {max(1, round(sum(times) / 60 / min(cores, 2)))} minutes if none is kept from the last run"
    else:
        found = entry(model)
        about = f", about {found.minutes}" if found else "; `make preflight` estimates how long they take"
    return f"{len(names)} notebooks{about}; results appear in {logs.parent}"


def where(logs: Path, running: set[str]) -> str:
    """One line: the cell and section at which each running notebook is."""
    known = _known(logs)
    parts = [
        f"{name[:2]} cell {known[name]['cell']} of {known[name]['cells']} ({known[name]['section']})"
        for name in sorted(running)
        if "cell" in known.get(name, {})
    ]
    return "; ".join(parts) or "starting"


def follow(lines: "queue.Queue[str | None]", logs: Path, terminal: bool, every: float = LINE_SECONDS) -> None:
    """Print the lines of a run as they come; between them where it is, on one line of a terminal, or now and then."""
    running, said, shown = set(), time.monotonic(), ""
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            line = ""
        if terminal and shown:
            print("\r" + " " * len(shown) + "\r", end="")
            shown = ""
        if line is None:
            return
        if line:
            name, _, what = line.partition(": ")
            if what.startswith("running"):
                running.add(name)
            elif what.startswith(("done", "FAILED")):
                running.discard(name)
            print(line, flush=True)
            continue
        text = where(logs, running)
        if terminal:
            shown = text[: shutil.get_terminal_size().columns - 1]
            print(shown, end="", flush=True)
        elif running and time.monotonic() - said >= every:
            print(text, flush=True)
            said = time.monotonic()


def _run(command: list[str], logs: Path) -> int:
    """Run snakemake and show how it goes; its exit status."""
    lines: queue.Queue[str | None] = queue.Queue()
    process = subprocess.Popen(
        command, cwd=root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )

    def read():
        for line in process.stdout or ():
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        follow(lines, logs, sys.stdout.isatty())
    except KeyboardInterrupt:
        process.terminate()
        print("\nstopped; the same command goes on from here", file=sys.stderr)
    return process.wait()


def main(argv: list[str] | None = None) -> int:
    """Run the card's notebooks with snakemake and build the report; exit status of the first that failed."""
    parser = argparse.ArgumentParser(prog="python -m icl_lib.commands.demo", description=__doc__.splitlines()[0])
    parser.add_argument("card", nargs="?", default="params/tiny.yaml", help="the experiment card")
    parser.add_argument("--cores", default="2", help="notebooks that may run at the same time")
    options = parser.parse_args(argv)
    try:
        card = check_card(options.card)
    except CardError as err:
        print(err, file=sys.stderr)
        return 2
    if someone_runs():
        print(f"another run is going on in {root()}: wait until it has ended, or end it", file=sys.stderr)
        return 2
    logs = run_folder(card.run_dir) / "logs"
    start = [sys.executable, "-m", "snakemake", "--configfile", options.card, "--cores", options.cores]
    locks = root() / ".snakemake" / "locks"
    if locks.is_dir() and any(locks.iterdir()):  # of a run that was killed
        subprocess.run([*start, "--unlock", "--quiet", "all"], cwd=root(), check=False)
    print(announcement(card.model, logs, int(options.cores)), flush=True)
    ran = _run([*start, "--rerun-incomplete", "--keep-going", "--quiet", "all"], logs)
    reported = report.main([options.card])  # of what is there, also where a notebook failed
    return ran or reported


if __name__ == "__main__":
    sys.exit(main())
