"""Running a card: what a user sees, paths of any kind, and a folder that an earlier run, killed, left locked."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time

import nbformat
import pytest

from icl_lib.commands import demo, run_notebook
from icl_lib.files import lock
from icl_lib.files.paths import root
from icl_lib.runs import watch

COMMANDS = sorted(path.stem for path in (root() / "icl_lib" / "commands").glob("[a-z]*.py"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose name no shell takes as it is, in place of the repository's root."""
    folder = tmp_path / "Anna's work $HOME & `x`; (1)"
    folder.mkdir()
    monkeypatch.setattr(lock, "root", lambda: folder)
    monkeypatch.setattr(demo, "root", lambda: folder)
    return folder


def _write(folder, name, code):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [
        nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("# Title\n\n## What is looked at\n\nText."),
        nbformat.v4.new_code_cell(code),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")
    (folder / f"{name}.py").write_text(code)


def _notebook(folder, code):
    _write(folder, "00_a", code)
    (folder / "values.yaml").write_text("seed: 7\n")
    return [str(folder / name) for name in ("00_a.ipynb", "run it/00_a.ipynb", "values.yaml", "run it/00_a.log")]


def test_a_notebook_runs_below_any_folder(folder, capsys):
    argv = _notebook(folder, "print('seed', seed)\nassert seed == 7, 'not seven'")
    assert run_notebook.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[0] == "00_a: running"
    assert [p.name for p in (folder / "run it").iterdir() if p.suffix == ".ipynb"] == ["00_a.ipynb"]
    (folder / "values.yaml").write_text("seed: 8\n")
    assert run_notebook.main(argv) != 0
    out = capsys.readouterr().out
    assert "00_a: FAILED in cell 4 of 4, 'What is looked at'" in out and "  AssertionError: not seven\n" in out
    assert (
        f"As far as it came: {folder / 'run it' / '.00_a.part.ipynb'}" in out and "give the same command again" in out
    )
    assert "PapermillExecutionError" not in out, "the exception alone, not the log around it"


def test_a_notebook_whose_process_ends_is_told_from_one_that_raises(folder, capsys):
    assert run_notebook.main(_notebook(folder, "import os; os._exit(1)")) != 0
    out = capsys.readouterr().out
    assert "FAILED in cell 4 of 4" in out and "No exception" in out and "memory ran out" in out


def test_a_running_notebook_says_in_which_cell_it_is(folder):
    argv, found = _notebook(folder, "import time; time.sleep(6)"), []
    argv[1] = str(folder / "notebooks" / "00_a.ipynb")
    thread = threading.Thread(target=run_notebook.main, args=(argv,))
    thread.start()
    while thread.is_alive():
        found += [str(place) for place in watch.running(folder, since=0.0).values()]
        time.sleep(0.3)
    assert "cell 4 of 4, 'What is looked at'" in found
    assert watch.running(folder, since=0.0) == {}


def test_how_long_a_run_takes_is_known_from_the_last_one(tmp_path):
    needs = {"00_a": [], "01_b": ["00_a"], "02_c": ["01_b"]}
    for name, seconds in zip(needs, (60.0, 120.0, 180.0), strict=True):
        assert watch.minutes(tmp_path, needs, 2) is None
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(metadata={"papermill": {"duration": seconds}}), path)
    assert watch.minutes(tmp_path, needs, 2) == 6.0, "the chain"
    assert watch.minutes(tmp_path, dict.fromkeys(needs, []), 2) == 3.0


def test_without_a_terminal_a_line_comes_from_time_to_time(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(watch, "SAY_SECONDS", 2.0)
    command = [sys.executable, "-c", "import time; print('one'); time.sleep(6); raise SystemExit(3)"]
    assert watch.follow(command, tmp_path, tmp_path) == 3
    lines = capfd.readouterr().out.splitlines()
    assert 1 <= sum(line.startswith("[0:0") for line in lines) <= 3 and "one" in lines
    assert "\x1b" not in "".join(lines)


def test_a_demo_shows_what_went_wrong_and_no_log(tmp_path):
    shutil.copytree(root() / "icl_lib", tmp_path / "icl_lib", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "icl_lib" / "__init__.py", "a") as file:
        file.write("\nimport logging\n\nlogging.basicConfig()  # as some libraries do on import\n")
    shutil.copy(root() / "Snakefile", tmp_path)
    shutil.copytree(root() / "params", tmp_path / "params")
    (tmp_path / "assets").symlink_to(root() / "assets")
    (tmp_path / "notebooks").mkdir()
    _write(tmp_path / "notebooks", "00_good", "1")
    _write(tmp_path / "notebooks", "01_bad", "raise ValueError('three layers, got two')")
    command = [sys.executable, "-m", "icl_lib.commands.demo"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    out = done.stdout + done.stderr
    assert done.returncode == 1
    assert (
        out.startswith("2 notebooks, ") and "00_good: done in" in out and "ValueError: three layers, got two\n" in out
    )
    assert "Not all notebooks ran" in out and (tmp_path / "runs" / "tiny" / "notebooks" / "00_good.ipynb").is_file()
    assert not re.search(r"INFO|snakemake|-m icl_lib|shell", out), out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name):
    command = [sys.executable, "-m", f"icl_lib.commands.{name}", "--help"]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"})
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m icl_lib.commands.{name} "), done.stderr
    description, *arguments = [block for block in done.stdout.split("\n\n")[1:] if block.strip()]
    assert len(description.splitlines()) == 1 and description.endswith(".")
    lines = [line for block in arguments for line in block.splitlines() if line.startswith("  ")]
    assert lines and all(re.search(r"\S  +\S", line) for line in lines), "every argument is explained"


def test_make_lists_every_target():
    shown = subprocess.run(["make", "--no-print-directory"], cwd=root(), capture_output=True, text=True, check=True)
    makefile = (root() / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()
    assert {line.split()[0] for line in shown.stdout.splitlines()[1:]} == set(targets)
    assert all(len(line.split()) > 2 for line in shown.stdout.splitlines())


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
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: called.append(command))
    monkeypatch.setattr(demo.watch, "follow", lambda command, *_: called.append(command) or 0)
    monkeypatch.setattr(demo.report, "main", lambda argv: 0)
    (folder / "my card.yaml").write_text("run_dir: runs/mine\n")
    monkeypatch.chdir(folder)
    with lock.say_that_one_runs():
        assert demo.main(["my card.yaml"]) == 2 and "another run is going on in" in capsys.readouterr().err
    assert demo.main(["my card.yaml"]) == 0 and len(called) == 1 and "--unlock" not in called[0]
    (folder / ".snakemake" / "locks").mkdir()
    (folder / ".snakemake" / "locks" / "0.input.lock").write_text("")
    assert demo.main(["my card.yaml"]) == 0
    assert "--unlock" in called[1] and "--rerun-incomplete" in called[2] and "my card.yaml" in called[2]
