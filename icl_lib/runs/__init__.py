"""Runs: cards, artefacts, ledgers, devices and reports. This room knows files and devices, not science."""

from icl_lib.runs.devices import compute_dtype, describe, make_mesh, setup
from icl_lib.runs.ledger import Ledger
from icl_lib.runs.params import CardError, check_card
from icl_lib.runs.paths import resolve, root, run_folder
from icl_lib.runs.store import Store, StoreError

__all__ = [
    "CardError",
    "Ledger",
    "Store",
    "StoreError",
    "check_card",
    "compute_dtype",
    "describe",
    "make_mesh",
    "resolve",
    "root",
    "run_folder",
    "setup",
]
