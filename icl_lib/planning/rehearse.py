"""A card run from end to end on stand-ins, offline, in minutes: what breaks here would break after the download.

    python -m icl_lib.commands.rehearse gemma-2-9b          # or params/gemma-2-9b.yaml
    python -m icl_lib.commands.rehearse --all

Writes `runs/rehearsal/CARD/`: a model of the card's family with few layers and random weights, SAEs in the card's
formats, a few tasks, and a card with the same keys, whose layers are mapped onto the small model and whose sizes are
cut down. Then it runs all notebooks on that card through the Snakefile, with the hub switched off, and adds a line with
their times to `runs/rehearsal/times.jsonl`. All is asserted but claims, because nothing is true of random weights.
"""

import datetime
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from icl_lib.cards.card import CardError, read_card
from icl_lib.cards.checks import defaults_of, full_card
from icl_lib.embedded import entry
from icl_lib.files.paths import resolve, root
from icl_lib.models import load_tokenizer
from icl_lib.planning.dictionaries import sites_of
from icl_lib.planning.preflight import sizes_of
from icl_lib.planning.stand_in import write_model, write_saes
from icl_lib.saes.formats.suites import has_layer, layers_of, with_layer
from icl_lib.tasks import Task, Template, load_tasks
from icl_lib.tasks.tasks import DATA_VARIABLE, URLS

MOST_LAYERS = 7
# Of what a source has: tasks of each kind (shared inputs, shared outputs, several tokens), one of each group.
_TASKS = (
    "country_capital", "location_language", "antonyms", "present_past", "present_simple_past_simple", "en_es", "es_en",
    "next_item", "algo_first",
)  # fmt: skip
_SIZES = {
    "n_shots": 4, "list_shots": 3, "n_prompts": 4, "max_shots": 5, "sweep_steps": 15, "quality_rows": 8,
    "rate_rows": 24, "tvc_steps": 6, "tvc_prompts": 4, "detector_steps": 6, "effect_prompts": 3, "circuit_prompts": 2,
    "circuit_shots": 3, "circuit_list_shots": 2,
}  # fmt: skip


def small_layers(card: Mapping[str, Any], n_layers: int) -> tuple[dict[str, Any], int]:
    """The card's layer keys for a small model, and how many layers that has.

    Kept are the layers of executors and detectors, the first and last of circuits, and the SAEs that these need. They
    are mapped in proportion and moved apart where they come too close: the order stays, neighbours stay neighbours, and
    others keep a layer between them as far as there is room.
    """
    executor, detector, circuit = card["layer_executor"], card["layer_detector"], card["circuit_layers"]
    residual = next(p for p in card["saes"] if sites_of(p, 0)[0][0].kind == "residual")
    behind = int(sites_of(residual, 0)[0][0].name == "resid_post")  # such a file serves the next layer
    some = sorted({circuit[0], circuit[-1], *({executor} & set(circuit))})
    kept = sorted({executor - behind, detector - behind, *some} & set(card["sae_layers"]))
    named = sorted({executor, detector, *some, *kept})
    n = min(n_layers, max(MOST_LAYERS, len(named)))
    places = [round(layer * (n - 1) / max(1, n_layers - 1)) for layer in named]
    for i in range(1, len(named)):
        places[i] = max(places[i], places[i - 1] + min(2, named[i] - named[i - 1]))
    places = [min(place, n - len(named) + i) for i, place in enumerate(places)]
    at = dict(zip(named, places, strict=True))
    keys = {"layer_executor": at[executor], "layer_detector": at[detector]}
    keys |= {"circuit_layers": [at[i] for i in some], "sae_layers": [at[i] for i in kept]}
    return keys | {"saes": [_small_range(pattern, kept, at) for pattern in card["saes"]]}, n


def _small_range(pattern: str, kept: list[int], at: Mapping[int, int]) -> str:
    """A pattern that has SAEs at some layers only, with the places of those that were kept."""
    some = [at[layer] for layer in layers_of(pattern, kept)]
    if has_layer(pattern) and len(some) < len(kept):
        return with_layer(pattern, f"{{layer:{min(some)}-{max(some)}}}") if some else pattern
    return with_layer(pattern, "{layer}")


def small_tasks(source: str, folder: Path) -> dict[str, Task]:
    """A few tasks of the card's source, written to `folder`; of the embedded ones where the source needs a network."""
    here = source not in URLS or os.environ.get(DATA_VARIABLE)
    tasks = load_tasks(resolve(source) if here else "embedded")
    chosen = {name: tasks[name] for name in _TASKS if name in tasks}
    for task in chosen.values():
        path = folder / task.group / f"{task.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(task.pairs[:150]), ensure_ascii=False))
    return load_tasks(folder)


def prepare(card: Mapping[str, Any], folder: Path, **sizes: int) -> Path:
    """Write the stand-ins of a card and its small card into `folder`, emptied first; the path of the small card.
    `sizes` changes the cut-down sizes. Raises `CardError` or `PreflightError` where the card does not fit its model."""
    config = sizes_of(card["model"])
    shutil.rmtree(folder, ignore_errors=True)
    tasks = small_tasks(card["tasks"], folder / "tasks")
    layers, n_layers = small_layers(card, config.n_layers)
    hub, template = folder / "hub", Template(prefix=card["prefix"])
    model = write_model(hub / card["model"], config, n_layers, tasks, template, card["seed"])
    small = dict(card) | layers | {key: min(card[key], size) for key, size in (_SIZES | sizes).items() if key in card}
    small |= {"tvc_l1": sorted({card["tvc_l1"][0], card["tvc_l1"][-1]}), "card": f"rehearsal of {card['card']}"}
    write_saes(small, hub, model, tasks, load_tokenizer(hub / card["model"]), template)
    small |= {"model": str(hub / card["model"]), "tasks": str(folder / "tasks"), "run_dir": str(folder / "run")}
    small |= {"saes": [str(hub / pattern) for pattern in small["saes"]], "text": str(folder / "text.txt")}
    _write_text(tasks, folder / "text.txt")
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(small, sort_keys=False))
    return path


def _write_text(tasks: Mapping[str, Task], path: Path) -> None:
    """The pairs of all tasks as a text, a paragraph for each ten."""
    in_turn = itertools.zip_longest(*(task.pairs for task in tasks.values()))
    pairs = [f"{x} -> {y}" for pairs in in_turn for x, y in filter(None, pairs)]
    path.write_text("\n\n".join(", ".join(pairs[i : i + 10]) for i in range(0, len(pairs), 10)))


def run(small_card: Path, notebooks: Iterable[str] | None = None, cores: int = 2) -> tuple[bool, str]:
    """Run notebooks of a small card (all, or the named ones with what they need); whether all went well, the output."""
    run_dir = Path(yaml.safe_load(small_card.read_text())["run_dir"])
    targets = ["all"] if notebooks is None else [str(run_dir / "notebooks" / f"{name}.ipynb") for name in notebooks]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most time goes into compiling, which then takes a third
    options = f"--configfile {shlex.quote(str(small_card))} --cores {cores} --keep-going --nolock --quiet all"
    command = [sys.executable, "-m", "snakemake", *shlex.split(options)]
    done = subprocess.run([*command, "--", *targets], cwd=root(), env=environment, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def rehearse(name: str, notebooks: Iterable[str] | None = None, **sizes: int) -> bool:
    """Rehearse one card; prints how it went and how long it took. Whether all notebooks ran through. Raises `CardError`
    for the embedded model, which has nothing to rehearse, besides what `prepare` raises."""
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else root() / "params" / f"{name}.yaml"
    start, folder = time.monotonic(), root() / "runs" / "rehearsal"
    card = defaults_of(full_card(path))
    if entry(card["model"]) is not None:
        raise CardError(f"{path} is the embedded model's own card, which runs as it is; {which()}")
    small = prepare(card, folder / card["card"], **sizes)
    good, text = run(small, notebooks)
    times, seconds = re.findall(r"^(\S+): done in (\d+) s", text, re.MULTILINE), round(time.monotonic() - start)
    print("\n".join(f"{notebook}: done in {took} s" for notebook, took in times) if good else text)
    where = small.parent.relative_to(root())
    print(f"{card['card']}: {'rehearsed' if good else 'FAILED'} in {seconds} s; {where}", flush=True)
    took = {name: int(seconds) for name, seconds in times}
    line = {"card": card["card"], "good": good, "seconds": seconds, "notebooks": took}
    line |= {"cores": os.cpu_count(), "date": datetime.date.today().isoformat()}
    with open(folder / "times.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return good


def cards() -> list[Path]:
    """The cards that can be rehearsed: all but that of the embedded model."""
    return sorted(path for path in (root() / "params").glob("*.yaml") if entry(read_card(path)["model"]) is None)


def which() -> str:
    """How to name a card, and the cards there are."""
    names = ", ".join(path.stem for path in cards())
    return f"name another card, `make rehearse CARD=gemma-2-9b`, or rehearse them all, `make rehearse-all`: {names}"
