"""Where the running notebooks of a card are, read from what papermill writes down as each of their cells starts."""

import dataclasses
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SAY_SECONDS = 30.0  # from line to line where there is no terminal
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_MARK = "papermill-error-cell-tag"  # of cells that papermill puts beside one that failed
_RUNNING = re.compile(r"\.(\d\d_.*)\.\d+\.ipynb")


@dataclasses.dataclass(frozen=True)
class Place:
    """A cell of a notebook, counted from 1, and the heading that it stands under."""

    cell: int
    n_cells: int
    section: str
    error: tuple[str, ...] = ()  # last lines of the exception that the cell raised

    def __str__(self) -> str:
        return f"cell {self.cell} of {self.n_cells}" + (f", {self.section!r}" if self.section else "")


def unfinished(output: Path) -> Path:
    """Where this process writes a notebook whose place is `output` until it is done."""
    return output.with_name(f".{output.stem}.{os.getpid()}.ipynb")


def place(path: Path) -> Place | None:
    """Where an unfinished notebook is; None where that cannot be read, as while papermill writes the file."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return None
    section = ""
    for i, cell in enumerate(cells, 1):
        if "papermill-error-cell-tag" in cell["metadata"].get(
            "tags", []
        ):  # papermill's own, before the one that failed
            continue
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^#+ +(.+)", "".join(cell["source"]), re.MULTILINE)
            section = headings[-1].strip() if headings else section
        status = cell["metadata"].get("papermill", {}).get("status")
        if status in ("running", "failed"):
            return Place(i, len(cells), section, _error(cell))
    return None


def _error(cell: Mapping, most: int = 8) -> tuple[str, ...]:
    """The last lines of the exception in a cell's outputs; the message is whole even where it is longer."""
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            message = f"{output['ename']}: {output['evalue']}".splitlines()
            lines = _ANSI.sub("", "\n".join(output["traceback"])).splitlines()
            above = lines[: -len(message)][-max(0, most - len(message)) :]
            return (*above, *message)
    return ()


def minutes(run_dir: Path, needs: Mapping[str, Sequence[str]], cores: int) -> float | None:
    """How long all notebooks take by the times of the last run, in minutes; None where one has not been run."""
    seconds = {}
    for name in needs:
        try:
            notebook = json.loads((run_dir / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
            seconds[name] = float(notebook["metadata"]["papermill"]["duration"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    chain = lambda name: seconds[name] + max(map(chain, needs[name]), default=0.0)
    return max(sum(seconds.values()) / cores, *map(chain, needs), 0.0) / 60


def follow(command: Sequence[str], folder: Path, run_dir: Path) -> int:
    """Run the command in `folder`, show its lines and below them where its notebooks are; its exit status.

    In a terminal the last lines are rewritten every second. Elsewhere a line is written every `SAY_SECONDS`.
    """
    screen, start, lines = _Screen(), time.time(), queue.Queue()
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=1.0)
                except queue.Empty:
                    screen.show(time.time() - start, running(run_dir, start))
                    continue
                if line is None:
                    break
                screen.print(line.rstrip("\n"))
        except KeyboardInterrupt:  # the terminal sends it to the command too, which ends its notebooks
            screen.print("interrupted: waiting for the notebooks to end; the same command goes on from what is done")
            process.wait()
            return 130
        finally:
            screen.clear()
    return process.returncode


def running(run_dir: Path, since: float) -> dict[str, Place | None]:
    """Notebook -> where it is, of the unfinished ones that were written since then."""
    found = {}
    for path in sorted((run_dir / "notebooks").glob(".*.ipynb")):
        named = _RUNNING.fullmatch(path.name)
        try:
            if named and path.stat().st_mtime >= since:
                found[named[1]] = place(path)
        except OSError:  # it has just been finished
            continue
    return found


def _read(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


class _Screen:
    """Lines that stay, and below them, in a terminal, some that are rewritten."""

    def __init__(self):
        self._terminal, self._below, self._said = sys.stdout.isatty(), 0, time.monotonic()
        self._last: dict[str, Place] = {}

    def print(self, line: str) -> None:
        self.clear()
        print(line, flush=True)

    def clear(self) -> None:
        if self._below:
            sys.stdout.write(f"\x1b[{self._below}A\x1b[J")
            self._below = 0

    def show(self, seconds: float, places: Mapping[str, Place | None]) -> None:
        """Where the notebooks are; of one that cannot be read now, where it was."""
        self._last = {name: now or self._last.get(name) for name, now in places.items()}
        clock = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
        each = [f"{name}: {now or 'starting'}" for name, now in self._last.items()] or ["working out what is to run"]
        if self._terminal:
            self.clear()
            width = shutil.get_terminal_size().columns - 1
            below = [line[:width] for line in (f"[{clock}]", *(f"  {line}" for line in each))]
            print("\n".join(below), flush=True)
            self._below = len(below)
        elif time.monotonic() - self._said >= SAY_SECONDS:
            print(f"[{clock}] {'; '.join(each)}", flush=True)
            self._said = time.monotonic()
