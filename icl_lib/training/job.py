"""The job that trains a suite of SAEs on a language model and a corpus, from one pass of the model for all of them.

Language-model passes and SAE steps alternate on the device: a pass replaces the oldest part of the activation buffer, then
every SAE takes some steps. Meanwhile the host tokenises the next contexts. Everything the job carries is in its checkpoints,
so that one that was killed goes on as if nothing had happened: in float32 on a CPU to the same bits.
"""

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from icl_lib.files.write import replace_file
from icl_lib.models import Transformer
from icl_lib.models.sharding import mesh_of
from icl_lib.saes.activations import needed_sites
from icl_lib.saes.formats import save_suite
from icl_lib.saes.quality import quality_table
from icl_lib.saes.sae import SAE
from icl_lib.text.corpus import Corpus, CorpusEnded, rewind
from icl_lib.training.buffer import ActivationBuffer
from icl_lib.training.checkpoints import Checkpoints
from icl_lib.training.progress import Curves, JobProgress, Reporter
from icl_lib.training.recipes import Recipe, TrainingError
from icl_lib.training.steps import Means, Member, State, Suite, finish, init_state, run_steps, shardings, stop_if_bad

_PRIMES = tuple(map(np.uint32, (2654435761, 2246822519, 3266489917, 668265263)))  # of the places in a checksum


def train_suite(
    model: Transformer,
    corpus: Corpus,
    members: Sequence[Member],
    recipe: Recipe,
    folder: str | Path,
    *,
    seed: int = 0,
    contexts: int = 32,
    passes: int = 16,
    steps_per_pass: int = 4,
    held_out: int = 0,
    dtype: str | None = None,
    save_every: int = 1000,
    keep: int = 2,
    mesh: Mesh | None = None,
    shard: str = "sae",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    log: Callable[[JobProgress], None] | None = print,
    log_seconds: float = 5.0,
) -> dict[Member, SAE]:
    """Train `members` by `recipe` on activations of `model` over `corpus`; the same call goes on with a run that was interrupted.

    One pass takes `contexts` contexts of `corpus.seq` tokens, the buffer holds `passes` of them (in `dtype`, by default the
    model's), and after each pass every SAE takes `steps_per_pass` steps of `recipe.batch_size` rows: with n tokens a pass, a
    token is drawn steps_per_pass x batch_size / n times on average. `mesh` and `shard` are those of `Suite`.
    The first `held_out` contexts of the corpus are not trained on: the SAEs are judged by them at the end (not where several
    processes train: call `quality_table` on the suite they wrote). Wherever the corpus stands, it is read from its start (`rewind`).

    Writes into `folder`: `checkpoints/` every `save_every` steps and at the end (the last `keep`), `curves.parquet`,
    `quality.parquet` (the table of `quality_table`, with sparsity), and `saes/` in SAELens layout, one folder a member (topk
    transcoders as sparsify writes them). `log` gets a line every `log_seconds` (None: silent).

    Raises `TrainingError` before any step if model, corpus, members and recipe do not fit, or if `folder` holds a run of another
    configuration (`CheckpointError`, naming the fields); later, with step and site, if an activation or a loss is not finite,
    `CorpusEnded` if there is too little text, and `CheckpointError` if a checkpoint, or `OSError` if a result, cannot be written. The
    last good checkpoint stays, and the next call goes on from it.
    """
    if corpus.seq > model.config.n_ctx:
        raise TrainingError(
            f"contexts of {corpus.seq} tokens are longer than the model's {model.config.n_ctx}: make the corpus with a shorter seq"
        )
    if steps_per_pass < 1 or save_every < 1:
        raise TrainingError(f"steps_per_pass and save_every must be at least 1, got {steps_per_pass} and {save_every}")
    dtype = dtype or str(model.embed.dtype)
    sites = needed_sites(m.site for m in members)
    suite = Suite(tuple(members), recipe, {s: model.config.width(s.name) for s in sites}, mesh, shard)
    buffer = ActivationBuffer(model, corpus, suite.sites, contexts=contexts, passes=passes, dtype=dtype, mesh=mesh)
    passes_of = {
        "contexts": contexts,
        "passes": passes,
        "steps_per_pass": steps_per_pass,
        "held_out": held_out,
        "dtype": dtype,
    }
    config = _config(model, corpus, suite, seed, passes_of)
    job = _Job(
        suite, buffer, Checkpoints(Path(folder) / "checkpoints", config, keep), Curves(suite.members, recipe.n_steps)
    )
    try:
        rewind(corpus)
        held = corpus.batch(held_out) if held_out else None
        job.start(jax.random.key(seed))
        job.run(steps_per_pass, save_every, log, log_seconds)
    except CorpusEnded as err:
        raise CorpusEnded(f"{err}; {job.kept()}{job.remedy()}") from None
    finally:
        job.checkpoints.close()
    trained = finish(job.state, suite, metadata)
    _write(trained, job.curves, Path(folder))
    if held is not None and jax.process_count() == 1:
        _save_table(_quality(model, trained, held), Path(folder) / "quality.parquet")
    return trained


class _Job:
    """The moving parts, and the order in which they move."""

    def __init__(self, suite: Suite, buffer: ActivationBuffer, checkpoints: Checkpoints, curves: Curves):
        self.suite, self.buffer, self.checkpoints, self.curves = suite, buffer, checkpoints, curves
        self.state: State
        self.step = 0

    def start(self, key: Array) -> None:
        """From the last checkpoint, or from nothing."""
        restored = self.checkpoints.restore({"state": self._abstract(key), "tokens": self.buffer.abstract_tokens()})
        if restored is None:
            self.buffer.fill()
            self._check_data()
            self.state = init_state(self.suite, self.buffer.rows, key=key)
            return
        self.step, arrays, data = restored
        self.state = arrays["state"]
        self.curves.points = data["curves"]
        if self.step < self.suite.recipe.n_steps:
            self.buffer.load(data["buffer"], arrays["tokens"])

    def run(self, steps_per_pass: int, save_every: int, log, log_seconds: float) -> None:
        """To the last step. The host is never more than one pass ahead of the device."""
        n_steps = self.suite.recipe.n_steps
        log = log if jax.process_index() == 0 else None
        reporter = Reporter(self.step, n_steps, self.suite.recipe.batch_size, log, log_seconds)
        try:
            while self.step < n_steps:
                before, self.step = self.step, min(self.step + steps_per_pass, n_steps)
                self.state, means = run_steps(self.state, self.buffer.rows, self.step - before, self.suite)
                means = _everywhere(means, self.suite.mesh)
                if self.step < n_steps:
                    self.buffer.refill(self.step)
                if self.curves.due(before, self.step):
                    self.curves.add(self.step, means)
                if reporter.due(self.step):
                    self._check(means)
                    reporter.report(self.step, means)
                if before // save_every != self.step // save_every or self.step == n_steps:
                    self._check(means)
                    self._save()
                jax.block_until_ready(means)
        finally:
            reporter.close()
        self.checkpoints.wait()

    def _save(self) -> None:
        for group, finite in zip(self.suite.groups, _everywhere(_finite(self.state), self.suite.mesh), strict=True):
            if (bad := np.flatnonzero(~np.asarray(finite))).size:
                site = self.suite.members[group[bad[0]]].site
                raise TrainingError(
                    f"a weight of the SAE at {site} is not finite after step {self.step - 1}: lower the learning rate; {self.kept()}"
                )
        data, tokens = self.buffer.state()
        self.checkpoints.save(
            self.step, {"state": self.state, "tokens": tokens}, {"buffer": data, "curves": self.curves.points}
        )

    def _abstract(self, key: Array) -> State:
        """Shapes and shardings of the state, without computing it."""
        shapes = jax.eval_shape(lambda rows: init_state(self.suite, rows, key=key), self.buffer.rows)
        if self.suite.mesh is None:
            return shapes
        place = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
        return jax.tree.map(place, shapes, shardings(self.suite, shapes))

    def _check(self, means: Means) -> None:
        """Raises `TrainingError` if data or losses are not finite. Waits for the device, but not for other processes."""
        self._check_data()
        try:
            stop_if_bad(means, self.suite)
        except TrainingError as err:
            raise TrainingError(f"{err}; {self.kept()}") from None

    def _check_data(self) -> None:
        if (bad := self.buffer.first_bad()) is not None:
            site, step = bad
            dtype = self.buffer.rows[site].dtype
            raise TrainingError(
                f"activations at {site} are not finite in {dtype}, from the pass at step {step} on: check the model's weights, "
                f"or take a dtype of wider range (float16 overflows at 65504); {self.kept()}"
            )

    def kept(self) -> str:
        last = self.checkpoints.latest()
        return (
            "there is no checkpoint yet"
            if last is None
            else f"the last good checkpoint, of step {last}, is in {self.checkpoints.folder}"
        )

    def remedy(self) -> str:
        """What helps where the text has ended: the steps, and which text it is, belong to the configuration of a checkpoint."""
        if self.checkpoints.latest() is None:
            return ": give more text, more epochs or fewer steps"
        return ", and with more epochs the same call goes on from it. With another text or fewer steps, choose another folder to start anew"


@jax.jit
def _finite(state: State) -> list[Array]:
    """For each stack, (n_saes,) booleans: all that training carries of this SAE is finite."""

    def one(stack):
        floats = [x for x in jax.tree.leaves(stack) if jnp.issubdtype(x.dtype, jnp.floating)]
        return functools.reduce(operator.and_, [jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in floats])

    return [one(stack) for stack in state.stacks]


def _config(model: Transformer, corpus: Corpus, suite: Suite, seed: int, passes: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the result, as JSON. The model is known by its sizes and by a sum over its weights."""
    members = {f"{m.site} d_sae={m.d_sae} sparsity={m.sparsity:g}": True for m in suite.members}
    mesh = (
        None
        if suite.mesh is None
        else {name: int(size) for name, size in suite.mesh.shape.items()} | {"shard": suite.shard}
    )
    if mesh and (of_model := mesh_of(model)) is not None and of_model.shape["model"] > 1:
        mesh["model"] = of_model.shape["model"]
    return {
        "model": dataclasses.asdict(model.config) | {"dtype": str(model.embed.dtype), "weights": _fingerprint(model)},
        "corpus": corpus.describe(),
        "members": members,
        "recipe": dataclasses.asdict(suite.recipe),
        "buffer": dict(passes),
        "mesh": mesh,
        "seed": seed,
    }


def _fingerprint(model: Transformer) -> str:
    """Tells models apart by the bits of every weight. Sums of integers are the same in any order, so on any number of devices."""
    sums = jnp.stack([_checksum(w) for w in jax.tree.leaves(model) if eqx.is_inexact_array(w)])
    return hashlib.sha256(np.asarray(sums).tobytes()).hexdigest()[:16]


@jax.jit
def _checksum(w: Array) -> Array:
    r"""$\sum_i b_i m_i$ modulo $2^{32}$ of the bits b of each number, with an odd m that differs from place to place."""
    bits = jax.lax.bitcast_convert_type(w, f"uint{8 * w.dtype.itemsize}").astype(jnp.uint32)
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, w.shape, axis) * prime
        for axis, prime in zip(range(w.ndim), _PRIMES, strict=False)
    ]
    return jnp.sum(bits * (2 * sum(places, jnp.uint32(0)) + 1), dtype=jnp.uint32)


def _quality(model: Transformer, trained: Mapping[Member, SAE], tokens: np.ndarray) -> pd.DataFrame:
    table = quality_table(model, trained, tokens, batch_size=16)
    table.insert(table.columns.get_loc("d_sae") + 1, "sparsity", [member.sparsity for member in trained])
    return table


def _write(trained: Mapping[Member, SAE], curves: Curves, folder: Path) -> None:
    """The SAEs and the training curves. A suite with several SAEs at one site has a folder for each width and sparsity.

    All processes call it, since an SAE may lie across them; the first one writes.
    """
    several = len({m.site for m in trained}) < len(trained)
    for member, sae in trained.items():
        name = f"d_sae_{member.d_sae}_sparsity_{member.sparsity:g}" if several else ""
        save_suite({member.site: sae}, folder / "saes" / name)
    _save_table(curves.table(), folder / "curves.parquet")


def _save_table(table: pd.DataFrame, path: Path) -> None:
    replace_file(path, lambda partial: table.to_parquet(partial, index=False))


def _everywhere(arrays: PyTree, mesh: Mesh | None) -> PyTree:
    """The same arrays, each whole on every device, so that every process can read them."""
    if mesh is None or jax.process_count() == 1:
        return arrays
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(arrays)
