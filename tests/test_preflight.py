"""Preflight: devices as they are written, what fits and what does not, and its figures against the compiler and a real
process."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from icl_lib import circuits
from icl_lib.cards.card import CardError
from icl_lib.cards.checks import config_of, defaults_of, full_card
from icl_lib.circuits.cost import ablation_cost, node_effects_cost
from icl_lib.commands import preflight as command
from icl_lib.files.paths import root
from icl_lib.models import Site, tiny_config
from icl_lib.models.cost import BUDGET, Part, fitting, lane_bytes, token_flops, turn
from icl_lib.models.families import FAMILIES, known_config
from icl_lib.models.tensors import abstract, n_params
from icl_lib.planning import preflight
from icl_lib.planning.dictionaries import dictionaries
from icl_lib.planning.hardware import KINDS, parse_devices, present, with_own_memory
from icl_lib.planning.workload import n_tasks, steps
from icl_lib.saes import SAE
from icl_lib.saes.cost import Dictionary
from icl_lib.tasks import Role, pair_logprob
from icl_lib.vectors import cut
from icl_lib.vectors.cost import ANSWER_TOKENS
from tests.planted import planted_prompts

CARDS = sorted(p for p in (root() / "params").glob("*.yaml"))


def _card(name="gemma-2-9b", **changes):
    return defaults_of(full_card(root() / "params" / f"{name}.yaml")) | changes


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [
        ("h100", "h100", 1),
        ("8xv5e", "v5e", 8),
        ("v5e-8", "v5e", 8),
        ("v4-8", "v4", 4),
        ("V5p-16", "v5p", 8),
        ("cpu", "cpu", 1),
    ],
)
def test_devices_are_read_as_people_write_them(text, kind, count):
    devices = parse_devices(text)
    assert (devices.kind, devices.count) == (kind, count)
    assert devices.memory > 1e9 and devices.flops > 1e9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h10", "did you mean 'h100'"),
        ("8 v5e", "written like"),
        ("v4-7", "must be even"),
        ("0xh100", "1 or more"),
        ("2xv4-8", "written like"),
    ],
)
def test_other_devices_are_refused_with_a_hint(text, words):
    with pytest.raises(ValueError, match=words):
        parse_devices(text)


def devices_here(monkeypatch, kind, platform="gpu", bytes_limit=None, count=1):
    """JAX as it would be on a machine with these devices."""
    stats = None if bytes_limit is None else {"bytes_limit": bytes_limit}
    found = [SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)] * count
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: found)


@pytest.mark.parametrize(
    ("kind", "is_a"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("cpu", "cpu"),
    ],
)
def test_devices_are_known_by_jaxs_names(kind, is_a, monkeypatch):
    devices_here(monkeypatch, kind)
    assert [name for name in KINDS if present(parse_devices(name))] == ([] if is_a is None else [is_a])
    assert is_a is None or not present(parse_devices(f"2x{is_a}"))


def test_devices_that_are_present_have_their_own_memory(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    devices_here(monkeypatch, "NVIDIA A100-SXM4-40GB", bytes_limit=int(0.75 * 42e9))
    small = with_own_memory(parse_devices("a100"))
    assert small.memory == pytest.approx(0.92 * 42e9) and small.flops == parse_devices("a100").flops
    monkeypatch.setattr(preflight, "measured", lambda cost, *_: cost)
    assert preflight.estimate(_card(), parse_devices("a100")).devices == small
    assert preflight.estimate(_card(), parse_devices("h100")).devices == parse_devices("h100")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # the notebooks will have no more
    devices_here(monkeypatch, "NVIDIA A100-SXM4-40GB", bytes_limit=int(21e9))
    assert with_own_memory(parse_devices("a100")).memory == int(21e9)
    devices_here(monkeypatch, "TPU v5 lite", "tpu", bytes_limit=int(16.9e9))
    assert with_own_memory(parse_devices("v5e")).memory == int(16.9e9)
    devices_here(monkeypatch, "cpu", "cpu")
    cpu = parse_devices("cpu")
    assert with_own_memory(cpu) == cpu


def test_a_download_that_broke_off_is_still_to_come(tmp_path, monkeypatch):
    here = {}
    monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda model, name: here.get(name))
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    for name, complete in [
        ("config.json", False),
        ("model.safetensors.index.json", False),
        ("1.safetensors", False),
        ("2.safetensors", True),
    ]:
        here[name] = str(index)
        assert preflight._downloaded("google/gemma-2-9b") == complete
    here = {"config.json": "", "model.safetensors": ""}
    assert preflight._downloaded("google/gemma-2b") and preflight._downloaded("assets/icl-tiny")


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_every_card_fits_on_one_large_card_and_its_parameters_are_the_models(path, capsys):
    assert command.main([str(path), "--devices", "h200"]) == 0
    out = capsys.readouterr().out
    card = full_card(path)
    assert f"{n_params(config_of(card['model'])):,} parameters" in out
    assert [line[:2] for line in out.splitlines() if line[:2].isdigit()] == ["00", "01", "02", "03", "04", "05", "06"]


def test_what_cannot_fit_is_refused_with_one_message_and_status_1(capsys):
    assert command.main([str(root() / "params/gemma-2-9b.yaml"), "--devices", "v5e"]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert all(
        word in err for word in ("gemma-2-9b does not fit on v5e", "weights 18.5 GB", "14.7 GB", "x v5e would do")
    )
    assert command.main([str(root() / "params/gemma-2-9b.yaml"), "--devices", "8xv5e"]) == 0


def test_on_this_machine_host_memory_and_disk_have_to_suffice(monkeypatch, capsys):
    """The embedded model on this CPU: compiled, and it fits; then with less memory and less disk than there is."""
    tiny = str(root() / "params" / "tiny.yaml")
    assert command.main([tiny, "--devices", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "compiled for these devices" in out and "0.0 GB of weights and SAEs to download" in out
    e = preflight.estimate(_card("tiny"), parse_devices("cpu"), compile=False)
    here = dataclasses.replace(e, here=True)
    preflight.refuse(here)
    with pytest.raises(
        preflight.PreflightError, match="does not fit into the memory of this machine: notebook 01 .*fewer `rate_rows`"
    ):
        preflight.refuse(dataclasses.replace(here, host=10**15))
    monkeypatch.setattr(preflight, "_free_disk", lambda: 10**9)
    with pytest.raises(
        preflight.PreflightError, match="tiny downloads 2.0 GB of weights and SAEs, and 1.0 GB are free in"
    ):
        preflight.refuse(dataclasses.replace(here, disk=2 * 10**9))
    preflight.refuse(dataclasses.replace(e, disk=10**15))  # of another machine nothing is known


def test_bad_cards_and_devices_have_status_2(tmp_path, capsys):
    assert command.main([str(tmp_path / "none.yaml")]) == 2
    assert command.main([str(root() / "params/tiny.yaml"), "--devices", "abacus"]) == 2
    assert "no card at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"layer_executor": 42}, CardError, "layer_executor.*layer 42.*0 to 41"),
        ({"circuit_layers": [3, 99]}, CardError, "circuit_layers.*layer 99"),
        ({"layer_detector": 21}, CardError, "must be below"),
        ({"model": "someone/unheard-of"}, preflight.PreflightError, "not known here.*config.json"),
    ],
)
def test_a_card_that_no_machine_can_run_is_refused(changes, error, words):
    with pytest.raises(error, match=words):
        preflight.estimate(_card(**changes), parse_devices("h100"), compile=False)


def test_dividing_the_model_divides_what_can_be_divided():
    one, eight = (preflight.estimate(_card(), parse_devices(d), compile=False) for d in ("v5e", "8xv5e"))
    assert (one.split, eight.split) == (1, 8)
    assert eight.weights == pytest.approx(one.weights / 8, rel=0.01)
    # 14 heads on 8 devices: two share a model, the others hold copies
    qwen = preflight.estimate(_card("qwen2.5-0.5b"), parse_devices("8xv5e"), compile=False)
    assert qwen.split == 2 and qwen.weights == pytest.approx(494032768, rel=0.01)
    assert "divided among 2 of them; the other 6 hold copies and make nothing faster" in preflight.show(qwen)
    assert "the other" not in preflight.show(one) + preflight.show(eight)


def test_widths_and_places_of_dictionaries_come_from_their_names():
    saes = dictionaries(_card("gemma-2-2b-65k"), known_config("google/gemma-2-2b"))
    widths = {(d.kind, d.d_in, d.d_out, d.d_sae) for d in saes}
    assert widths == {
        ("residual", 2304, 2304, 65536),
        ("attention", 2048, 2048, 65536),
        ("transcoder", 2304, 2304, 16384),
    }
    assert dictionaries(_card("pythia-70m"), known_config("EleutherAI/pythia-70m-deduped"))[0].d_sae == 32768
    # 302 MB is what the hub shows for one file of 16k
    scope = dictionaries(_card("gemma-2-2b-16k"), known_config("google/gemma-2-2b"))[0]
    assert scope.bytes == pytest.approx(302e6, rel=0.01)


def test_tasks_are_counted_and_an_unknown_source_is_no_number(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.json", "sub/b.tsv"):
        (tmp_path / name).write_text("{}")
    assert (n_tasks("paper"), n_tasks(str(tmp_path))) == (23, 2)
    with pytest.raises(ValueError, match="no task source 'embeded': there are embedded, paper"):
        n_tasks("embeded")


def test_flops_of_a_token_are_twice_the_weights_and_the_scores():
    config = known_config("google/gemma-2b")
    assert token_flops(config, 1) == pytest.approx(2 * n_params(config), rel=1e-3)
    assert token_flops(config, 2000) - token_flops(config, 1000) == 4 * 18 * 8 * 256 * 1000


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gpt_neox", "qwen2"])
def test_arithmetic_agrees_with_the_compiler(family):
    """Of weights and work arrays together, and of FLOPs, within 25 %; also where the depth is extrapolated."""
    config = dataclasses.replace(
        tiny_config(d_model=128, d_mlp=512, n_heads=4, d_head=32, d_vocab=4000, n_ctx=256), n_layers=7
    )
    config = dataclasses.replace(config, **preflight_traits(family, config))
    card = _card(
        "tiny",
        saes=[],
        circuit_layers=[0],
        layer_executor=3,
        layer_detector=2,
        sae_layers=[0],
        n_prompts=8,
        effect_prompts=8,
    )
    weights = 4 * n_params(config)
    by_program = {step.cost.program.__qualname__: step for step in steps(card, config, Part()) if step.cost.program}
    costs = {step.what: step.cost for step in by_program.values()}
    assert len(costs) == 9
    for what, cost in costs.items():
        compiled = preflight.measured(cost, config, "float32")
        assert (weights + cost.temp) / (weights + compiled.temp) == pytest.approx(1, abs=0.25), what
        assert cost.flops / compiled.flops == pytest.approx(1, abs=0.25), what


@pytest.mark.parametrize("what", ["node effects", "ablation"])
def test_the_flops_of_saes_are_those_of_what_notebooks_compute(what):
    """The whole computation compiled, SAEs and all, on a model that is small beside them."""
    config = tiny_config(n_layers=3, d_vocab=50)
    suite = {sae.site_in: sae for layer in (1, 2) for sae in some_saes(layer, 1024)}
    sizes, prompts = [Dictionary(site, 16, 16, 1024) for site in suite], planted_prompts(0, 4, 3)
    b, s = prompts.tokens.shape
    roles = circuits.Groups.by_role(prompts)

    def ablation(model, suite, resid):
        gate = {site: jnp.ones((len(Role), sae.d_sae), bool) for site, sae in suite.items()}
        return pair_logprob(
            model.run_from(1, resid, tap=circuits.ablation.splice(suite, roles.index, gate, None)), prompts
        )

    effects = lambda model, suite, resid: circuits.effects._task_effects(
        model, suite, prompts, roles, circuits.OnLogits(pair_logprob), "zero"
    )
    model = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract(config))
    run = {"node effects": effects, "ablation": ablation}[what]
    found = jax.jit(run).lower(model, suite, jnp.zeros((b, s, config.d_model))).compile().cost_analysis()["flops"]
    cost = {
        "node effects": lambda: node_effects_cost(config, b, s, 2, len(Role), sizes, Part()),
        "ablation": lambda: ablation_cost(config, b, s, 2, len(Role), sizes, Part(), whole=True),
    }[what]()
    assert cost.other_flops > cost.flops / 2
    assert cost.flops / found == pytest.approx(1, abs=0.25)


def test_saes_and_tables_are_counted_beside_what_is_compiled():
    """They are no part of the compiled function: both figures have them, and the largest batch divides only what goes
    by rows."""
    config = tiny_config(n_layers=4, d_model=32, d_vocab=100, n_ctx=256)
    card = _card("tiny", circuit_layers=[1, 2], layer_executor=3, layer_detector=2, sae_layers=[1, 2], n_prompts=4)
    todo = {step.what: step.cost for step in steps(card, config, Part())}
    cost = todo["ablation"]
    circuit = [d for d in dictionaries(card, config) if d.site.layer in (1, 2)]
    assert cost.fixed == 15 * 4 * 28 * 6 * sum(d.d_sae for d in circuit) > 0
    assert 0 < cost.per_row < (cost.temp - cost.fixed) / cost.rows * 1.01
    compiled = preflight.measured(cost, config, "float32")
    assert compiled.model_flops / cost.model_flops == pytest.approx(1, abs=0.25)
    assert compiled.temp - cost.fixed == pytest.approx(compiled.per_row * cost.rows, rel=0.01)
    assert preflight.measured(todo["firing rates"], config, "float32") == todo["firing rates"]
    assert {what for what, cost in todo.items() if cost.other_flops} == {
        "firing rates", "quality with each SAE in place", "activation mass", "node effects", "ablation"
    }  # fmt: skip


def test_cleaning_sweeps_all_penalties_at_every_layer_and_insertions_run_every_layer_from_the_first():
    """What the sum of hours hangs on: lanes of 03, rows behind the arrow, and that 02 cuts at layer 0."""
    config, card = known_config("google/gemma-2-2b"), _card("gemma-2-2b-16k")
    by_name = {step.what: step for step in steps(card, config, Part())}
    sweeps = [step for what, step in by_name.items() if what.startswith("cleaning at layer")]
    read = sorted(
        layer + 1 for layer in card["sae_layers"] if layer + 1 < config.n_layers
    )  # behind a block: the next one's input
    assert [step.cost.depth for step in sweeps] == [config.n_layers - layer for layer in read if layer >= 2]
    one = by_name["cleaning, one penalty"]
    assert one.times == 3 and all(step.times == 1 for step in sweeps)
    same = next(step for step in sweeps if step.cost.depth == one.cost.depth)
    assert same.flops / (one.flops / one.times) == pytest.approx(len(card["tvc_l1"]))
    assert {step.cost.seq for step in (*sweeps, one, by_name["vectors inserted at every layer"])} == {2}
    assert by_name["vectors inserted at every layer"].cost.depth == config.n_layers


def test_the_tokens_behind_an_arrow_are_those_that_a_cut_keeps():
    from tests.planted import planted_model

    prompts = planted_prompts(0, 4, 0)
    assert cut(planted_model(), prompts, 0).resid.shape[-2] <= ANSWER_TOKENS


def test_work_is_done_in_the_turns_that_it_was_done_in():
    """Sizes of turns decide the order of sums: those of the embedded model stay as they were."""
    config = config_of("assets/icl-tiny")
    lane = 4 * 16 * 2 * (3 * 1316 + 4 * 512 + 8 * 128)
    assert lane_bytes(config, 16, 2) == lane and turn(config, 16, 2, 28, 6) == (28, 6)
    assert turn(config, 12, 2, 28, 10, BUDGET // 4) == (7, 10) and fitting(lane, 10**6) == 2**28 // lane


def some_saes(layer, d_sae):
    """A residual SAE and a transcoder for models of width 16."""
    weights = {
        name: jnp.ones(shape) for name, shape in (("W_enc", (16, d_sae)), ("W_dec", (d_sae, 16)), ("b_dec", (16,)))
    }
    weights |= {"b_enc": jnp.zeros(d_sae), "threshold": jnp.zeros(d_sae), "architecture": "jumprelu"}
    pairs = [("resid_pre", "resid_pre"), ("mlp_in", "mlp_out")]
    return [SAE(**weights, site_in=Site(a, layer), site_out=Site(b, layer)) for a, b in pairs]


def preflight_traits(family, config):
    """What makes the small config one of this family."""
    windows = (
        {"windows": tuple(16 if i % 2 == 0 else None for i in range(config.n_layers))} if family == "gemma2" else {}
    )
    return {"family": family, **FAMILIES[family].traits, **windows}


def test_the_depth_is_extrapolated_to_what_the_full_depth_gives():
    config = tiny_config(n_layers=7, d_model=64, d_mlp=256, d_vocab=500, n_ctx=256)
    card = _card("tiny", saes=[], circuit_layers=[0])
    cost = next(step.cost for step in steps(card, config, Part()) if step.what == "node effects")
    line = preflight.measured(cost, config, "float32")
    temp, flops = preflight._compiled(cost, config, "float32", 1)
    assert line.temp - cost.fixed == pytest.approx(temp, rel=0.1) and line.flops == pytest.approx(flops, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_real_process_takes_what_was_expected():
    script = root() / "benchmarks" / "preflight_check.py"
    done = subprocess.run([sys.executable, str(script), "--small"], capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["computes"] for line in lines] == ["forward", "gradient"], done.stderr
    assert done.returncode == 0, lines
