"""The store: exact round trips, provenance, and a clear refusal of everything missing, cut short or altered."""

import json

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from icl_lib.files import write
from icl_lib.files.paths import resolve, root
from icl_lib.runs import Store, StoreError
from icl_lib.runs import needs as needs_module
from icl_lib.runs import store as store_module


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run", {"model": "owner/model", "seed": 3})


def _data_file(store, name):
    return store.folder / json.loads((store.folder / f"{name}.json").read_text())["file"]


def test_arrays_come_back_exactly(store):
    arrays = {
        "f": np.linspace(0, 1, 7, dtype=np.float32),
        "i": jnp.arange(6).reshape(2, 3),
        "b": np.array([True, False]),
        "s": np.float32(2),
    }
    store.save("vectors", arrays, meta={"model": "m", "layer": np.int64(3), "l1": jnp.array([0.5])})
    loaded, meta = store.load("vectors")
    assert meta == {"model": "m", "layer": 3, "l1": [0.5]}
    assert set(loaded) == set(arrays)
    for key, x in arrays.items():
        np.testing.assert_array_equal(loaded[key], np.asarray(x))
        assert loaded[key].dtype == np.asarray(x).dtype


def test_bfloat16_is_kept_without_loss(store):
    x = jnp.array([1.0, 3.140625, -1e-20], jnp.bfloat16)
    store.save("v", {"x": x})
    back = store.load("v")[0]["x"]
    assert back.dtype == np.float32
    np.testing.assert_array_equal(jnp.asarray(back).astype(jnp.bfloat16), x)


def test_a_transposed_array_keeps_its_values(store):
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    store.save("v", {"x": x})
    np.testing.assert_array_equal(store.load("v")[0]["x"], x)


def test_tables_come_back(store):
    table = pd.DataFrame({"task": ["a", "b"], "nll": [0.5, 1.5], "n": [1, 2]})
    store.save_table("effects", table)
    pd.testing.assert_frame_equal(store.load_table("effects"), table)


def test_provenance_tells_parameters_code_inputs_and_device(store):
    store.save("first", {"x": np.ones(2, np.float32)})
    store.load("first")
    store.save("second", {"x": np.zeros(2, np.float32)})
    made = store.provenance("second")
    assert (
        made["params"] == {"model": "owner/model", "seed": 3}
        and made["device"]["platform"] == "cpu"
        and len(made["code"]["library"]) == 12
    )
    assert made["inputs"] == {"first": json.loads((store.folder / "first.json").read_text())["sha256"]}


def test_saving_again_replaces_and_leaves_no_other_files(store):
    store.save("v", {"x": np.ones(2, np.float32)})
    store.save("v", {"x": np.zeros(3, np.float32)})
    assert store.load("v")[0]["x"].shape == (3,)
    assert len(list(store.folder.iterdir())) == 2 and store.names() == ["v"]


@pytest.mark.parametrize("cut", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_data_file_cut_short_or_altered_is_named(store, cut):
    store.save("v", {"x": np.arange(100, dtype=np.float32)})
    path = _data_file(store, "v")
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(StoreError, match=f"{path.name} was cut short or altered.*papermill"):
        store.load("v")


def test_a_manifest_cut_short_is_named_and_can_be_replaced(store):
    store.save("v", {"x": np.ones(2, np.float32)})
    manifest = store.folder / "v.json"
    manifest.write_text(manifest.read_text()[:30])
    with pytest.raises(StoreError, match="v.json was cut short or altered"):
        store.load("v")
    store.save("v", {"x": np.zeros(2, np.float32)})
    assert store.load("v")[0]["x"].sum() == 0


def test_a_data_file_that_is_gone_is_named(store):
    store.save("v", {"x": np.ones(2, np.float32)})
    _data_file(store, "v").unlink()
    with pytest.raises(StoreError, match=r"v-\w+.safetensors was cut short"):
        store.load("v")


def test_an_interrupted_write_leaves_the_earlier_artefact(store, monkeypatch):
    store.save("v", {"x": np.ones(2, np.float32)})

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        store.save("v", {"x": np.zeros(9, np.float32)})
    monkeypatch.undo()
    np.testing.assert_array_equal(store.load("v")[0]["x"], np.ones(2))
    assert not list(store.folder.glob(".*"))


def test_a_crash_between_the_two_files_leaves_the_earlier_artefact(store, monkeypatch):
    store.save("v", {"x": np.ones(2, np.float32)})
    whole = store_module.write_bytes

    def data_only(path, data):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        whole(path, data)

    monkeypatch.setattr(store_module, "write_bytes", data_only)
    with pytest.raises(KeyboardInterrupt):
        store.save("v", {"x": np.zeros(9, np.float32)})
    np.testing.assert_array_equal(store.load("v")[0]["x"], np.ones(2))


def test_what_is_missing_names_the_nearest_and_the_command(store):
    store.save("task_vectors", {"x": np.ones(2, np.float32)})
    with pytest.raises(StoreError, match="no 'task_vector' \\(there is 'task_vectors'\\).*snakemake --configfile"):
        store.load("task_vector")


def test_what_is_missing_names_the_notebook_that_makes_it(store, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "02_maker.py").write_text(
        'store.save(\n    "task_vectors", {"v": v})\nstore.save_table("curve", t)\n'
    )
    for module in (store_module, needs_module):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    for name in ("task_vectors", "curve"):
        with pytest.raises(
            StoreError,
            match="notebooks/02_maker.ipynb makes it.*papermill notebooks/02_maker.ipynb run/notebooks/02_maker.ipynb",
        ):
            store.load(name)


@pytest.mark.parametrize(
    ("key", "made", "here"),
    [
        ("model", "a/a", "b/b"),
        ("saes", ["a/s"], ["a/t"]),
        ("sae_layers", [0, 1], [0]),
        ("sae_variant", "", "paper"),
        ("tasks", "embedded", "paper"),
        ("prefix", "Follow", "<turn>Follow"),
        ("seed", 0, 1),
        ("layer_executor", 4, 3),
    ],
)
def test_what_another_model_suite_or_card_made_is_refused(tmp_path, key, made, here):
    card = {"card": "one", "model": "a/a", "run_dir": "runs/one", "n_shots": 12}
    Store(tmp_path / "run", card | {key: made}).save("v", {"x": np.ones(2, np.float32)})
    reader = {"card": "two", "model": "a/a", "run_dir": "runs/two", "max_shots": 3}
    assert Store(tmp_path / "run", reader | {key: made}).load("v"), (
        "names of runs and what only one declares may differ"
    )
    with pytest.raises(StoreError) as err:
        Store(tmp_path / "run", reader | {key: here}).load("v")
    assert f"was made with {key} = {made!r}, but {here!r} is expected here" in str(err.value)
    assert "papermill notebooks/" in str(err.value)


def test_what_a_reader_expects_of_the_meta_data_is_held(store):
    store.save("v", {"x": np.ones(2, np.float32)}, meta={"tasks": ["a"]})
    assert store.load("v", expect={"tasks": ["a"]})[1] == {"tasks": ["a"]}
    with pytest.raises(StoreError, match="tasks = \\['a'\\], but \\['b'\\] is expected"):
        store.load("v", expect={"tasks": ["b"]})


def test_a_store_without_a_model_is_refused(tmp_path):
    with pytest.raises(StoreError, match="at least `model`"):
        Store(tmp_path / "run", {"seed": 3})


def test_a_table_is_not_read_as_arrays(store):
    store.save_table("t", pd.DataFrame({"a": [1]}))
    with pytest.raises(StoreError, match="use load_table"):
        store.load("t")


@pytest.mark.parametrize("name", ["../v", "a/b", "", ".v", "a b"])
def test_a_name_that_is_a_path_is_refused(store, name):
    with pytest.raises(StoreError, match="cannot name an artefact"):
        store.save(name, {"x": np.ones(1, np.float32)})


def test_what_cannot_be_kept_is_refused_before_anything_is_written(store):
    with pytest.raises(StoreError, match="'x' has dtype"):
        store.save("v", {"x": np.array(["a"])})
    with pytest.raises(StoreError, match="got object"):
        store.save("v", {"x": np.ones(1, np.float32)}, meta={"o": object()})
    assert store.names() == [] and not list(store.run_dir.rglob("*.*"))


def test_paths_count_from_the_repository_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Store("runs/x", {"model": "m"}).folder == root() / "runs" / "x" / "store"
    assert resolve("icl_lib") == str(root() / "icl_lib")
    assert resolve("google/gemma-2b") == "google/gemma-2b"


@pytest.mark.parametrize("key", ["model", "saes"])
def test_what_was_computed_from_other_files_at_the_same_place_is_refused(tmp_path, key):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(200_000))
    card = {"model": "owner/model", "saes": ["owner/suite"]} | {key: str(folder) if key == "model" else [str(folder)]}
    Store(tmp_path / "run", card).save("vectors", {"x": np.ones(2, np.float32)})
    assert Store(tmp_path / "run", card).load("vectors")
    (folder / "model.safetensors").write_bytes(bytes(199_999) + b"1")
    with pytest.raises(StoreError, match="held other files.*papermill"):
        Store(tmp_path / "run", card).load("vectors")
    if key == "saes":
        assert Store(tmp_path / "run", {"model": "owner/model"}).load("vectors"), "who reads no SAEs may read on"


def test_needs_are_read_from_the_notebooks(tmp_path, monkeypatch):
    assert needs_module.needs()["03_task_vector_cleaning"] == ["01_sparse_autoencoders", "02_task_vectors"]
    assert needs_module.needs()["04_executors"] == ["01_sparse_autoencoders", "03_task_vector_cleaning"]
    alone = {name[:2] for name, others in needs_module.needs().items() if not others}
    assert alone >= {"00", "01", "02", "06"}
    monkeypatch.setattr(needs_module, "root", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_a.py").write_text('store.save("v", {})\nstore.load("w")\n')
    with pytest.raises(ValueError, match="00_a loads w, which no notebook saves"):
        needs_module.needs()
    (tmp_path / "notebooks" / "01_b.py").write_text('store.save_table("v", {})\n')
    with pytest.raises(ValueError, match="00_a and 01_b both save 'v'"):
        needs_module.needs()
