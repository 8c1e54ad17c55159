"""The suite job: what is in its buffer, that it learns, goes on after being killed to the same bits, and stops where it
must.
"""

import dataclasses
import io
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_lib.models import Site, Transformer, run_with_cache, tiny_config
from icl_lib.models.sharding import make_mesh, shard_model
from icl_lib.saes.formats import load_suite
from icl_lib.text.corpus import CorpusEnded, TextCorpus, open_text
from icl_lib.text.tokens import token_mask
from icl_lib.training import JobSettings, Member, Plan, job
from icl_lib.training.buffer import ActivationBuffer
from icl_lib.training.checkpoints import CheckpointError, Checkpoints, differences
from icl_lib.training.job import train_suite
from icl_lib.training.progress import Reporter
from icl_lib.training.recipes import SHORT_RUN, TrainingError, make_recipe
from icl_lib.training.state import Means
from icl_lib.training.steps import init_state

CONFIG = tiny_config(d_model=8, d_head=4, d_mlp=16)
SITES = [Site("resid_pre", 1), Site("mlp_in", 0)]
MEMBERS = [Member(site, 24, 0.1) for site in SITES]
SETTINGS = dict(n_steps=120, batch_size=32, learning_rate=3e-3, dead_after=30) | SHORT_RUN
RECIPE = make_recipe("icl-sfc", **SETTINGS)
SIZES = dict(contexts=4, passes=3, steps_per_pass=2, save_every=10)


class Numbers:
    """A corpus of random tokens, padded at the end of some rows; from pass `poison` on it holds the last token of the
    vocabulary.
    """

    def __init__(self, seq: int = 10, poison: int = 10**9):
        self.seq, self.poison, self.passes = seq, poison, 0

    def batch(self, n: int) -> np.ndarray:
        rng = np.random.default_rng(self.passes)
        tokens = rng.integers(3, CONFIG.d_vocab - 1, (n, self.seq)).astype(np.int32)
        tokens[:, 0], tokens[0, rng.integers(4, self.seq) :] = CONFIG.bos_id, CONFIG.pad_id
        if self.passes >= self.poison:
            tokens[0, 2] = CONFIG.d_vocab - 1
        self.passes += 1
        return tokens

    def state_dict(self):
        return {"passes": self.passes}

    def load_state_dict(self, state):
        self.passes = state["passes"]

    def describe(self):
        return {"corpus": "numbers", "seq": self.seq}


def make_model() -> Transformer:
    return Transformer.init(CONFIG, key=jax.random.key(0))


def run(folder, corpus=None, model=None, members=MEMBERS, recipe=RECIPE, log=None, **changes):
    model = make_model() if model is None else model
    settings = JobSettings(log=log, **(SIZES | changes))
    return train_suite(model, Numbers() if corpus is None else corpus, members, recipe, folder, settings)


def weights(folder) -> dict[str, np.ndarray]:
    """Every array of every SAE that a job wrote."""
    files = sorted(folder.rglob("sae*.safetensors"))
    assert files
    return {f"{f.parent.name}/{k}": v for f in files for k, v in load_file(f).items()}


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("job")
    run(folder)
    return folder


def expected_rows(batches: list[np.ndarray], site: Site) -> np.ndarray:
    """Activations of all tokens that count, sorted, computed pass by pass without the buffer."""
    model, parts = make_model(), []
    for tokens in batches:
        _, cache = run_with_cache(model, jnp.asarray(tokens), [site])
        parts.append(np.asarray(cache[site])[np.asarray(token_mask(tokens, CONFIG))])
    return np.concatenate(parts)


def test_buffer_is_a_ring_of_the_last_passes():
    buffer = ActivationBuffer(make_model(), Numbers(), SITES, contexts=4, passes=3)
    buffer.fill()
    assert buffer.tokens_per_pass == 36 and all(x.shape == (108, CONFIG.d_model) for x in buffer.rows.values())
    for step in range(2):
        buffer.refill(step)
    corpus = Numbers()
    batches = [corpus.batch(4) for _ in range(5)]
    for site in SITES:
        rows = np.asarray(buffer.rows[site])
        for slot, number in enumerate([3, 4, 2]):  # the oldest were replaced
            expected = expected_rows(batches[number : number + 1], site)
            got = rows[36 * slot : 36 * (slot + 1)]
            np.testing.assert_allclose(got[: len(expected)], expected, atol=1e-5)
            assert len(expected) < 36, "padding left room"
            np.testing.assert_array_equal(
                got[len(expected) :], got[: 36 - len(expected)]
            )  # which tokens of the same pass fill
    assert buffer.first_bad() is None


def test_buffer_comes_back_bit_for_bit():
    first = ActivationBuffer(make_model(), Numbers(), SITES, contexts=4, passes=3)
    first.fill()
    for step in range(4):
        first.refill(step)
    state, tokens = first.state()
    second = ActivationBuffer(make_model(), Numbers(), SITES, contexts=4, passes=3)
    second.load(json.loads(json.dumps(state)), tokens)
    for _ in range(2):
        for site in SITES:
            np.testing.assert_array_equal(first.rows[site], second.rows[site])
        first.refill(9)
        second.refill(9)


def test_buffer_in_half_precision_and_its_limits():
    model = make_model()
    buffer = ActivationBuffer(model, Numbers(), SITES, contexts=2, passes=2, dtype="bfloat16")
    buffer.fill()
    assert {x.dtype for x in buffer.rows.values()} == {jnp.dtype("bfloat16")}
    loud = eqx.tree_at(lambda m: m.blocks[0].ln2.weight, model, model.blocks[0].ln2.weight + 1e5)
    buffer = ActivationBuffer(loud, Numbers(), SITES, contexts=2, passes=2, dtype="float16")
    buffer.refill(step=7)
    assert buffer.first_bad() == (Site("mlp_in", 0), 7), "float16 overflows where float32 does not"
    with pytest.raises(TrainingError, match="got 0: change contexts or passes"):
        ActivationBuffer(model, Numbers(), SITES, contexts=2, passes=0)


def test_a_pass_of_nothing_is_refused_and_filling_is_told():
    class Blank(Numbers):
        def batch(self, n):
            tokens = super().batch(n)
            tokens[:, 1:] = CONFIG.pad_id
            return tokens

    with pytest.raises(TrainingError, match="4 contexts of the pass at step 0 hold nothing but BOS and padding"):
        ActivationBuffer(make_model(), Blank(), SITES, contexts=4, passes=3).fill()
    said = []
    ActivationBuffer(make_model(), Numbers(), SITES, contexts=4, passes=3).fill(said.append, every=60.0)
    assert [p.step for p in said] == [0, 3], "before the compilation, and at the end"
    said.clear()
    ActivationBuffer(make_model(), Numbers(), SITES, contexts=4, passes=3).fill(said.append, every=0.0)
    assert [p.step for p in said] == [0, 1, 2, 3] and said[3].tokens_per_second > 0 and said[3].seconds_left == 0
    assert str(said[0]) == "filling the activation buffer (compiling first): pass 0 / 3  0 tokens/s  ETA ?"
    assert str(said[2]).startswith("filling the activation buffer: pass 2 / 3  ")


def test_filling_and_compilation_are_told_on_the_screen(tmp_path, capsys):
    run(tmp_path, log=print)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("filling the activation buffer (compiling first)")
    assert f"compiling the first step of {len(MEMBERS)} SAE(s)" in lines and lines[-1].startswith("step ")


def test_job_learns_and_writes(finished):
    suite = load_suite(finished / "saes")
    assert set(suite) == set(SITES) and suite[Site("mlp_in", 0)].site_out == Site("mlp_out", 0)
    curves = pd.read_parquet(finished / "curves.parquet")
    assert list(curves.columns) == ["step", "site", "d_sae", "sparsity", "l0", "fvu", "dead"]
    for site in SITES:
        fvu = curves[curves.site == str(site)].fvu
        assert fvu.iloc[-10:].mean() < 0.75 * fvu.iloc[:5].mean(), "the SAEs learn"
    steps = curves[curves.site == str(SITES[0])].step
    assert list(steps) == sorted(set(steps)) and steps.iloc[-1] == 120
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["000000110", "000000120"], (
        "the last two are kept"
    )


def test_a_finished_job_is_not_run_again(finished):
    before = weights(finished)
    log = []
    trained = run(finished, log=log.append)
    assert log == []
    assert_same_bits(weights(finished), before)
    assert list(trained) == MEMBERS


def test_progress_lines(tmp_path):
    log = []
    run(tmp_path, log=log.append, log_seconds=0.0)
    assert [p.step for p in log] == list(range(2, 121, 2)) and all(len(p.l0) == len(MEMBERS) for p in log)
    text = str(log[-1])
    assert text.startswith("step 120 / 120  ") and all(
        word in text for word in (" tokens/s ", " ETA 0:00:00 ", " L0 ", " FVU ", " dead ")
    )


def test_a_bar_in_a_terminal_lines_elsewhere(monkeypatch, capsys):
    plan = Plan(MEMBERS, RECIPE, dict.fromkeys([*SITES, Site("mlp_out", 0)], CONFIG.d_model))
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(RECIPE, n_steps=40))
    means = Means(*(np.asarray(v) for v in ([3.0, 4.0], [0.25, 0.5], [0.0, 0.1], [-1, -1])))
    line = Reporter(plan, 0, print, every=0.0)
    line.report(20, means)
    out, err = capsys.readouterr()
    assert out.startswith("step 20 / 40  ") and "FVU 0.250 to 0.500  dead 0.000 to 0.100" in out and not err
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Reporter(plan, 0, print, every=0.0)
    bar.report(20, means)
    bar.close()
    assert "20/40" in terminal.getvalue() and "L0 3.0 to 4.0" in terminal.getvalue() and not capsys.readouterr().out
    quiet = Reporter(plan, 0, None, every=0.0)
    assert not quiet.due(40)


def test_another_configuration_is_refused_by_field(finished):
    before = weights(finished)
    with pytest.raises(
        CheckpointError, match=r"recipe.learning_rate is 0.003 there, 0.002 here.*choose another folder"
    ):
        run(finished, recipe=make_recipe("icl-sfc", **(SETTINGS | {"learning_rate": 2e-3})))
    with pytest.raises(CheckpointError, match=r"corpus.seq is 10 there, 9 here"):
        run(finished, corpus=Numbers(seq=9))
    of_first = lambda m: jax.tree.leaves(m.blocks[0])[0]
    other = eqx.tree_at(of_first, make_model(), of_first(make_model()).at[(0,) * of_first(make_model()).ndim].add(1e-6))
    with pytest.raises(CheckpointError, match=r"model.weights is .* there"):
        run(finished, model=other)
    with pytest.raises(
        CheckpointError, match=r"members.blocks.1.hook_resid_pre d_sae=24 sparsity=0.2 is absent there, True here"
    ):
        run(finished, members=[Member(SITES[0], 24, 0.2), MEMBERS[1]])
    assert_same_bits(weights(finished), before)
    assert differences({"a": [1, 2], "b": {"c": None}}, {"a": [1, 3], "b": {"c": None}}) == ["a.1 is 2 there, 3 here"]


def test_bad_data_stops_the_job_and_keeps_the_checkpoint(tmp_path):
    model = make_model()
    model = eqx.tree_at(lambda m: m.embed, model, model.embed.at[-1].set(jnp.inf))
    with pytest.raises(
        TrainingError,
        match=r"activations at blocks.\d.\S+ are not finite in float32, from the pass at step 0.*no checkpoint yet",
    ):
        run(tmp_path / "a", corpus=Numbers(poison=1), model=model)
    # pass 3 + 13 follows step 26: by the checkpoint of step 30 it is found
    with pytest.raises(
        TrainingError,
        match=r"blocks.\d.\S+ are not finite in float32, from the pass at step 28 on.*last good checkpoint, of step 20",
    ):
        run(tmp_path / "b", corpus=Numbers(poison=16), model=model)
    with pytest.raises(TrainingError, match="step 28"):  # it goes on from step 20 and meets the same data
        run(tmp_path / "b", corpus=Numbers(poison=16), model=model)


def test_bad_loss_stops_the_job_and_keeps_the_checkpoint(tmp_path):
    """An input that is finite but has no finite square: in the first pass, and late in the run."""
    recipe, model = make_recipe("icl-sfc", **(SETTINGS | {"norm_decay": 1.0})), make_model()
    model = eqx.tree_at(lambda m: m.embed, model, model.embed.at[-1].set(1e25))
    with pytest.raises(
        TrainingError,
        match=r"loss of the SAE at blocks.1.hook_resid_pre is not finite at step \d+: .*no checkpoint yet",
    ):
        run(tmp_path / "a", corpus=Numbers(poison=0), model=model, recipe=recipe)
    said = []
    for _ in range(2):  # the second time it goes on from the checkpoint and meets the same
        with pytest.raises(TrainingError) as caught:
            run(tmp_path / "b", corpus=Numbers(poison=16), model=model, recipe=recipe)
        said.append(str(caught.value))
    found = re.match(
        r"the loss of the SAE at blocks.1.hook_resid_pre is not finite at step (\d+)"
        r".*last good checkpoint, of step (\d+), is in",
        said[0],
    )
    assert said[0] == said[1] and found, said
    assert int(found[1]) >= 28 and 20 <= int(found[2]) <= int(found[1])


def test_a_weight_that_is_not_finite_is_named(tmp_path, monkeypatch):
    plan = Plan(MEMBERS, RECIPE, {site: CONFIG.d_model for site in [*SITES, Site("mlp_out", 0)]})
    state = init_state(plan, {site: jnp.ones((9, CONFIG.d_model)) for site in plan.sites}, key=jax.random.key(0))
    assert [x.tolist() for x in job._finite(state)] == [[True, True]]
    broken = eqx.tree_at(
        lambda s: s.stacks[0].weights.b_dec, state, state.stacks[0].weights.b_dec.at[1, 3].set(jnp.inf)
    )
    found = job._finite(broken)
    assert [x.tolist() for x in found] == [[True, False]]
    monkeypatch.setattr(job, "_finite", lambda state: found)
    with pytest.raises(
        TrainingError, match="a weight of the SAE at blocks.0.mlp.hook_in is not finite after step 9.*no checkpoint yet"
    ):
        run(tmp_path)


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files fails a save half way, as a full disk does."""
    state = {"w": jax.random.normal(jax.random.key(1), (200_000,))}
    checkpoints = Checkpoints(tmp_path, {"a": 1})
    checkpoints.save(1, state, {"k": 1})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not .* Whole checkpoints there: 1\. Is the disk full\?"):
            checkpoints.save(2, {"w": state["w"] + 1}, {"k": 2})
            checkpoints.wait()
        checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path, {"a": 1})
    step, arrays, data = again.restore(state)
    assert (step, data) == (1, {"k": 1})
    np.testing.assert_array_equal(arrays["w"], state["w"])
    again.save(2, state, {"k": 2})
    again.wait()
    assert again.latest() == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["000000001", "000000002"], (
        "nothing half written stays"
    )
    again.close()


def test_a_disk_that_is_full_at_the_end(finished):
    """The SAEs that are there stay whole, nothing half written is left, and the next call writes them."""
    before = weights(finished)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(OSError, match=r"could not write .*resid_pre.1/sae_weights.safetensors: .*Is the disk full"):
            run(finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(finished.rglob("*partial*"))
    assert_same_bits(weights(finished), before)


def test_a_save_does_not_see_later_steps(tmp_path):
    """The state is given up to the next step while it is still being written."""
    add = jax.jit(lambda s: s + 1, donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path, {}, keep=3), jnp.zeros(3_000_000)
    for step in range(3):
        checkpoints.save(step, {"w": state}, {})
        for _ in range(5):
            state = add(state)
    checkpoints.wait()
    arrays = checkpoints.restore({"w": jax.ShapeDtypeStruct(state.shape, state.dtype)})[1]
    checkpoints.close()
    np.testing.assert_array_equal(arrays["w"], 10.0)


WIDE = tiny_config(n_heads=3)  # whose heads together are wider than d_model


def test_every_kind_of_site_is_trained_and_written(tmp_path):
    """Heads, MLP outputs and transcoders."""
    recipe, level = make_recipe("standard", n_steps=8, batch_size=16), 0.1
    sites = [Site("z", 0), Site("mlp_out", 1), Site("mlp_in", 1)]
    model = Transformer.init(WIDE, key=jax.random.key(0))
    trained = run(tmp_path, model=model, members=[Member(s, 24, level) for s in sites], recipe=recipe)
    suite = load_suite(tmp_path / "saes", WIDE)
    assert set(suite) == set(sites) and suite[sites[0]].d_in == WIDE.width("z") != WIDE.d_model
    assert suite[sites[2]].site_out == Site("mlp_out", 1) and {s.architecture for s in suite.values()} == {
        recipe.objective
    }
    for member, sae in trained.items():
        for a, b in zip(jax.tree.leaves(sae), jax.tree.leaves(suite[member.site]), strict=True):
            np.testing.assert_array_equal(a, b)


# Auxiliary loss and resampling; SAELens has no topk transcoder, which must come out of the job all the same
ON_TEXT = {
    "topk": (Member(Site("mlp_in", 0), 24, 3), {"k_aux": 4, "dead_after": 2, "skip": True}),
    "gated": (Member(Site("resid_pre", 1), 24, 0.1), {"resample_every": 5, "dead_after": 2}),
}


def make_text(folder, epochs: int = 1, seed: int = 0) -> TextCorpus:
    """Sixty documents of twenty words in a file of `folder`: 140 contexts of ten tokens."""
    rng, path = np.random.default_rng(seed), folder / f"text{seed}.txt"
    if not path.exists():
        path.write_text("\n\n".join(" ".join(f"w{i}" for i in rng.integers(0, 30, 20)) for _ in range(60)))
    vocabulary = {"<unk>": 0} | {f"w{i}": i + 3 for i in range(30)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextCorpus(open_text(path), tokenizer, 10, bos_id=CONFIG.bos_id, epochs=epochs)


def run_on_text(folder, corpus, objective: str, n_steps: int = 40, log=None) -> None:
    member, changes = ON_TEXT[objective]
    recipe = make_recipe(objective, n_steps=n_steps, batch_size=16, warmup=1, **changes)
    held_out = 2 if objective == "gated" else 0
    run(folder, corpus, members=[member], recipe=recipe, save_every=6, log=log, log_seconds=0.0, held_out=held_out)


def stop_at(step: int):
    """A log that interrupts the job as Ctrl-C would."""

    def log(progress):
        if progress.step >= step:
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize("objective", ON_TEXT)
def test_a_stopped_job_on_text_ends_with_the_same_bits(objective, tmp_path):
    """Stopped before the first checkpoint and between two, it ends as if it had not been.

    With the corpus that has been read from (the cell of a notebook, again), or with a new one (the command, again).
    """
    one, stopped = make_text(tmp_path), tmp_path / "stopped"
    corpus = (lambda: one) if objective == "gated" else (lambda: make_text(tmp_path))
    run_on_text(tmp_path / "whole", make_text(tmp_path), objective)
    for step, checkpoints in ((4, 0), (10, 1)):
        with pytest.raises(KeyboardInterrupt):
            run_on_text(stopped, corpus(), objective, log=stop_at(step))
        assert not (stopped / "saes").exists() and len(list((stopped / "checkpoints").iterdir())) == checkpoints
    for _ in range(2):  # the second call finds it finished
        run_on_text(stopped, corpus(), objective)
        assert_same_bits(weights(stopped), weights(tmp_path / "whole"))
        tables = [pd.read_parquet(path) for path in sorted(tmp_path.glob("*/quality.parquet"))]
        assert len(tables) == (2 if objective == "gated" else 0)
        assert all(t.equals(tables[0]) and t.sparsity[0] == 0.1 for t in tables)
    sae = load_suite(stopped / "saes", CONFIG)[ON_TEXT[objective][0].site]
    assert sae.architecture == objective and sae.is_transcoder == (objective == "topk") == (sae.W_skip is not None)


def test_text_that_ends_can_be_read_once_more(tmp_path):
    """What the message advises works: more epochs go on from the checkpoint, to the bits of a run that had them from
    the start.
    """
    with pytest.raises(
        CorpusEnded, match=r"read 1 time\); there is no checkpoint yet: give more text, more epochs or fewer steps"
    ):
        run(tmp_path / "short", make_text(tmp_path), contexts=60)
    job = tmp_path / "job"
    for _ in range(2):
        with pytest.raises(
            CorpusEnded,
            match=r"the last good checkpoint, of step 60, is in \S+job/checkpoints, and with more epochs the same",
        ):
            run_on_text(job, make_text(tmp_path), "topk", n_steps=80)
    with pytest.raises(CheckpointError, match="recipe.n_steps is 80 there, 60 here.*choose another folder"):
        run_on_text(job, make_text(tmp_path), "topk", n_steps=60)
    with pytest.raises(CheckpointError, match="corpus.text is '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"):
        run_on_text(job, make_text(tmp_path, epochs=2, seed=1), "topk", n_steps=80)
    run_on_text(job, make_text(tmp_path, epochs=2), "topk", n_steps=80)
    run_on_text(tmp_path / "whole", make_text(tmp_path, epochs=2), "topk", n_steps=80)
    assert_same_bits(weights(job), weights(tmp_path / "whole"))


def test_impossible_jobs(tmp_path):
    with pytest.raises(TrainingError, match="contexts of 65 tokens are longer than the model's 64"):
        run(tmp_path, corpus=Numbers(seq=65))
    with pytest.raises(TrainingError, match="steps_per_pass and save_every must be at least 1"):
        run(tmp_path, steps_per_pass=0)
    with pytest.raises(TrainingError, match="held_out at least 0.*and -1"):
        run(tmp_path, held_out=-1)
    skip = make_recipe("standard", n_steps=8, batch_size=16, skip=True)
    with pytest.raises(
        TrainingError, match="skip is for transcoders: .* the SAE at blocks.1.hook_resid_pre would copy its input"
    ):
        run(tmp_path, recipe=skip)
    with pytest.raises(ValueError, match="layer of site"):
        run(tmp_path, members=[Member(Site("resid_pre", 9), 24, 0.1)])


def run_both(folder) -> None:
    """Two jobs after each other, of 120 and 40 steps, that print what step of all they are at; then the second one
    anew, at once.
    """
    run(folder / "numbers", log=lambda progress: print("step", progress.step, flush=True), log_seconds=0.0)
    run_on_text(
        folder / "text", make_text(folder), "topk", log=lambda progress: print("step", 120 + progress.step, flush=True)
    )
    run_on_text(folder / "whole", make_text(folder), "topk")


def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, finished):
    """SIGKILL at random moments, in the middle of a save as like as not; then the run that is left alone finishes."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment |= {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
    }  # as conftest.py has it here: other programs have other last bits
    command = [sys.executable, __file__, str(tmp_path)]
    make_text(tmp_path)
    reached, kills = 0, 0
    for attempt in itertools.count():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        target = [reached + rng.integers(1, 30), reached + rng.integers(1, 30), 120 + rng.integers(2, 30), None][
            attempt
        ]
        for line in process.stdout:
            step = int(line.split()[1])
            assert step > reached - 21, "it goes on from a checkpoint at most two saves ago"
            if target is not None and step >= target:
                process.send_signal(signal.SIGKILL)
                kills, reached = kills + 1, step
                break
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0 and kills >= 2
    assert_same_bits(weights(tmp_path / "numbers"), weights(finished))
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "numbers" / "curves.parquet"), pd.read_parquet(finished / "curves.parquet")
    )
    assert_same_bits(weights(tmp_path / "text"), weights(tmp_path / "whole"))


class Share(Numbers):
    """What one of two processes reads of `Numbers`: its half of each pass."""

    def batch(self, n: int) -> np.ndarray:
        return super().batch(2 * n)[jax.process_index() * n :][:n]


SHORT = make_recipe("icl-sfc", n_steps=6, batch_size=32, learning_rate=3e-3)


def run_one_of_two(folder, rank: int, address: str) -> None:
    """The same job on two processes of one device each, each with one of the SAEs of a shape."""
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    mesh = jax.make_mesh((2,), ("sae",), axis_types=(AxisType.Auto,))
    run(
        folder,
        Share(),
        shard_model(make_model(), make_mesh(data=2)),
        recipe=SHORT,
        save_every=4,
        mesh=mesh,
        shard="sae",
    )


def test_two_processes_do_what_one_does(tmp_path):
    run(tmp_path / "one", recipe=SHORT, save_every=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, __file__, str(tmp_path / "two"), str(rank), address] for rank in range(2)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [p.communicate(timeout=400)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)
    # a checkpoint of both is one checkpoint, which a single process refuses, as the text is divided otherwise
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoints").iterdir()) == ["000000004", "000000006"]
    with pytest.raises(CheckpointError, match="mesh"):
        run(tmp_path / "two", recipe=SHORT, save_every=4)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run_one_of_two(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        run_both(Path(sys.argv[1]))
