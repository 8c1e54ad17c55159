"""Cards of suites: those of the repository, one run from a folder of text to a folder of SAEs, and cards that cannot
be.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_lib.cards.card import CardError
from icl_lib.commands import train
from icl_lib.commands.train import corpus, members, read_suite_card, recipe, run
from icl_lib.files.paths import root
from icl_lib.models import Site, Transformer, save_model, tiny_config
from icl_lib.saes import load_suite
from icl_lib.text.corpus import CorpusError
from icl_lib.training import Recipe, TrainingError, make_recipe
from icl_lib.training.objectives import OBJECTIVES, Batch

CONFIG = tiny_config()
WORDS = [f"w{i}" for i in range(CONFIG.d_vocab - 3)]


@pytest.mark.parametrize("path", sorted((root() / "params" / "suites").glob("*.yaml")), ids=lambda p: p.stem)
def test_cards_of_the_repository(path):
    card = read_suite_card(path)
    assert members(card, 6) and recipe(card).n_steps == card.steps
    assert card.run_dir == f"runs/suites/{path.stem}"


def test_the_papers_suite():
    """Every line of what the authors' paper and trainer say; where the two differ, the card says which is followed."""
    card = read_suite_card(root() / "params" / "suites" / "gemma-1-2b.yaml")
    suite, how = members(card, 18), recipe(card)
    assert (
        len(suite) == 54
        and {m.d_sae for m in suite} == {16 * 2048}
        and {m.site.name for m in suite} == {"resid_pre", "attn_out", "mlp_in"}
    )
    assert all(m.sparsity / 2048 == pytest.approx(8e-6 if m.site.name == "mlp_in" else 2e-5, rel=0.01) for m in suite)
    assert card.contexts * (card.context - 1) * card.steps // card.steps_per_pass == pytest.approx(150e6, rel=0.02)
    assert card.passes * card.contexts * (card.context - 1) == pytest.approx(65_536, rel=0.01)
    assert (card.model, card.text, card.context, card.dtype) == (
        "google/gemma-2b-it",
        "HuggingFaceFW/fineweb",
        128,
        "bfloat16",
    )
    assert how == Recipe(
        objective="icl-sfc",
        n_steps=150_000,
        batch_size=2048,
        learning_rate=1e-3,
        beta1=0.0,
        beta2=0.99,
        warmup=128,
        decay="cosine",
        period=300_000,
        sparsity_warmup=0,
        clip=1.0,
        norm_decay=0.99,
        dead_after=2000,
        dead_rate=5e-6,
        resample_every=0,
        unit_norm=False,
        k_aux=0,
        skip=False,
        dtype="bfloat16",
        centred_start=False,
        loss_scale=100.0,
    )
    rates = [float(how.rate(jnp.asarray(step))) for step in (0, 127, 149_999)]
    np.testing.assert_allclose(rates, [1e-3 / 128, 1e-3, 0.55e-3], rtol=1e-3)
    assert make_recipe("icl-sfc", n_steps=1000, batch_size=8).period == 100_000


def test_the_papers_start_and_scale():
    """Orthogonal encoder, its transpose with rows of norm 1, no biases, softplus(0); the loss is a mean over
    components, times 100.
    """
    how = make_recipe("icl-sfc", n_steps=10, batch_size=8, dtype="bfloat16")
    x = jax.random.normal(jax.random.key(1), (20, 16))
    p = OBJECTIVES["icl-sfc"].init(x, x, 64, how, key=jax.random.key(0))
    assert p.W_enc.dtype == p.W_dec.dtype == jnp.bfloat16 and p.b_enc.dtype == jnp.float32
    W_enc, W_dec = np.asarray(p.W_enc, np.float32), np.asarray(p.W_dec, np.float32)
    np.testing.assert_allclose(W_enc @ W_enc.T, np.eye(16), atol=0.02)
    np.testing.assert_allclose(W_dec, (W_enc / np.linalg.norm(W_enc, axis=0)).T, atol=0.01)
    assert not any(np.any(b) for b in (p.b_enc, p.b_mag, p.b_dec))
    np.testing.assert_allclose(np.exp(p.r_mag), np.log(2), rtol=1e-6)
    batch, recipes = Batch(x, x, jnp.float32(0.1)), (dataclasses.replace(how, loss_scale=s) for s in (0.0, 100.0))
    plain, scaled = (OBJECTIVES["icl-sfc"].loss(p, batch, r)[0] for r in recipes)
    assert float(scaled) == pytest.approx(float(plain) * 100 / 16, rel=1e-5)


def test_recipes_that_depend_on_the_run():
    assert make_recipe("standard", n_steps=2000, batch_size=8).sparsity_warmup == 100  # 5 %
    assert make_recipe("topk", n_steps=2000, batch_size=1000).dead_after == 10_000  # 10 million tokens
    assert make_recipe("topk", n_steps=2000, batch_size=1000, dead_after=7).dead_after == 7
    with pytest.raises(TrainingError, match="resample_every is not for topk, whose auxiliary loss"):
        make_recipe("topk", n_steps=1, batch_size=1, resample_every=5)
    with pytest.raises(TrainingError, match="icl-sfc has no skip matrix"):
        make_recipe("icl-sfc", n_steps=1, batch_size=1, skip=True)


@pytest.fixture
def card_file(tmp_path):
    """A card of a model folder with its tokenizer and a file of text; gives a function that writes it with changes."""
    save_model(Transformer.init(CONFIG, key=jax.random.key(0)), tmp_path / "model", dtype="float32")
    raw = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<eos>": 1, "<bos>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}, unk_token="<eos>"
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", pad_token="<pad>").save_pretrained(
        tmp_path / "model"
    )
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 30)) for _ in range(80)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    values = {
        "model": str(tmp_path / "model"),
        "text": str(tmp_path / "text.jsonl"),
        "context": 16,
        "run_dir": str(tmp_path / "run"),
        "sparsity": {"resid_pre": [0.01, 1]},
        "d_sae": [24, 32],
        "layers": [1],
        "recipe": "standard",
        "steps": 12,
        "batch_size": 32,
        "contexts": 4,
        "passes": 2,
        "steps_per_pass": 2,
        "held_out": 8,
        "changes": {"learning_rate": 1e-2},
    }

    def write(**changes):
        path = tmp_path / "card.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
        return path

    return write


def test_from_a_card_to_saes(card_file, monkeypatch, capsys):
    path = card_file()
    monkeypatch.setattr("sys.argv", ["train", str(path)])
    monkeypatch.setattr(train.devices, "setup", lambda run_dir: {})
    assert train.main() == 0
    out, folder = capsys.readouterr().out, path.parent / "run" / "saes"
    assert (
        "quality on 8 contexts held out:" in out
        and "ce_recovered_zero" in out
        and out.count("blocks.1.hook_resid_pre") == 4
    )
    for width in (24, 32):
        for value in ("0.01", "1"):
            sae = load_suite(folder / f"d_sae_{width}_sparsity_{value}")[Site("resid_pre", 1)]
            assert (sae.architecture, sae.d_sae, sae.d_in) == ("standard", width, CONFIG.d_model)
            assert dict(sae.metadata)["context_size"] == 16 and dict(sae.metadata)["sparsity"] == float(value)
    quality = pd.read_parquet(folder.parent / "quality.parquet")
    assert quality[["d_sae", "sparsity"]].values.tolist() == [[24, 0.01], [24, 1], [32, 0.01], [32, 1]]
    assert (quality.l0.values[::2] > quality.l0.values[1::2]).all() and quality.fvu.notna().all()


def test_a_data_set_is_pinned(card_file, monkeypatch):
    asked = {}

    def load(where, **options):
        asked.update(options, where=where)
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "w1 w2 w3"}]))

    monkeypatch.setattr("datasets.load_dataset", load)
    text = corpus(read_suite_card(card_file(text="owner/texts", subset="some", text_revision="abc")), 2)
    assert (asked["where"], asked["revision"]) == ("owner/texts", "abc") and text.describe()[
        "corpus"
    ] == "owner/texts (some, abc)"


def test_cards_that_cannot_be(card_file):
    with pytest.raises(CardError, match=r"(?s)`contxt`: Extra inputs.*the keys of a suite's card are model, revision"):
        read_suite_card(card_file(contxt=16))
    with pytest.raises(CardError, match=r"`steps`: .*valid integer.*got '12'"):
        read_suite_card(card_file(steps="12"))
    with pytest.raises(CardError, match="`text`: Field required"):
        read_suite_card(card_file(text=None))
    with pytest.raises(CardError, match="`recipe`: must be one of batchtopk, .*got 'top-k'"):
        read_suite_card(card_file(recipe="top-k"))
    with pytest.raises(ValueError, match="unknown site 'resid'; did you mean 'resid_mid'|unknown site 'resid'"):
        run(read_suite_card(card_file(sparsity={"resid": [0.1]})))
    with pytest.raises(ValueError, match="layer of the card must be in 0..1"):
        run(read_suite_card(card_file(layers=[2])))
    with pytest.raises(ValueError, match="a recipe has no rate; it has"):
        run(read_suite_card(card_file(changes={"rate": 0.1})))
    with pytest.raises(
        CorpusError, match=r"text.jsonl has no column of text named 'body'; its columns are text \(str\)"
    ):
        run(read_suite_card(card_file(text_column="body")))
    with pytest.raises(
        CorpusError,
        match="text.jsonl ended after .* needed next .read 1 time.; there is no checkpoint yet: .*more epochs",
    ):
        run(read_suite_card(card_file(steps=10_000)))
    with pytest.raises(CardError, match="`devices_per_model`: Input should be greater than 0"):
        read_suite_card(card_file(devices_per_model=0))
    with pytest.raises(CardError, match=r"`devices_per_model`: 2 does not divide the 1 cpu device"):
        run(read_suite_card(card_file(devices_per_model=2)))


def test_a_broken_text_ends_the_command_with_one_line(card_file, monkeypatch, capsys):
    path = card_file()
    with open(path.parent / "text.jsonl", "a") as file:
        file.write('{"text": "w1\n')
    monkeypatch.setattr("sys.argv", ["train", str(path)])
    monkeypatch.setattr(train.devices, "setup", lambda run_dir: {})
    assert train.main() == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"\S+text.jsonl cannot be read: JSON parse error: .*\n", captured.err), captured.err


def test_a_model_divided_over_two_devices(card_file):
    """Each holds half of the model and half of every SAE, in a process of its own where the CPU plays two devices."""
    sizes = dict(steps=4, sparsity={"resid_pre": [0.1]}, d_sae=[24], held_out=4)
    run(read_suite_card(card_file(**sizes)))
    path = card_file(**sizes, devices_per_model=2, run_dir=str(card_file().parent / "divided"))
    flags = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"
    )
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_suite(path.parent / name / "saes")[Site("resid_pre", 1)] for name in ("run", "divided"))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=1e-4, err_msg=name)
    one, two = (pd.read_parquet(path.parent / name / "quality.parquet") for name in ("run", "divided"))
    np.testing.assert_allclose(one[["l0", "fvu", "ce_sae"]], two[["l0", "fvu", "ce_sae"]], rtol=0.02)


def run_divided(path: str) -> None:
    card = read_suite_card(path)
    of_model, of_saes = train.meshes(card)
    assert dict(of_model.shape) == {"data": 1, "model": 2} and dict(of_saes.shape) == {"sae": 2}
    run(card)


if __name__ == "__main__":
    run_divided(sys.argv[1])
