"""The embedded language, a reduced retraining, and the committed assets: what they are, and that they are what they say."""

import hashlib
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.embedded.icl_tiny.language import BOS, OTHER_SEPARATOR, PAD, UNK, Language, build_tokenizer, corpus
from icl_lib.embedded.icl_tiny.pretrain import PretrainConfig, branch_noise, loss_fn, pretrain, residual_noise
from icl_lib.embedded.icl_tiny.retrain import SuiteConfig, hashes, retrain
from icl_lib.files.paths import root
from icl_lib.models import Site, load_config, load_model, load_tokenizer, tensor_shapes
from icl_lib.saes.formats import load_suite
from icl_lib.tasks import Role, make_prompts

ASSETS = root() / "assets" / "icl-tiny"
SMALL = PretrainConfig(
    n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_head=16, d_mlp=64, seq=40, batch=8, steps=30, residual_from=15, residual_ramp=10
)  # fmt: skip


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
