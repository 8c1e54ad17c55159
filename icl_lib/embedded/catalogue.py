"""The catalogue of embedded models: what each is made of, and what is claimed of it.

One entry names a model's files, the text that it was trained on, its tasks, its SAE suite, its card, and for each
notebook the ledger keys that are claimed of it with their bars. Whatever a notebook shows of an embedded model alone
it asks of the entry; of any other model there is none. The package imports this module, so it imports nothing that is
slow.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from math import inf, nan
from pathlib import Path
from typing import Any

from icl_lib.files import names
from icl_lib.files.paths import resolve, root


@dataclasses.dataclass(frozen=True)
class Bar:
    """What is claimed of one number of a ledger: that its criterion holds and, where there are bounds, that it is
    within them.

    Of a pair of numbers the bounds are for their ratio, of a text "24 of 28" for the share. With `times` the bounds
    are multiples of the number of that ledger key.
    """

    at_least: float = -inf
    at_most: float = inf
    times: str = ""

    def missed(self, key: str, ledger: Any) -> str:
        """Why the ledger does not keep the claim; empty if it does."""
        if key not in ledger.entries:
            return f"{key} is not recorded"
        ours = _number(ledger.entries[key]["ours"])
        unit = _number(ledger.entries[self.times]["ours"]) if self.times else 1.0
        low, high = self.at_least * unit, self.at_most * unit
        if not low <= ours <= high:
            return f"{key} is {ours:.3g}, claimed is {low:.3g} to {high:.3g}"
        return "" if ledger.entries[key]["holds"] else f"{key}: {ledger.entries[key]['criterion']}, ours is {ours:.3g}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One embedded model. Paths count from the repository root; `name` stands for the model, for its suite and for its
    text.
    """

    name: str
    folder: str  # of the model's files, with its SAEs in `saes`
    package: str  # below `icl_lib.embedded`: what made it, its language among it
    tasks: str  # source of its tasks
    card: str  # the experiment that the claims are about
    minutes: str  # that its card takes, in words
    claims: Mapping[str, Mapping[str, Bar]]  # notebook -> ledger key -> bar

    @property
    def model(self) -> Path:
        """The folder of the model's files."""
        return root() / self.folder

    @property
    def saes(self) -> Path:
        """The folder of its SAE suite."""
        return self.model / "saes"

    @property
    def losses(self) -> Path:
        """The file with the loss of every step of its training, in nats per token."""
        return self.model / "losses.csv"

    def part(self, module: str) -> Any:
        """A module of the package that made the model: "language", "pretrain", "retrain"."""
        return importlib.import_module(f"icl_lib.embedded.{self.package}.{module}")


ICL_TINY = Entry(
    name="icl-tiny",
    folder="assets/icl-tiny",
    package="icl_tiny",
    tasks="embedded",
    card="params/tiny.yaml",
    minutes="6 to 12 minutes on two cores",
    claims={
        "00_a_model_that_learns_in_context": {
            "tasks": Bar(at_least=23.0),
            "accuracy_5_shots": Bar(at_least=0.95),
            "accuracy_0_shots": Bar(at_most=0.5),
            "any_outputs": Bar(at_least=0.8),
        },
        "01_sparse_autoencoders": {
            "suite": Bar(),
            "ce_recovered": Bar(at_least=0.95),
            "largest_l0": Bar(at_most=40.0),
            "dead": Bar(at_most=0.1),
        },
        "02_task_vectors": {
            "task_vector_best_layer": Bar(at_most=-0.40),
            "elbow_share_of_range": Bar(at_least=0.5),
            "SAE reconstruction_best_layer": Bar(),  # worse than the task vector
            "ITO(5)_best_layer": Bar(),  # worse than the task vector
            "other_task_control": Bar(at_least=0.0),
        },
        "03_task_vector_cleaning": {
            "tvc_l0": Bar(at_most=0.3, times="encoded_l0"),
            "tvc_nll": Bar(),  # no worse than the task vector's
            "beats_ito_at_equal_l0": Bar(at_least=0.8),
        },
        "04_executors": {"executors": Bar(at_least=0.78), "executor_mass": Bar(at_least=75.0)},
        "05_detectors": {"detector_mass": Bar(at_least=80.0), "links": Bar(at_least=3.0)},
        "06_sparse_feature_circuits": {
            "nodes_to_halve": Bar(at_most=300.0),
            "other_tasks": Bar(at_least=-0.15),
            "random_nodes": Bar(at_least=-0.25, at_most=0.25),
            "random_nodes_drawn": Bar(at_least=0.9),
            "keep_500": Bar(at_least=0.5),
        },
    },
)
CATALOGUE = {entry.name: entry for entry in (ICL_TINY,)}

for _entry in CATALOGUE.values():
    names.register(_entry.name, "model", lambda entry=_entry: entry.model)
    names.register(_entry.name, "saes", lambda entry=_entry: entry.saes)


def entry(model: str | Path) -> Entry | None:
    """The entry of a model given by name or by the path of its folder; None for any other model."""
    if str(model) in CATALOGUE:
        return CATALOGUE[str(model)]
    return next((one for one in CATALOGUE.values() if Path(resolve(str(model))) == one.model), None)


def own_entry(parameters: Mapping[str, Any]) -> str:
    """The name of the entry whose own card has these parameters, whatever the run is called; empty for any other."""
    found = entry(parameters["model"]) if "model" in parameters else None
    return found.name if found and _is_own(found, parameters) else ""


def check_claims(model: str | Path, ledger: Any) -> None:
    """Hold the notebook's ledger to what the catalogue claims of the model.

    Claims are about the entry's own card: other models, and the same model with other parameters, only record their
    verdicts. Raises `AssertionError` that lists what fails.
    """
    found = entry(model)
    if found is None or not _is_own(found, ledger.card):
        return
    claims = found.claims.get(ledger.notebook, {})
    missed = [why for key, bar in claims.items() if (why := bar.missed(key, ledger))]
    if missed:
        raise AssertionError(f"claims that do not hold of {found.name}: {'; '.join(missed)}")


def _is_own(found: Entry, parameters: Mapping[str, Any]) -> bool:
    """Whether a notebook ran with the values of the entry's card, whatever the run is called."""
    from icl_lib.cards.card import check_card

    card = check_card(root() / found.card).model_dump()
    same_model = {"model": card["model"] if entry(parameters["model"]) is found else parameters["model"]}
    own = {**parameters, **same_model}
    return all(value == card[key] for key, value in own.items() if key in card and key not in ("card", "run_dir"))


def _number(ours: Any) -> float:
    """A ledger's number as one number: a share for "24 of 28", a ratio for a pair, NaN (which is within no bounds) for
    none.
    """
    if isinstance(ours, str):
        part, _, whole = ours.partition(" of ")
        return float(part) / float(whole)
    if isinstance(ours, list):
        return nan if ours[1] == 0 else ours[0] / ours[1]
    return nan if ours is None else float(ours)
