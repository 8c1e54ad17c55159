"""Runs: cards, artefacts, ledgers, devices and reports. This room knows files and devices, not science.

`params` and `report` are also commands (`python -m icl_lib.runs.params CARD`), so they are imported by their own names.
"""

from icl_lib.runs.devices import compute_dtype, describe, setup
from icl_lib.runs.ledger import Ledger
from icl_lib.runs.paths import resolve, root, run_folder
from icl_lib.runs.store import Store, StoreError

__all__ = [
    "Ledger",
    "Store",
    "StoreError",
    "compute_dtype",
    "describe",
    "resolve",
    "root",
    "run_folder",
    "setup",
]
