"""Cards held to their models without a network, and run on small stand-ins of them."""

import hashlib
import os
import shutil
import subprocess
from random import Random

import equinox as eqx
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

from icl_lib import figures
from icl_lib.cards.checks import defaults_of, full_card
from icl_lib.commands import rehearse as command
from icl_lib.embedded import entry
from icl_lib.features import activation_mass
from icl_lib.files.paths import root
from icl_lib.models import Site, load_model, load_tokenizer, run_with_cache
from icl_lib.models.families import known_config
from icl_lib.planning import rehearse, workload
from icl_lib.planning.dictionaries import dictionaries, sites_of
from icl_lib.planning.stand_in import small_config, small_tokenizer
from icl_lib.saes import load_suite
from icl_lib.saes.formats import gemma_scope
from icl_lib.saes.formats.suites import has_layer, layers_of, with_layer
from icl_lib.tasks import Role, Template, load_tasks, make_prompts
from icl_lib.tasks.tasks import DATA_VARIABLE, POOLS

CARDS = [path.stem for path in rehearse.cards()]
TASK_DATA = root().parent / "shared" / "data"  # where a checkout comes with the published tasks
CHAIN = ("02_task_vectors", "03_task_vector_cleaning", "04_executors", "05_detectors")
OTHERS = ("00_a_model_that_learns_in_context", "01_sparse_autoencoders", "06_sparse_feature_circuits")
each_card = pytest.mark.parametrize("name", CARDS)


@pytest.fixture(autouse=True)
def published_tasks(monkeypatch):
    """The papers' tasks where they are at hand; the embedded ones serve elsewhere."""
    if DATA_VARIABLE not in os.environ and (TASK_DATA / "icl_task_vectors").is_dir():
        monkeypatch.setenv(DATA_VARIABLE, str(TASK_DATA))


def _card(name):
    return defaults_of(full_card(root() / "params" / f"{name}.yaml"))


def _served(card, n_layers):
    """The sites that the card's SAEs read, the residual behind a block as the input of the next."""
    found = set()
    for pattern in card["saes"]:
        for layer in layers_of(pattern, card["sae_layers"]):
            site = sites_of(pattern, layer)[0][0]
            after = site.name == "resid_post" and site.layer + 1 < n_layers
            found.add(Site("resid_pre", site.layer + 1) if after else site)
    return found


def test_all_eight_models_have_a_card():
    asked = {
        "gemma-1-2b",
        "gemma-1-2b-it",
        "gemma-2-2b-16k",
        "gemma-2-2b-65k",
        "gemma-2-9b",
        "phi-3-mini",
        "qwen2.5-0.5b",
        "pythia-70m",
    }
    assert asked <= set(CARDS)
    assert all(_card(name)["card"] == name for name in CARDS)


@each_card
def test_the_layers_of_a_card_are_its_models_and_have_saes(name):
    card = _card(name)
    config = known_config(card["model"])
    served = _served(card, config.n_layers)
    assert all(0 <= site.layer < config.n_layers for site in served)
    assert {Site("resid_pre", card["layer_executor"]), Site("resid_pre", card["layer_detector"])} <= served
    assert card["layer_detector"] < card["layer_executor"]
    assert set(card["circuit_layers"]) <= {site.layer for site in served}


@each_card
def test_the_saes_of_a_card_can_be_resolved(name):
    card = _card(name)
    for pattern in card["saes"]:
        for layer in card["sae_layers"] if pattern.endswith("canonical") else []:
            assert "average_l0_" in gemma_scope.resolve(with_layer(pattern, layer))


@each_card
def test_the_prompts_of_a_card_fit_its_models_context(name):
    card = _card(name)
    shots = max(card["n_shots"], card["max_shots"], card["circuit_shots"])
    assert (shots + 2) * workload.PAIR_TOKENS[card["tasks"]] < known_config(card["model"]).n_ctx


SMALLEST_POOL = 33  # 30 % of the 110 pairs of present_simple_past_perfect


def test_every_pool_of_every_task_has_examples_for_the_cards_prompts():
    smallest = SMALLEST_POOL
    if os.environ.get(DATA_VARIABLE):  # the published tasks are at hand
        smallest = min(len({x for x, _ in task.pool(use)}) for task in load_tasks("paper").values() for use in POOLS)
        assert smallest == SMALLEST_POOL
    for name in CARDS:
        assert max(_card(name)[key] for key in ("n_shots", "max_shots", "circuit_shots")) < smallest, name


@each_card
def test_small_layers_stay_apart_and_in_order(name):
    card = _card(name)
    keys, n = rehearse.small_layers(card, known_config(card["model"]).n_layers)
    assert 0 <= keys["layer_detector"] < keys["layer_executor"] < n <= rehearse.MOST_LAYERS + 1
    for key in ("circuit_layers", "sae_layers"):
        assert keys[key] == sorted(set(keys[key])) and keys[key][-1] < n
    assert len(keys["circuit_layers"]) == min(
        3, len({card["circuit_layers"][0], card["layer_executor"], card["circuit_layers"][-1]})
    )
    small = card | keys
    assert {Site("resid_pre", small["layer_executor"]), Site("resid_pre", small["layer_detector"])} <= _served(small, n)


def test_layers_map_in_proportion_and_neighbours_stay_neighbours():
    card = _card("gemma-2-2b-16k") | {"layer_executor": 17, "layer_detector": 16, "circuit_layers": [0, 17, 25]}
    keys, n = rehearse.small_layers(card, 26)
    assert (n, keys["layer_detector"], keys["layer_executor"], keys["circuit_layers"]) == (7, 4, 5, [0, 5, 6])
    phi, _ = rehearse.small_layers(_card("phi-3-mini"), 32)
    assert (phi["layer_detector"], phi["layer_executor"]) == (2, 4), "four layers lie between them in the model"


def test_a_range_of_layers_is_mapped_too():
    card = _card("gemma-1-2b-it")
    keys, _ = rehearse.small_layers(card, 18)
    ranged = next(pattern for pattern in keys["saes"] if "transcoder" in pattern)
    assert layers_of(ranged, keys["sae_layers"]) == keys["sae_layers"][:-1] and has_layer(ranged)
    assert all(layers_of(p, keys["sae_layers"]) == keys["sae_layers"] for p in keys["saes"] if p != ranged)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "phi3", "gpt_neox", "qwen2", "llama"])
def test_a_small_tokenizer_is_of_its_familys_kind(family):
    tasks = load_tasks("embedded")
    lines = [f"{x} -> {y}\n" for x, y in tasks["antonyms"].pairs]
    tokenizer = small_tokenizer(family, lines)
    turn = {"gemma": "<start_of_turn>", "gemma2": "<start_of_turn>", "phi3": "<|user|>"}.get(family, "")
    prompts = make_prompts(
        tasks["en_es"],
        tokenizer,
        n_prompts=2,
        n_shots=2,
        seed=0,
        template=Template(prefix=f"{turn}\nFollow the pattern:\n"),
    )
    assert int((prompts.mask(Role.ARROW, "last")).sum()) == 2 * 3
    if turn:
        assert tokenizer.convert_tokens_to_ids(turn) in prompts.tokens[0].tolist(), "the turn is one special token"
    assert (tokenizer.bos_token is None) == (family == "qwen2")
    text = prompts.texts[0].removeprefix(turn)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_small_config_keeps_what_makes_its_model():
    lines = ["a -> b\n"]
    for name in ("google/gemma-2-9b", "EleutherAI/pythia-70m-deduped", "microsoft/Phi-3-mini-4k-instruct"):
        config = known_config(name)
        small = small_config(config, 4, small_tokenizer(config.family, lines))
        assert (small.family, small.norm, small.parallel, small.tied) == (
            config.family,
            config.norm,
            config.parallel,
            config.tied,
        )
        assert (small.windows is None) == (config.windows is None) and (small.attn_scale is None) == (
            config.attn_scale is None
        )
        assert (small.width("z") == small.d_model) == (config.width("z") == config.d_model)
    pythia = small_config(known_config("EleutherAI/pythia-70m-deduped"), 4, small_tokenizer("gpt_neox", lines))
    assert pythia.rotary_dim == pythia.d_head // 4


# one of each family and set of formats; the other two differ from these in numbers only
@pytest.mark.parametrize("name", sorted(set(CARDS) - {"gemma-1-2b", "gemma-2-2b-65k"}))
def test_a_stand_in_goes_through_the_code_of_its_card(name, tmp_path):
    """Model, tokenizer and SAEs are read back by the readers of the real files, at the sites that the card counts
    on."""
    card = _card(name)
    small = yaml.safe_load(rehearse.prepare(card, tmp_path / name).read_text())
    assert set(small) == set(card), "a rehearsal sets the same keys"
    model, tokenizer = load_model(small["model"]), load_tokenizer(small["model"])
    assert model.config.family == known_config(card["model"]).family
    suite = load_suite(small["saes"], model.config, small["sae_layers"])
    assert len(suite) == len(dictionaries(small, model.config))
    tasks = load_tasks(small["tasks"])
    task = Random(0).choice(list(tasks.values()))
    prompts = make_prompts(
        task, tokenizer, n_prompts=2, n_shots=small["n_shots"], seed=0, template=Template(prefix=small["prefix"])
    )
    _, cache = run_with_cache(model, prompts.tokens, suite)
    for site, sae in suite.items():
        fires = (sae.encode(cache[site]) > 0).mean()
        assert 0.02 < float(fires) < 0.4, f"{site}: {fires}"
        assert jnp.isfinite(sae(cache[site])).all()


def test_a_rehearsal_that_fails_says_where(tmp_path):
    small = rehearse.prepare(_card("phi-3-mini"), tmp_path / "card")
    shutil.rmtree(yaml.safe_load(small.read_text())["model"])
    good, text = rehearse.run(small, ["02_task_vectors"])
    assert not good and "does not exist" in text


def test_unknown_cards_have_status_2(capsys):
    assert command.main(["gemma-7"]) == 2
    assert "no card at" in capsys.readouterr().err


def test_without_a_card_those_there_are_are_named(capsys):
    for argv in ([], [str(root() / "params" / "tiny.yaml")]):
        assert command.main(argv) == 2
        said = capsys.readouterr().err
        assert all(name in said for name in ("make rehearse CARD=", *CARDS)), argv


def test_the_embedded_models_card_is_known_by_its_model():
    known = [entry(model) is not None for model in ("icl-tiny", "assets/icl-tiny", "google/gemma-2b")]
    assert known == [True, True, False]
    assert "tiny" not in CARDS and all(entry(_card(name)["model"]) is None for name in CARDS)


def test_sites_of_names_are_those_of_the_formats_readers():
    layer_3 = lambda a, b: [(Site(a, 3), Site(b, 3))]
    assert sites_of("google/gemma-scope-2b-pt-att/layer_{layer}/width_16k/canonical", 3) == layer_3("z", "z")
    # a repository whose name holds the words of another kind
    named = sites_of("someone/transcoder-attempts/resid_out_layer{layer}/10_512", 3)
    assert named == layer_3("resid_post", "resid_post")
    assert sites_of("nev/gemma-2b-saex-test/it-l{layer:1-16}-transcoder-test-run-1-8.00E-06", 3) == layer_3(
        "mlp_in", "mlp_out"
    )
    assert [site.kind for site, _ in sites_of("runs/suites/some/saes", 3)] == ["residual", "attention", "transcoder"]
    with pytest.raises(ValueError, match="does not say where"):
        sites_of("someone/saes/{layer}", 3)


def test_executors_that_never_fire_have_no_mass_and_are_drawn():
    """A card may meet such prompts: nothing is divided by, and the figure shows the shares as missing."""
    from tests.planted import N_TASKS, planted_model, planted_sae, planted_stack

    sae = planted_sae(1)
    silent = eqx.tree_at(lambda s: s.threshold, sae, jnp.full(sae.threshold.shape, jnp.inf))
    mass = activation_mass(planted_model(), silent, planted_stack(2, 2), np.arange(N_TASKS))
    assert np.isnan(mass.mass).all() and np.isnan(mass.mean).all() and not mass.total.any()
    figures.role_mass(mass.mass, [str(latent) for latent in mass.latents], list(Role))
    plt.close("all")


def _turn() -> tuple[int, str]:
    """A number that is the same for the same sources, and what it was taken from: the commit, or the sources where
    there is no git."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root(), capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout, 16), f"commit {done.stdout[:12]}"
    sources = sorted(path for part in ("icl_lib", "notebooks") for path in (root() / part).rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return int(digest, 16), f"sources {digest[:12]}"


def test_a_card_is_rehearsed_by_turns(tmp_path):
    """One card, 04 with what it needs at one commit and the other notebooks at another (all of all cards: `make
    rehearse-all`)."""
    number, taken_from = _turn()
    turn = number % (2 * len(CARDS))
    name, notebooks = CARDS[turn // 2], (CHAIN[-1:], OTHERS)[turn % 2]
    chosen = f"{name}, {' '.join(notebooks)}, by {taken_from}"
    print(chosen)
    sizes = {"n_shots": 2, "n_prompts": 2, "max_shots": 2, "effect_prompts": 2, "circuit_shots": 2}
    small = rehearse.prepare(_card(name), tmp_path / name, **sizes)
    good, text = rehearse.run(small, notebooks)
    assert good, f"{chosen}: {text[-3000:]}"
    written = {path.stem for path in (tmp_path / name / "run" / "ledger").glob("*.json")}
    assert written >= set((CHAIN, OTHERS)[turn % 2]), f"{chosen}: {text[-3000:]}"
