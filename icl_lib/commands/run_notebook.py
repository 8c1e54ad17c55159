"""`python -m icl_lib.commands.run_notebook NOTEBOOK OUTPUT PARAMETERS LOG`: execute one notebook with given values.

The Snakefile calls it. Programs are started with lists of arguments, so that a path may hold anything that a path can.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from icl_lib.runs.watch import place, unfinished

_SHOWN = 20  # last lines of the log, where a failure left no exception in the notebook


def main(argv: list[str] | None = None) -> int:
    """Run papermill; the output appears whole or not at all, and what it printed goes to the log. Gives its exit
    status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.run_notebook",
        description="Execute one notebook with the values of a YAML file.",
    )
    parser.add_argument("notebook", type=Path, help="the notebook to execute")
    parser.add_argument("output", type=Path, help="where the executed notebook goes; it appears whole or not at all")
    parser.add_argument("parameters", type=Path, help="YAML file with the values of its parameters cell")
    parser.add_argument("log", type=Path, help="file for what papermill prints")
    options = parser.parse_args(argv)
    notebook, output, log = options.notebook, options.output, options.log
    title, start, part = notebook.stem, time.monotonic(), unfinished(output)
    print(f"{title}: running", flush=True)
    command = [sys.executable, "-m", "papermill", notebook, part, "-f", options.parameters, "--cwd", notebook.parent]
    for path in (log, output):
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        status = subprocess.run([*command, "--no-progress-bar"], stdout=file, stderr=subprocess.STDOUT).returncode
    if status == 0:
        part.replace(output)
        print(f"{title}: done in {round(time.monotonic() - start)} s", flush=True)
        return 0
    print(_failure(title, part, log), flush=True)
    return status


def _failure(title: str, part: Path, log: Path) -> str:
    """What went wrong, in which cell, and what to do. The part that was executed keeps a name without the process."""
    at, whole = (place(part), part.with_name(f".{title}.part.ipynb")) if part.is_file() else (None, None)
    if whole is not None:
        part.replace(whole)
    lines = at.error if at is not None and at.error else log.read_text("utf-8", errors="replace").splitlines()[-_SHOWN:]
    said = [f"{title}: FAILED" + (f" in {at}" if at else ""), *(f"  {line}" for line in lines)]
    if at is not None and not at.error:
        said.append("  No exception: the notebook's process was ended, often because memory ran out.")
    said += [f"  As far as it came: {whole}"] if whole is not None else []
    said += [f"  Everything it printed: {log}"]
    return "\n".join([*said, "  Mend the cause and give the same command again: notebooks that are done are kept."])


if __name__ == "__main__":
    sys.exit(main())
