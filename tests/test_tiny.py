"""The embedded language, a reduced retraining, and the committed assets: what they are, and that they are what they
say.
"""

import hashlib
import json
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib import embedded
from icl_lib.embedded.icl_tiny.language import BOS, OTHER_SEPARATOR, PAD, UNK, Language, build_tokenizer, corpus
from icl_lib.embedded.icl_tiny.pretrain import PretrainConfig, branch_noise, loss_fn, pretrain, residual_noise
from icl_lib.embedded.icl_tiny.retrain import SuiteConfig, hashes, retrain
from icl_lib.files.paths import root
from icl_lib.models import Site, load_config, load_model, load_tokenizer, tensor_shapes
from icl_lib.saes.formats import load_suite
from icl_lib.tasks import Role, make_prompts
from icl_lib.text.tokens import token_windows

ASSETS = root() / "assets" / "icl-tiny"
SMALL = PretrainConfig(
    n_layers=2,
    d_model=32,
    n_heads=2,
    n_kv_heads=1,
    d_head=16,
    d_mlp=64,
    seq=40,
    batch=8,
    steps=30,
    residual_from=15,
    residual_ramp=10,
)


@pytest.fixture(scope="module")
def language():
    return Language()


@pytest.fixture(scope="module")
def tokenizer(language):
    return build_tokenizer(language)


def test_every_word_of_the_language_is_a_token(language, tokenizer):
    tokens = corpus(language, tokenizer, n_rows=300, seq=80, seed=3)
    assert (tokens[:, 0] == BOS).all()
    assert (tokens != UNK).all()
    assert (tokens == PAD).mean() < 0.01  # rows are full


def test_corpus_is_the_same_for_the_same_seed(language, tokenizer):
    first, again, other = (corpus(language, tokenizer, n_rows=20, seq=40, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_prompts_state_pairs_of_one_or_two_tasks(language):
    rng = random.Random(0)
    known = {f"{x} -> {y}" for task in language.tasks.values() for x, y in task.pairs} | {"X -> Y"}
    both = 0
    for _ in range(200):
        lines = language.prompt(rng, 6).split("\n")[1:]
        both += any(OTHER_SEPARATOR in line for line in lines)
        assert {line.replace(OTHER_SEPARATOR, " -> ") for line in lines} <= known
    assert 50 < both < 150  # about half are interleaved


def test_every_task_shares_inputs_with_another(language):
    assert len(language.tasks) >= 23
    for name, neighbours in language.neighbours.items():
        assert neighbours, f"{name} would not be ambiguous without examples"


def test_branch_noise_scales_branches_only(getkey):
    tap = branch_noise(0.5, getkey())
    x = jnp.ones((2, 3, 4))
    np.testing.assert_array_equal(tap(Site("resid_pre", 0), x), x)
    noisy = np.asarray(tap(Site("mlp_out", 0), x))
    assert noisy.min() >= 0.5 and noisy.max() <= 1.5 and noisy.std() > 0
    np.testing.assert_allclose(noisy, np.broadcast_to(noisy[..., :1], noisy.shape), rtol=1e-6)  # one factor a token
    assert np.abs(noisy - np.asarray(tap(Site("attn_out", 0), x))).max() > 0


def test_residual_noise_changes_one_layer_of_a_row_along_it_and_its_token(getkey):
    config = PretrainConfig(n_layers=4, d_model=16).model(d_vocab=5)
    tokens = jnp.asarray([[0, 1, 2, 1], [0, 3, 1, 4], [0, 2, 2, 3]] * 4)
    x = jax.random.normal(getkey(), (*tokens.shape, 16))
    key = getkey()
    moved = []
    for layer in range(4):
        site = Site("resid_pre", layer)
        np.testing.assert_array_equal(residual_noise(jnp.float32(0), tokens, config, key)(site, x), x)
        change = np.asarray(residual_noise(jnp.float32(1), tokens, config, key)(site, x) - x)
        moved.append(np.abs(change).max(axis=(1, 2)) > 0)
        for row, t in zip(*np.nonzero(np.abs(change).max(axis=-1)), strict=True):
            mean = np.asarray(x)[np.asarray(tokens) == int(tokens[row, t])].mean(axis=0)
            basis = np.stack([np.asarray(x[row, t]), mean], axis=1)
            weights, *_ = np.linalg.lstsq(basis, change[row, t])
            np.testing.assert_allclose(basis @ weights, change[row, t], atol=1e-5)
            assert -0.2 <= weights.sum() <= 2.2
    assert not moved[0].any() and (np.sum(moved, axis=0) == 1).all()


def test_pretraining_is_deterministic_and_learns(language, tokenizer):
    tokens = corpus(language, tokenizer, n_rows=SMALL.steps * SMALL.batch, seq=SMALL.seq, seed=0)
    runs = [pretrain(SMALL, tokens, tokenizer.get_vocab_size(), chunk=10, progress=lambda line: None) for _ in range(2)]
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    losses = runs[0][1]
    assert losses.shape == (30,) and losses[-5:].mean() < losses[0] - 0.5


def test_too_few_rows_stop_before_training(language, tokenizer):
    with pytest.raises(ValueError, match="240 rows, got 10"):
        pretrain(SMALL, np.zeros((10, 40), np.int32), 100)


def test_nan_stops_with_its_step(monkeypatch):
    rows = np.ones((SMALL.steps * SMALL.batch, SMALL.seq), np.int32)
    monkeypatch.setattr(
        "icl_lib.embedded.icl_tiny.pretrain.loss_fn",
        lambda model, tokens, tap: loss_fn(model, tokens, tap) * np.float32(np.nan),
    )
    with pytest.raises(FloatingPointError, match="step 0"):
        pretrain(SMALL, rows, 64, chunk=10, progress=lambda line: None)


def test_retraining_at_reduced_size_writes_a_whole_model_folder(tmp_path):
    suite = SuiteConfig(d_sae=64, n_rows=40, steps=20, batch=128, resid_pre=0.05)
    made = retrain(tmp_path, SMALL, suite, progress=lambda line: None)
    assert made["sha256"] == hashes(tmp_path) == json.loads((tmp_path / "made.json").read_text())["sha256"]
    model = load_model(tmp_path)
    assert set(load_suite(tmp_path / "saes", model.config)) == {
        Site(n, i) for n in ("resid_pre", "attn_out", "mlp_in") for i in (0, 1)
    }
    prompts = make_prompts(Language().tasks["antonyms"], load_tokenizer(tmp_path), n_prompts=2, n_shots=2, seed=0)
    assert np.isfinite(np.asarray(model(prompts.tokens))).all()
    assert (np.asarray(prompts.roles) == Role.ARROW).sum() == 6


def test_committed_files_are_those_that_were_made():
    made = json.loads((ASSETS / "made.json").read_text())
    found = {name: hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() for name in made["sha256"]}
    assert found == made["sha256"]
    assert set(found) == set(hashes(ASSETS)), "a file of the assets is not in made.json"
    assert made["command"] == "python -m icl_lib.commands.retrain"


def test_committed_settings_are_the_defaults():
    made = json.loads((ASSETS / "made.json").read_text())
    assert made["pretrain"] == json.loads(json.dumps(PretrainConfig().__dict__))
    assert made["suite"] == json.loads(json.dumps(SuiteConfig().__dict__))


def test_committed_tokenizer_is_that_of_the_language(tokenizer):
    assert json.loads((ASSETS / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())
    assert load_config(ASSETS).d_vocab == tokenizer.get_vocab_size()


def test_assets_are_small_and_complete():
    assert sum(p.stat().st_size for p in (ASSETS.parent).rglob("*") if p.is_file()) <= 20e6
    config = load_config(ASSETS)
    parameters = sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())
    assert 1.5e6 <= parameters <= 3e6
    suite = load_suite(ASSETS / "saes", config)
    assert len(suite) == 3 * config.n_layers and {sae.d_sae for sae in suite.values()} == {1024}


def _ledger(notebook, entries, **changes):
    """A ledger as `check_claims` reads it, by the parameters of the embedded model's card with changes."""
    recorded = {key: {"ours": ours, "holds": holds, "criterion": "-"} for key, (ours, holds) in entries.items()}
    return types.SimpleNamespace(notebook=notebook, entries=recorded, card={"model": "icl-tiny", "seed": 0} | changes)


def test_what_is_claimed_of_the_embedded_model_is_held_to_its_bars():
    entries = {
        "executors": ("24 of 28", True),
        "executor_mass": (95.2, True),
        "column_of_one_task": (0.4, False),  # recorded, and not claimed
    }
    name = "04_executors"
    embedded.check_claims("icl-tiny", _ledger(name, entries))
    embedded.check_claims(ASSETS, _ledger(name, entries, model=str(ASSETS)))
    for key, ours in {"executors": "21 of 28", "executor_mass": 74.0}.items():
        with pytest.raises(AssertionError, match=f"do not hold of icl-tiny: {key} is"):
            embedded.check_claims("icl-tiny", _ledger(name, entries | {key: (ours, True)}))
    links = {"detector_mass": (99.9, True), "links": ([0.43, 0.12], True)}
    embedded.check_claims("icl-tiny", _ledger("05_detectors", links))
    for key, ours in {"links": [0.3, 0.12], "detector_mass": None}.items():
        with pytest.raises(AssertionError, match=f"do not hold of icl-tiny: {key} is"):
            embedded.check_claims("icl-tiny", _ledger("05_detectors", links | {key: (ours, True)}))
    with pytest.raises(AssertionError, match="executors: -, ours is 0.857"):
        embedded.check_claims("icl-tiny", _ledger(name, entries | {"executors": ("24 of 28", False)}))
    with pytest.raises(AssertionError, match="executor_mass is not recorded"):
        embedded.check_claims("icl-tiny", _ledger(name, {"executors": entries["executors"]}))
    few = _ledger("03_task_vector_cleaning", {
        "tvc_l0": (1.9, True), "encoded_l0": (8.3, True), "tvc_nll": (0.4, True), "beats_ito_at_equal_l0": (0.9, True)
    })  # fmt: skip
    embedded.check_claims("icl-tiny", few)
    few.entries["tvc_l0"]["ours"] = 2.6
    with pytest.raises(AssertionError, match="tvc_l0 is 2.6, claimed is -inf to 2.49"):
        embedded.check_claims("icl-tiny", few)


def test_other_models_and_other_cards_only_record_verdicts():
    bad = {"executors": ("0 of 28", False)}
    embedded.check_claims("google/gemma-2b", _ledger("04_executors", bad, model="google/gemma-2b"))
    embedded.check_claims("icl-tiny", _ledger("04_executors", bad, layer_executor=1))
    embedded.check_claims("icl-tiny", _ledger("09_another", bad))
    assert embedded.entry("google/gemma-2b") is None and embedded.entry("assets/icl-tiny").name == "icl-tiny"


def test_every_claim_is_of_a_notebook_that_records_the_key():
    for one in embedded.CATALOGUE.values():
        assert (one.model / "config.json").is_file() and one.losses.is_file() and (root() / one.card).is_file()
        for notebook, claims in one.claims.items():
            source = (root() / "notebooks" / f"{notebook}.py").read_text()
            assert not [key for key in claims if key.removesuffix("_best_layer") not in source], notebook


def test_the_text_of_a_card_is_the_models_language_or_a_file(language, tokenizer, tmp_path):
    loaded = load_tokenizer("icl-tiny")
    rows = embedded.open_corpus("icl-tiny", loaded, 80, bos_id=BOS)
    held_out = corpus(language, tokenizer, n_rows=30, seq=80, seed=1_000_003)
    np.testing.assert_array_equal(rows.held_out(30), held_out)
    np.testing.assert_array_equal(rows.training(7, 1), corpus(language, tokenizer, n_rows=7, seq=80, seed=1))
    follow = tokenizer.encode("Follow", add_special_tokens=False).ids[0]
    np.testing.assert_array_equal(rows.plain(30), held_out[held_out[:, 1] != follow])
    windows = token_windows([Language().text(random.Random(3), 40)], loaded, 32, BOS)
    np.testing.assert_array_equal(rows.stretches(4, 3), windows)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"the capital of Greece is Athens . {'we saw the old house ' * i}" for i in range(60))
    )
    read = embedded.open_corpus(str(tmp_path / "text.txt"), loaded, 16, bos_id=BOS, kept=5)
    whole = read.held_out(9)
    np.testing.assert_array_equal(read.plain(5), whole[:5])
    np.testing.assert_array_equal(read.stretches(9, 0), whole)
    np.testing.assert_array_equal(read.training(4, 1), whole[5:])
    everything = read.plain(1000)
    assert 9 < len(everything) < 1000, "a short text gives what it has"
    np.testing.assert_array_equal(everything[:9], whole)
    with pytest.raises(ValueError, match="'icl-tiny' is in the 1316 tokens of that model, and this tokenizer has 3"):
        embedded.open_corpus("icl-tiny", ["a", "b", "c"], 80, bos_id=BOS)
