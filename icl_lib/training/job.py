"""The job that trains a suite of SAEs on a language model and a corpus, from one pass of the model for all of them.

Language-model passes and SAE steps alternate on the device: a pass replaces the oldest part of the activation buffer,
then every SAE takes some steps. Meanwhile the host tokenises the next contexts. Everything the job carries is in its
checkpoints, so that one that was killed goes on as if nothing had happened: in float32 on a CPU to the same bits.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh
from jaxtyping import Array

from icl_lib.files.write import replace_file
from icl_lib.models import Transformer
from icl_lib.models.sharding import mesh_of
from icl_lib.saes.activations import needed_sites
from icl_lib.saes.formats import save_suite
from icl_lib.saes.quality import quality_table
from icl_lib.saes.sae import SAE
from icl_lib.text.corpus import Corpus, CorpusEnded, rewind
from icl_lib.training.buffer import ActivationBuffer
from icl_lib.training.checkpoints import Checkpoints, fingerprint
from icl_lib.training.plan import Member, Plan
from icl_lib.training.progress import Curves, Progress, Reporter
from icl_lib.training.recipes import Recipe, TrainingError
from icl_lib.training.state import Means, State, everywhere, shardings, stop_if_bad
from icl_lib.training.steps import finish, init_state, run_steps


@dataclasses.dataclass(frozen=True)
class JobSettings:
    """How a job goes about its work. Of n tokens a pass, each is drawn steps_per_pass x batch_size / n times or so."""

    seed: int = 0  # of the start, and of which rows a step draws
    contexts: int = 32  # of `corpus.seq` tokens, in one pass of the language model
    passes: int = 16  # that the activation buffer holds
    steps_per_pass: int = 4  # of every SAE, after each pass
    held_out: int = 0  # first contexts of the corpus, not trained on: the SAEs are judged by them at the end
    dtype: str | None = None  # of the activation buffer; None: the model's
    save_every: int = 1000  # steps from checkpoint to checkpoint
    keep: int = 2  # checkpoints
    mesh: Mesh | None = None  # devices of the SAEs, see `Plan`
    shard: str = "sae"  # what the mesh divides, see `Plan`
    metadata: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)  # of every SAE written
    log: Callable[[Progress], None] | None = print  # gets a `Progress` every `log_seconds`; None: silent
    log_seconds: float = 5.0

    def __post_init__(self):
        counts = {name: getattr(self, name) for name in ("keep", "steps_per_pass", "save_every")}
        if min(counts.values()) < 1 or self.held_out < 0:
            wanted = "keep, steps_per_pass and save_every must be at least 1 and held_out at least 0"
            raise TrainingError(f"{wanted}, got {counts} and {self.held_out}")


def train_suite(
    model: Transformer, corpus: Corpus, members: Sequence[Member], recipe: Recipe, folder: str | Path,
    settings: JobSettings | None = None,
) -> dict[Member, SAE]:  # fmt: skip
    """Train `members` by `recipe` on activations of `model` over `corpus`.

    The same call goes on with a run that was interrupted. Wherever the corpus stands, it is read from its start
    (`rewind`). Where several processes train there is no table of quality at the end: call `quality_table` on the suite
    they wrote.

    Writes into `folder`: `checkpoints/` every `save_every` steps and at the end (the last `keep`), `curves.parquet`,
    `quality.parquet` (the table of `quality_table`, with sparsity), and `saes/` in SAELens layout, one folder a member
    (topk transcoders as sparsify writes them).

    Raises `TrainingError` before any step if model, corpus, members and recipe do not fit, or if `folder` holds a run
    of another configuration (`CheckpointError`, naming the fields); later, with step and site, if an activation or a
    loss is not finite, `CorpusEnded` if there is too little text, and `CheckpointError` if a checkpoint, or `OSError`
    if a result, cannot be written. The last good checkpoint stays, and the next call goes on from it.
    """
    if corpus.seq > model.config.n_ctx:
        longer = f"contexts of {corpus.seq} tokens are longer than the model's {model.config.n_ctx}"
        raise TrainingError(f"{longer}: make the corpus with a shorter seq")
    settings = settings or JobSettings()
    settings = dataclasses.replace(settings, dtype=settings.dtype or str(model.embed.dtype))
    sites = needed_sites(m.site for m in members)
    widths = {s: model.config.width(s.name) for s in sites}
    plan = Plan(tuple(members), recipe, widths, settings.mesh, settings.shard)
    job = _Job(plan, settings, model, corpus, Path(folder) / "checkpoints")
    try:
        rewind(corpus)
        held = corpus.batch(settings.held_out) if settings.held_out else None
        job.start(jax.random.key(settings.seed))
        job.run()
    except CorpusEnded as err:
        raise CorpusEnded(f"{err}; {job.kept()}{job.remedy()}") from None
    finally:
        job.checkpoints.close()
    trained = finish(job.state, plan, settings.metadata)
    _write(trained, job.curves, Path(folder))
    if held is not None and jax.process_count() == 1:
        table = quality_table(model, trained, held, batch_size=16)
        table.insert(table.columns.get_loc("d_sae") + 1, "sparsity", [member.sparsity for member in trained])
        _save_table(table, Path(folder) / "quality.parquet")
    return trained


class _Job:
    """The moving parts, and the order in which they move."""

    def __init__(self, plan: Plan, settings: JobSettings, model: Transformer, corpus: Corpus, folder: Path):
        sizes = dict(contexts=settings.contexts, passes=settings.passes, dtype=settings.dtype, mesh=settings.mesh)
        self.plan, self.settings = plan, settings
        self.buffer = ActivationBuffer(model, corpus, plan.sites, **sizes)
        self.checkpoints = Checkpoints(folder, _config(model, corpus, plan, settings), settings.keep)
        self.curves = Curves(plan.members, plan.recipe.n_steps)
        self.state: State
        self.step = 0

    def start(self, key: Array) -> None:
        """From the last checkpoint, or from nothing."""
        restored = self.checkpoints.restore({"state": self._abstract(key), "tokens": self.buffer.abstract_tokens()})
        if restored is None:
            self.buffer.fill(self._say, self.settings.log_seconds)
            self._check_data()
            self.state = init_state(self.plan, self.buffer.rows, key=key)
            return
        self.step, arrays, data = restored
        self.state = arrays["state"]
        self.curves.points = data["curves"]
        if self.step < self.plan.recipe.n_steps:
            self.buffer.load(data["buffer"], arrays["tokens"], self._say, self.settings.log_seconds)

    def run(self) -> None:
        """To the last step. The host is never more than one pass ahead of the device."""
        n_steps, save_every = self.plan.recipe.n_steps, self.settings.save_every
        if self.step < n_steps:
            self._say(f"compiling the first step of {len(self.plan.members)} SAE(s)")
        reporter = Reporter(self.plan, self.step, self.settings.log, self.settings.log_seconds)
        try:
            while self.step < n_steps:
                before, self.step = self.step, min(self.step + self.settings.steps_per_pass, n_steps)
                self.state, means = run_steps(self.state, self.buffer.rows, self.step - before, self.plan)
                means = everywhere(means, self.plan)
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

    def _say(self, what: Progress | str) -> None:
        """What is no training step: on the screen, where the log is; a `log` of the caller's own takes steps alone."""
        if self.settings.log is print and jax.process_index() == 0:
            print(what, flush=True)

    def _save(self) -> None:
        for group, finite in zip(self.plan.groups, everywhere(_finite(self.state), self.plan), strict=True):
            if (bad := np.flatnonzero(~np.asarray(finite))).size:
                site = self.plan.members[group[bad[0]]].site
                bad = f"a weight of the SAE at {site} is not finite after step {self.step - 1}"
                raise TrainingError(f"{bad}: lower the learning rate; {self.kept()}")
        data, tokens = self.buffer.state()
        arrays = {"state": self.state, "tokens": tokens}
        self.checkpoints.save(self.step, arrays, {"buffer": data, "curves": self.curves.points})

    def _abstract(self, key: Array) -> State:
        """Shapes and shardings of the state, without computing it."""
        shapes = jax.eval_shape(lambda rows: init_state(self.plan, rows, key=key), self.buffer.rows)
        if self.plan.mesh is None:
            return shapes
        place = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
        return jax.tree.map(place, shapes, shardings(self.plan, shapes))

    def _check(self, means: Means) -> None:
        """Raises `TrainingError` if data or losses are not finite; waits for the device, not for other processes."""
        self._check_data()
        try:
            stop_if_bad(means, self.plan)
        except TrainingError as err:
            raise TrainingError(f"{err}; {self.kept()}") from None

    def _check_data(self) -> None:
        if (bad := self.buffer.first_bad()) is not None:
            site, step = bad
            what = f"activations at {site} are not finite in {self.buffer.rows[site].dtype}"
            todo = "check the model's weights, or take a dtype of wider range (float16 overflows at 65504)"
            raise TrainingError(f"{what}, from the pass at step {step} on: {todo}; {self.kept()}")

    def kept(self) -> str:
        if (last := self.checkpoints.latest()) is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, of step {last}, is in {self.checkpoints.folder}"

    def remedy(self) -> str:
        """What helps where the text has ended. Steps and text belong to the configuration of a checkpoint."""
        if self.checkpoints.latest() is None:
            return ": give more text, more epochs or fewer steps"
        return ", and with more epochs the same call goes on from it; other text or fewer steps need another folder"


@jax.jit
def _finite(state: State) -> list[Array]:
    """For each stack, (n_saes,) booleans: all that training carries of this SAE is finite."""

    def one(stack):
        floats = [x for x in jax.tree.leaves(stack) if jnp.issubdtype(x.dtype, jnp.floating)]
        return functools.reduce(operator.and_, [jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in floats])

    return [one(stack) for stack in state.stacks]


def _config(model: Transformer, corpus: Corpus, plan: Plan, settings: JobSettings) -> dict[str, Any]:
    """All that decides the result, as JSON. The model is known by its sizes and by a sum over its weights."""
    mesh = None
    if plan.mesh is not None:
        mesh = {name: int(size) for name, size in plan.mesh.shape.items()} | {"shard": plan.shard}
        if (of_model := mesh_of(model)) is not None and of_model.shape["model"] > 1:
            mesh["model"] = of_model.shape["model"]
    return {
        "model": dataclasses.asdict(model.config) | {"dtype": str(model.embed.dtype), "weights": fingerprint(model)},
        "corpus": corpus.describe(),
        "members": {f"{m.site} d_sae={m.d_sae} sparsity={m.sparsity:g}": True for m in plan.members},
        "recipe": dataclasses.asdict(plan.recipe),
        "buffer": {k: getattr(settings, k) for k in ("contexts", "passes", "steps_per_pass", "held_out", "dtype")},
        "mesh": mesh,
        "seed": settings.seed,
    }


def _write(trained: Mapping[Member, SAE], curves: Curves, folder: Path) -> None:
    """The SAEs and the training curves. A suite with several SAEs at one site has a folder for each width and sparsity.
    All processes call it, since an SAE may lie across them; the first one writes."""
    several = len({m.site for m in trained}) < len(trained)
    for member, sae in trained.items():
        name = f"d_sae_{member.d_sae}_sparsity_{member.sparsity:g}" if several else ""
        save_suite({member.site: sae}, folder / "saes" / name)
    _save_table(curves.table(), folder / "curves.parquet")


def _save_table(table: pd.DataFrame, path: Path) -> None:
    replace_file(path, lambda partial: table.to_parquet(partial, index=False))
