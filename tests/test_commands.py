"""Running a card: paths of any kind, and a folder that an earlier run, killed, left locked."""

import json
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest

from icl_lib.commands import demo, run_notebook
from icl_lib.files import lock
from icl_lib.files.paths import root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose name no shell takes as it is, in place of the repository's root."""
    folder = tmp_path / "Anna's work $HOME & `x`; (1)"
    folder.mkdir()
    monkeypatch.setattr(lock, "root", lambda: folder)
    monkeypatch.setattr(demo, "root", lambda: folder)
    return folder


def _notebook(folder, code):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [
        nbformat.v4.new_markdown_cell("# Seeds"),
        nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "00_a.ipynb")
    (folder / "values.yaml").write_text("seed: 7\n")
    return [str(folder / name) for name in ("00_a.ipynb", "run it/00_a.ipynb", "values.yaml", "run it/00_a.log")]


def test_a_notebook_runs_below_any_folder(folder, capsys):
    argv = _notebook(folder, "print('seed', seed)\nassert seed == 7, 'not seven'")
    assert run_notebook.main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "00_a: running" and re.fullmatch(r"00_a: done in \d+ s", out[1]) and len(out) == 2
    assert [p.name for p in (folder / "run it").iterdir() if p.suffix == ".ipynb"] == ["00_a.ipynb"]
    assert json.loads(run_notebook.progress_file(folder / "run it" / "00_a.log").read_text())["seconds"] < 60
    (folder / "values.yaml").write_text("seed: 8\n")
    assert run_notebook.main(argv) != 0
    out = capsys.readouterr().out
    assert "00_a: FAILED in cell 3: AssertionError: not seven" in out and len(out.splitlines()) <= 15
    assert f"as far as it came: {folder / 'run it' / '.00_a.part.ipynb'}" in out


def test_a_notebook_says_at_which_cell_it_is(folder):
    """The cell itself reads what is said of it: third of three, after papermill's own cell with the parameters."""
    argv = _notebook(folder, "from pathlib import Path\nprint(Path('run it/00_a.progress.json').read_text())")
    assert run_notebook.main(argv) == 0
    done = nbformat.read(folder / "run it" / "00_a.ipynb", as_version=4)
    assert json.loads(done.cells[-1].outputs[0].text) == {"cell": 4, "cells": 4, "section": "Seeds"}


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_followed_in_lines_or_on_one_line(tmp_path, capsys, monkeypatch, terminal):
    """Lines come at once; between them stands where the run is, every so often, or again and again in a terminal."""
    monkeypatch.setattr(demo, "notebook_files", lambda: [Path("01_a.ipynb"), Path("02_b.ipynb")])
    for name, cell in (("01_a", 3), ("02_b", 5)):
        at = {"cell": cell, "cells": 9, "section": "Where"}
        run_notebook.progress_file(tmp_path / f"{name}.log").write_text(json.dumps(at))
    lines = queue.Queue()
    for line in ("01_a: running", "02_b: running", "01_a: done in 3 s"):
        lines.put(line)
    threading.Timer(2.2, lambda: lines.put(None)).start()
    demo.follow(lines, tmp_path, terminal, every=1.0)
    out = capsys.readouterr().out
    assert out.splitlines()[:3] == ["01_a: running", "02_b: running", "01_a: done in 3 s"]
    assert "02 cell 5 of 9 (Where)" in out and "01 cell" not in out
    rest = out.split("done in 3 s\n")[1]
    assert ("\r" in rest and "\n" not in rest) if terminal else rest.count("\n") in (1, 2)


def test_a_line_comes_every_20_to_40_seconds():
    assert 20 <= demo.LINE_SECONDS <= 40


def test_a_run_is_announced_with_its_time_where_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "notebook_files", lambda: [Path("01_a.ipynb"), Path("02_b.ipynb")])
    assert demo.announcement("icl-tiny", tmp_path, 2).startswith("2 notebooks, about 6 to 12 minutes on two cores; ")
    assert "make preflight" in demo.announcement("google/gemma-2b", tmp_path, 2)
    for name, seconds in (("01_a", 200), ("02_b", 280)):
        run_notebook.progress_file(tmp_path / f"{name}.log").write_text(json.dumps({"seconds": seconds}))
    assert "about 4 minutes" in demo.announcement("icl-tiny", tmp_path, 2)
    assert "about 8 minutes" in demo.announcement("icl-tiny", tmp_path, 1)


def test_snakemake_is_as_quiet_as_it_was_asked_to_be():
    """orbax sets up the root logger when it is imported, and snakemake then prints every shell command."""
    imports = [line for line in (root() / "Snakefile").read_text().splitlines() if re.match("(from|import) ", line)]
    code = "\n".join(
        [*imports, "import logging", "assert 'orbax' not in sys.modules", "assert not logging.root.handlers"]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root())


@pytest.mark.parametrize("name", [p.stem for p in (root() / "icl_lib" / "commands").glob("[a-z]*.py")])
def test_every_command_explains_itself(name):
    done = subprocess.run(
        [sys.executable, "-m", f"icl_lib.commands.{name}", "--help"], capture_output=True, text=True, cwd=root()
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m icl_lib.commands."), done.stderr
    assert len(done.stdout.strip().splitlines()) >= 3


def test_make_help_lists_the_targets():
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=root(), check=True)
    targets = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")]
    phony = re.search(r"^\.PHONY: (.*)$", (root() / "Makefile").read_text(), re.MULTILINE)
    assert sorted(targets) == sorted(phony.group(1).split())


def test_a_lock_goes_with_the_process_that_holds_it_however_it_ends(folder):
    code = "import sys, time; from pathlib import Path; from icl_lib.files import lock; "
    code += "lock.root = lambda: Path(sys.argv[1]); held = lock.say_that_one_runs()"
    code += "; print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert lock.someone_runs()
        other.kill()
        other.wait()
    assert not lock.someone_runs()


def test_a_second_demo_waits_and_one_after_a_kill_goes_on(folder, monkeypatch, capsys):
    called = []
    (folder / "my card.yaml").write_text("run_dir: runs/mine\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: called.append(command))
    monkeypatch.setattr(demo, "_run", lambda command, logs: called.append(command) or 0)
    monkeypatch.setattr(demo.report, "main", lambda argv: 0)
    with lock.say_that_one_runs():
        assert demo.main(["my card.yaml"]) == 2 and "another run is going on in" in capsys.readouterr().err
    assert demo.main(["my card.yaml"]) == 0 and len(called) == 1 and "--unlock" not in called[0]
    (folder / ".snakemake" / "locks").mkdir()
    (folder / ".snakemake" / "locks" / "0.input.lock").write_text("")
    assert demo.main(["my card.yaml"]) == 0
    assert "--unlock" in called[1] and "--rerun-incomplete" in called[2] and "my card.yaml" in called[2]
    assert demo.main(["no card.yaml"]) == 2 and "no card at" in capsys.readouterr().err
