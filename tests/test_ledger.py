"""The ledger: what is recorded is what is merged and shown, and damage is named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.runs import Ledger, Store, StoreError
from icl_lib.runs.ledger import merge, show


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run", {"model": "some/model"})


def _record(ledger, key="l0", **changes):
    entry = {
        "item": "Fig 3b",
        "published": 3.78,
        "ours": 4.125,
        "criterion": "ours <= 0.5 x encoded",
        "holds": True,
        "unit": "latents",
    }
    ledger.record(key, **{**entry, **changes})


def test_notebooks_are_merged_in_order(store):
    for name, key in (("03_b", "second"), ("02_a", "first")):
        ledger = Ledger(store, notebook=name)
        _record(ledger, key)
        ledger.write()
    table = merge(store.run_dir)
    assert list(table["key"]) == ["first", "second"] and list(table["notebook"]) == ["02_a", "03_b"]
    assert json.loads((store.run_dir / "ledger.json").read_text()) == table.to_dict("records")


def test_writing_again_replaces_the_notebooks_entries(store):
    for ours in (1.0, 2.0):
        ledger = Ledger(store, notebook="02_a")
        _record(ledger, ours=ours)
        ledger.write()
    assert list(merge(store.run_dir)["ours"]) == [2.0]


def test_array_scalars_nan_and_lists_become_json(store):
    ledger = Ledger(store, notebook="02_a")
    _record(ledger, "a", ours=np.float32(0.5), holds=np.bool_(True))
    _record(ledger, "b", ours=float("nan"), holds=jnp.array(False), published=None)
    _record(ledger, "c", ours=jnp.array([1.0, 2.0]), published="about 90 %")
    ledger.write()
    rows = json.loads(ledger.path.read_text())
    assert [r["ours"] for r in rows] == [0.5, None, [1.0, 2.0]] and [r["holds"] for r in rows] == [True, False, True]


@pytest.mark.parametrize("holds", [1, "yes", None, np.array([True])])
def test_a_verdict_is_true_or_false(store, holds):
    with pytest.raises(ValueError, match="holds must be one True or False"):
        _record(Ledger(store, notebook="02_a"), holds=holds)


def test_a_key_is_recorded_once(store):
    ledger = Ledger(store, notebook="02_a")
    _record(ledger)
    with pytest.raises(ValueError, match="'l0' is already recorded"):
        _record(ledger)


@pytest.mark.parametrize("text", ['[{"key": "l0"', '[{"key": "l0"}]', "[3]"])
def test_a_damaged_file_is_named_and_the_merged_ledger_stays(store, text):
    ledger = Ledger(store, notebook="02_a")
    _record(ledger)
    ledger.write()
    merge(store.run_dir)
    before = (store.run_dir / "ledger.json").read_text()
    ledger.path.write_text(text)
    with pytest.raises(StoreError, match="02_a.json .*run notebooks/02_a.ipynb again"):
        merge(store.run_dir)
    assert (store.run_dir / "ledger.json").read_text() == before


def test_the_table_shows_verdicts_and_counts_them(store):
    ledger = Ledger(store, notebook="02_a")
    _record(ledger, "good", unit="%")
    _record(ledger, "bad", holds=False, published=None)
    text = show(ledger.table())
    assert text.splitlines() == [
        "what does not hold (ours, what was asked, the paper's):",
        "  02 bad: 4.12 latents, ours <= 0.5 x encoded",
        "",
        "criteria that hold, by notebook:",
        "  02_a: 1 of 2",
        "1 of 2 criteria hold.",
    ]
    assert "empty" in show(Ledger(store, notebook="x").table())


def test_a_long_ledger_fits_a_terminal(store):
    """At most 30 lines of 100 columns, whatever fails, and what has no room is counted."""
    for name in ("02_a", "03_b"):
        ledger = Ledger(store, notebook=name)
        for i in range(40):
            _record(ledger, f"a_{i}", holds=i % 2 == 0, criterion="a long criterion " * 9)
        ledger.write()
    lines = show(merge(store.run_dir)).splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100 and lines[-1] == "40 of 80 criteria hold."
    assert [int(line.split()[1]) for line in lines if "more, in the report" in line] == [40 - 23]
    assert max(map(len, show(merge(store.run_dir), width=60).splitlines())) <= 60
