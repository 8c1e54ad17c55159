"""How a notebook starts and ends its run, and which of its cells belong to which model."""

from collections.abc import Iterable, Mapping
from typing import Any

from icl_lib.cards.card import Card, check_values
from icl_lib.embedded.catalogue import CATALOGUE, check_claims, own_entry
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


def close_run(ledger: Ledger, model: str, rows: Iterable[tuple]) -> None:
    """Record the rows (key, item, published, ours, criterion, holds[, unit]), write the ledger, and print the verdict.

    Then the ledger is held to what the catalogue claims of the model. Raises `AssertionError` for a claim that fails,
    after everything is written.
    """
    fields = ("item", "published", "ours", "criterion", "holds", "unit")
    for key, *values in rows:
        ledger.record(key, **dict(zip(fields, values, strict=False)))
    ledger.write()
    holds = ledger.table().set_index("key")["holds"]
    print(f"{holds.sum()} of {len(holds)} criteria hold; not: {', '.join(holds.index[~holds]) or 'none'}")
    check_claims(model, ledger)


def page_for(notebook: Any, parameters: Mapping[str, Any]) -> Any:
    """The notebook as it runs with these parameters: without the cells that are true of another model only.

    A cell tagged with the name of a catalogue entry says what was seen with that entry's own card, in numbers. A run
    of another model or of other settings leaves it out. `notebook` is nbformat's, and is changed.
    """
    foreign = set(CATALOGUE) - {own_entry(parameters)}
    notebook.cells = [cell for cell in notebook.cells if not foreign & set(cell.metadata.get("tags", []))]
    return notebook
