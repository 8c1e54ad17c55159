"""Which notebook needs which, and how a card is run:

    snakemake --configfile params/tiny.yaml --cores 2

Use `--cores 1` on an accelerator: one notebook at a time has it to itself. A notebook runs again when it, its part of the card,
the library or a notebook it reads from has changed; add `--rerun-triggers mtime input` to keep results across library edits.
"""

import os
import sys

import yaml

from icl_lib.cards.checks import check_against_model
from icl_lib.cards.card import CardError, all_declared, check_values, for_notebook, notebook_files, read_card
from icl_lib.files.paths import resolve, root, run_folder
from icl_lib.files.hashes import code_version
from icl_lib.files.write import write_bytes

workdir: str(root())

# What a notebook reads from the run's store, by the notebook that makes it. All others run by themselves.
NEEDS = {
    "03_task_vector_cleaning": ["01_sparse_autoencoders", "02_task_vectors"],
    "04_executors_and_detectors": ["01_sparse_autoencoders", "03_task_vector_cleaning"],
}

os.environ.pop("MPLBACKEND", None)  # `Agg` would drop the inline figures without a word
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU's memory; JAX's own default leaves a quarter unused

try:
    if not config:
        raise CardError("name a card: snakemake --configfile params/tiny.yaml --cores 2")
    for path in workflow.configfiles:
        read_card(path)  # snakemake keeps the last of two equal keys; ours refuses them
    source = ", ".join(map(str, workflow.configfiles))
    CARD = check_values(config, all_declared(), source)
    check_against_model(CARD, source)
    CARD |= {"tasks": resolve(CARD["tasks"])} if "tasks" in CARD else {}  # a folder is looked for from the root, notebooks run elsewhere
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
            title=name,
            part=RUN / "notebooks" / f".{name}.part.ipynb",
            python=sys.executable,
            library=code_version()["library"],
        priority: 10 if any(name in needed for needed in NEEDS.values()) else 0  # start the longest chain first
        shell:
            # papermill writes as it goes; the rename makes the result appear whole or not at all
            "echo '{params.title}: running'; start=$(date +%s);"
            " {params.python:q} -m papermill {input.notebook:q} {params.part:q} -f {input.params:q} --cwd notebooks --no-progress-bar"
            " > {log:q} 2>&1 && mv {params.part:q} {output:q} && echo \"{params.title}: done in $(($(date +%s) - start)) s\""
            " || (tail -n 20 {log:q}; echo '{params.title}: FAILED; as far as it came: {params.part}'; exit 1)"
