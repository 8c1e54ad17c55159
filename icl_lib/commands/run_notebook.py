"""`python -m icl_lib.commands.run_notebook NOTEBOOK OUTPUT PARAMETERS LOG`: execute one notebook with the values of a
YAML file.

The Snakefile calls it. Programs are started with lists of arguments, so that a path may hold anything that a path can.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import yaml

from icl_lib.cards.notebook import page_for
from icl_lib.files.write import write_bytes

_SHOWN = 20  # last lines of the log that a failure shows


def main(argv: list[str]) -> int:
    """Run papermill; the output appears whole or not at all, and what it printed goes to the log. Gives its exit
    status.
    """
    notebook, output, parameters, log = map(Path, argv)
    title, start = notebook.stem, time.monotonic()
    part = output.with_name(
        f".{title}.{os.getpid()}.ipynb"
    )  # its own: one that was left behind by a killed run may go on
    print(f"{title}: running", flush=True)
    for path in (log, output):
        path.parent.mkdir(parents=True, exist_ok=True)
    page = page_for(nbformat.read(notebook, as_version=4), yaml.safe_load(parameters.read_text(encoding="utf-8")))
    write_bytes(part, nbformat.writes(page).encode())
    command = [sys.executable, "-m", "papermill", part, part, "-f", parameters, "--cwd", notebook.parent]
    with open(log, "wb") as file:
        status = subprocess.run([*command, "--no-progress-bar"], stdout=file, stderr=subprocess.STDOUT).returncode
    if status == 0:
        part.replace(output)
        print(f"{title}: done in {round(time.monotonic() - start)} s", flush=True)
        return 0
    if part.is_file():
        part = part.replace(output.with_name(f".{title}.part.ipynb"))
    end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN:])
    print(f"{end}\n{title}: FAILED; as far as it came: {part}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
