"""Runs: artefacts, ledgers, devices and reports. This room knows files and devices, not science."""

from icl_lib.runs.devices import compute_dtype, describe, setup
from icl_lib.runs.ledger import Ledger
from icl_lib.runs.store import Store, StoreError

__all__ = ["Ledger", "Store", "StoreError", "compute_dtype", "describe", "setup"]
