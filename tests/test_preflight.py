"""Preflight: devices as they are written, what fits and what does not, and its figures against the compiler and a real process."""

import dataclasses
import json
import subprocess
import sys

import pytest

from icl_lib.models import tiny_config
from icl_lib.models.families import known_config, n_params
from icl_lib.runs import preflight, root
from icl_lib.runs.checks import config_of, defaults_of, full_card
from icl_lib.runs.hardware import parse_devices
from icl_lib.runs.params import CardError
from icl_lib.runs.workload import dictionaries, n_tasks, steps, token_flops

CARDS = sorted(p for p in (root() / "params").glob("*.yaml"))


def _card(name="gemma-2-9b", **changes):
    return defaults_of(full_card(root() / "params" / f"{name}.yaml")) | changes


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [("h100", "h100", 1), ("8xv5e", "v5e", 8), ("v5e-8", "v5e", 8), ("v4-8", "v4", 4), ("V5p-16", "v5p", 8), ("cpu", "cpu", 1)],
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


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_every_card_fits_on_one_large_card_and_its_parameters_are_the_models(path, capsys):
    assert preflight.main([str(path), "--devices", "h200"]) == 0
    out = capsys.readouterr().out
    card = full_card(path)
    assert f"{n_params(config_of(card['model'])):,} parameters" in out
    assert [line[:2] for line in out.splitlines() if line[:2].isdigit()] == ["00", "01", "02", "03", "04", "05"]


def test_what_cannot_fit_is_refused_with_one_message_and_status_1(capsys):
    assert preflight.main([str(root() / "params/gemma-2-9b.yaml"), "--devices", "v5e"]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert all(word in err for word in ("gemma-2-9b does not fit on v5e", "weights 18.5 GB", "14.7 GB", "x v5e would do"))
    assert preflight.main([str(root() / "params/gemma-2-9b.yaml"), "--devices", "8xv5e"]) == 0


def test_on_this_machine_host_memory_and_disk_have_to_suffice(monkeypatch, capsys):
    """The embedded model on this CPU: compiled, and it fits; then with less memory and less disk than there is."""
    tiny = str(root() / "params" / "tiny.yaml")
    assert preflight.main([tiny, "--devices", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "compiled for these devices" in out and "0.0 GB of weights and SAEs to download" in out
    e = preflight.estimate(_card("tiny"), parse_devices("cpu"), compile=False)
    here = dataclasses.replace(e, here=True)
    preflight.refuse(here)
    with pytest.raises(preflight.PreflightError, match="does not fit into the memory of this machine: notebook 01 .*fewer `rate_rows`"):
        preflight.refuse(dataclasses.replace(here, host=10**15))
    monkeypatch.setattr(preflight, "_free_disk", lambda: 10**9)
    with pytest.raises(preflight.PreflightError, match="tiny downloads 2.0 GB of weights and SAEs, and 1.0 GB are free in"):
        preflight.refuse(dataclasses.replace(here, disk=2 * 10**9))
    preflight.refuse(dataclasses.replace(e, disk=10**15))  # of another machine nothing is known


def test_bad_cards_and_devices_have_status_2(tmp_path, capsys):
    assert preflight.main([str(tmp_path / "none.yaml")]) == 2
    assert preflight.main([str(root() / "params/tiny.yaml"), "--devices", "abacus"]) == 2
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


def test_widths_and_places_of_dictionaries_come_from_their_names():
    saes = dictionaries(_card("gemma-2-2b-65k"), known_config("google/gemma-2-2b"))
    widths = {(d.kind, d.d_in, d.d_out, d.d_sae) for d in saes}
    assert widths == {("resid", 2304, 2304, 65536), ("attn", 2048, 2048, 65536), ("transcoder", 2304, 2304, 16384)}
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
    config = dataclasses.replace(tiny_config(d_model=128, d_mlp=512, n_heads=4, d_head=32, d_vocab=4000, n_ctx=256), n_layers=7)
    config = dataclasses.replace(config, **preflight_traits(family, config))
    card = _card("tiny", saes=[], circuit_layers=[0], layer_executor=3, layer_detector=2, sae_layers=[0], n_prompts=8, effect_prompts=8)
    weights = 4 * n_params(config)
    kinds = {step.function.__name__: step for step in steps(card, config, dtype="float32")}
    assert len(kinds) == 5
    for step in kinds.values():
        compiled = preflight.measured(step, config, "float32")
        assert (weights + step.temp) / (weights + compiled.temp) == pytest.approx(1, abs=0.25), step.what
        assert step.flops / compiled.flops == pytest.approx(1, abs=0.25), step.what


def preflight_traits(family, config):
    """What makes the small config one of this family."""
    from icl_lib.models.config import TRAITS

    windows = {"windows": tuple(16 if i % 2 == 0 else None for i in range(config.n_layers))} if family == "gemma2" else {}
    return {"family": family, **TRAITS[family], **windows}


def test_the_depth_is_extrapolated_to_what_the_full_depth_gives():
    config = tiny_config(n_layers=7, d_model=64, d_mlp=256, d_vocab=500, n_ctx=256)
    step = next(s for s in steps(_card("tiny", saes=[], circuit_layers=[0]), config, dtype="float32") if s.what == "node effects")
    line = preflight.measured(step, config, "float32")
    temp, flops = preflight._compiled(step, config, "float32", 1)
    assert line.temp == pytest.approx(temp, rel=0.1) and line.flops == pytest.approx(flops, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_real_process_takes_what_was_expected():
    script = root() / "benchmarks" / "preflight_check.py"
    done = subprocess.run([sys.executable, str(script), "--small"], capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["computes"] for line in lines] == ["forward", "gradient"], done.stderr
    assert done.returncode == 0, lines
