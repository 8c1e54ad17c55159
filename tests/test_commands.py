"""Running a card: paths of any kind, and a folder that an earlier run, killed, left locked."""

import subprocess
import sys

import nbformat
import pytest

from icl_lib.commands import demo, run_notebook
from icl_lib.files import lock


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
        nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "00_a.ipynb")
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
    assert "not seven" in out and f"00_a: FAILED; as far as it came: {folder / 'run it' / '.00_a.part.ipynb'}" in out


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
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: called.append(command) or _Done())
    monkeypatch.setattr(demo.report, "main", lambda argv: 0)
    with lock.say_that_one_runs():
        assert demo.main(["my card.yaml"]) == 2 and "another run is going on in" in capsys.readouterr().err
    assert demo.main(["my card.yaml"]) == 0 and len(called) == 1 and "--unlock" not in called[0]
    (folder / ".snakemake" / "locks").mkdir()
    (folder / ".snakemake" / "locks" / "0.input.lock").write_text("")
    assert demo.main(["my card.yaml"]) == 0
    assert "--unlock" in called[1] and "--rerun-incomplete" in called[2] and "my card.yaml" in called[2]


class _Done:
    returncode = 0
