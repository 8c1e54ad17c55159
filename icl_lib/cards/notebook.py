"""How a notebook starts its run."""

from collections.abc import Mapping
from typing import Any

from icl_lib.cards.card import Card, check_values
from icl_lib.runs import Ledger, Store, devices


def open_run(notebook: str, namespace: Mapping[str, Any]) -> tuple[Store, Ledger]:
    """Store and ledger of a notebook's run, by the parameters of its cell; figures get their style, JAX its cache.

    `notebook` is its file name without ending, `namespace` its `globals()`, of which the keys of a card are taken: so
    a value that was changed by hand in the cell is held to the card's rules, and goes into the provenance of what is
    saved, like any other. Call it before the first computation. Raises `CardError` for values that no card may have.
    """
    from icl_lib import figures

    parameters = {key: namespace[key] for key in Card.model_fields if key in namespace}
    check_values(parameters, f"parameters of {notebook}")
    figures.use_style()
    devices.setup(parameters["run_dir"])
    store = Store(parameters["run_dir"], parameters)
    return store, Ledger(store, notebook)
