"""`python -m icl_lib.commands.run_notebook NOTEBOOK OUTPUT PARAMETERS LOG`: execute one notebook.

The Snakefile calls it. Cells that are true of another model only are left out. While it runs, a file beside the log
says which cell is at work.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import yaml

from icl_lib.cards.notebook import page_for
from icl_lib.files.write import write_bytes

_SHOWN = 12  # last lines of an error that a failure shows


def progress_file(log: Path) -> Path:
    """Where the notebook of this log says how far it is: JSON with cell, cells, section; seconds once it is done."""
    return log.with_suffix(".progress.json")


def _engine(say):
    """papermill's engine, which tells `say` of every cell before it runs."""
    from papermill.engines import NBClientEngine

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, *args, **kwargs):
            start = nb_man.cell_start
            nb_man.cell_start = lambda cell, index=None, **more: (say(nb_man.nb, index), start(cell, index, **more))[1]
            return super().execute_managed_notebook(nb_man, *args, **kwargs)

    return Engine


def _section(notebook, index: int) -> str:
    """The last heading before a cell."""
    titles = [
        line.lstrip("# ")
        for cell in notebook.cells[: index + 1]
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("#")
    ]
    return titles[-1] if titles else ""


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """What this process and its children print goes to a file."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = os.dup(1), os.dup(2)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])


def _why(error: Exception) -> str:
    """The end of an error: of a cell's, the cell's number and its exception without the colours of a terminal."""
    from papermill.exceptions import PapermillExecutionError

    if not isinstance(error, PapermillExecutionError):
        return f"{type(error).__name__}: {error}"
    return "\n".join(f"cell {error.exec_count}: {error.ename}: {error.evalue}".splitlines()[:_SHOWN])


def main(argv: list[str] | None = None) -> int:
    """Run papermill: the output appears whole or not at all, what it printed goes to the log. 0 if all cells ran."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.run_notebook", description="Execute one notebook."
    )
    for name, what in {
        "notebook": "the .ipynb to run",
        "output": "where the executed notebook goes",
        "parameters": "YAML file with the values of its parameters cell",
        "log": "file for what it prints",
    }.items():
        parser.add_argument(name, type=Path, help=what)
    asked = parser.parse_args(argv)
    notebook, output, log = asked.notebook, asked.output, asked.log
    title, start = notebook.stem, time.monotonic()
    for path in (log, output):
        path.parent.mkdir(parents=True, exist_ok=True)
    # its own: one that was left behind by a killed run may go on
    part = output.with_name(f".{title}.{os.getpid()}.ipynb")
    values = yaml.safe_load(asked.parameters.read_text(encoding="utf-8"))
    page = page_for(nbformat.read(notebook, as_version=4), values)
    write_bytes(part, nbformat.writes(page).encode())

    def say(running, index):
        where = {"cell": index + 1, "cells": len(running.cells), "section": _section(running, index)}
        write_bytes(progress_file(log), json.dumps(where).encode())

    import papermill
    from papermill.engines import papermill_engines

    papermill_engines.register("told", _engine(say))
    print(f"{title}: running", flush=True)
    try:
        with _printing_to(log):
            papermill.execute_notebook(
                part, part, values, engine_name="told", progress_bar=False, cwd=str(notebook.parent)
            )
    except Exception as error:  # of a cell, of the kernel, of the disk: the run of the others goes on
        kept = part.replace(output.with_name(f".{title}.part.ipynb")) if part.is_file() else log
        progress_file(log).unlink(missing_ok=True)
        print(
            f"{title}: FAILED in {_why(error)}\n{title}: as far as it came: {kept}; what it printed: {log}", flush=True
        )
        return 1
    seconds = round(time.monotonic() - start)
    write_bytes(progress_file(log), json.dumps({"seconds": seconds}).encode())
    part.replace(output)
    print(f"{title}: done in {seconds} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
