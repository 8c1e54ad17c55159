"""Which notebook needs which, and how a card is run:

    snakemake --configfile params/tiny.yaml --cores 2

Use `--cores 1` on an accelerator: one notebook at a time has it to itself. A notebook runs again when it, its part of the card,
the library or a notebook it reads from has changed; add `--rerun-triggers mtime input` to keep results across library edits.
"""

import logging
import os
import sys

import yaml

from icl_lib.cards.card import CardError, check_values, for_notebook, notebook_files, read_card
from icl_lib.cards.checks import check_against_model
from icl_lib.files.hashes import code_version
from icl_lib.files.lock import say_that_one_runs
from icl_lib.files.paths import resolve, root, run_folder
from icl_lib.files.write import write_bytes
from icl_lib.runs.needs import needs

workdir: str(root())

# Some libraries give the root logger a handler when they are imported; snakemake's records, whole shell commands, would reach it.
logging.getLogger("snakemake.logging").propagate = False

RUNNING = say_that_one_runs()  # until this process ends: `make demo` takes away a lock that nobody holds
NEEDS = needs()  # what a notebook reads from the run's store, by the notebook that makes it; all others run by themselves

os.environ.pop("MPLBACKEND", None)  # `Agg` would drop the inline figures without a word
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU's memory; JAX's own default leaves a quarter unused

try:
    if not config:
        raise CardError("name a card: snakemake --configfile params/tiny.yaml --cores 2")
    for path in workflow.configfiles:
        read_card(path)  # snakemake keeps the last of two equal keys; ours refuses them
    source = ", ".join(map(str, workflow.configfiles))
    CARD = check_values(config, source).model_dump()
    check_against_model(CARD, source)
    CARD["tasks"] = resolve(CARD["tasks"])  # a folder is looked for from the root, notebooks run elsewhere
except CardError as err:
    sys.exit(f"{err}")

RUN = run_folder(CARD["run_dir"])
NOTEBOOKS = {p.stem: p for p in notebook_files()}


def part_of_card(name):
    """The file with the values this notebook declares, rewritten only when they differ, so that only their notebooks run again."""
    path = RUN / "params" / f"{name}.yaml"
    text = yaml.safe_dump(for_notebook(CARD, NOTEBOOKS[name]))
    if not path.is_file() or path.read_text() != text:
        write_bytes(path, text.encode())
    return path


rule all:
    input:
        [RUN / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS],


for name, notebook in NOTEBOOKS.items():

    rule:
        name:
            f"run_{name}"
        input:
            notebook=notebook,
            params=part_of_card(name),
            made_by=[RUN / "notebooks" / f"{n}.ipynb" for n in NEEDS.get(name, []) if n in NOTEBOOKS],
        output:
            RUN / "notebooks" / f"{name}.ipynb",
        log:
            RUN / "logs" / f"{name}.log",
        params:
            python=sys.executable,
            library=code_version()["library"],
        priority: 10 if any(name in needed for needed in NEEDS.values()) else 0  # start the longest chain first
        shell:
            "{params.python:q} -m icl_lib.commands.run_notebook {input.notebook:q} {output:q} {input.params:q} {log:q}"
