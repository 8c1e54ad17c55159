"""Training a whole suite at once: SAEs of equal shape are stacked, and every step of all is one compiled program.

`init_state(plan, buffer)` gives a `State`, one pytree of arrays that holds all that training carries; `run_steps` takes
a number of steps on rows of the buffer, drawn at random; `finish` folds the result into SAEs of raw activations. Inside
`run_steps` nothing is read by the host: rows are drawn, each SAE takes one optimiser step, dead latents are counted,
statistics are summed.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from icl_lib.models import Site
from icl_lib.models.cost import BUDGET, fitting
from icl_lib.saes.activations import output_site
from icl_lib.saes.sae import SAE
from icl_lib.training import kernels, optimiser
from icl_lib.training.objectives import OBJECTIVES, Batch, Stats
from icl_lib.training.plan import AXIS, Member, Plan
from icl_lib.training.recipes import Recipe, TrainingError
from icl_lib.training.state import Means, Stack, State, shardings, stop_if_silent

THRESHOLD_DECAY = 0.99  # of the running mean of batchtopk's smallest feature
_SAMPLE = 4096  # tokens that the start of training looks at
# So many SAEs go side by side on an accelerator that their (batch, d_sae) arrays, some six in float32, stay below this.
_SIDE_BY_SIDE = 16 * BUDGET

Buffer = Mapping[Site, Array]


def init_state(plan: Plan, buffer: Buffer, *, key: PRNGKeyArray) -> State:
    """Start of training, from a sample of the buffer; made in place on its shards if there is a mesh. Raises
    `TrainingError` if the buffer lacks a site or is empty, sites differ in their tokens, or one is all zero."""
    _check_buffer(plan, buffer)
    state = _init(plan, buffer, key)
    if not isinstance(state.step, jax.core.Tracer):  # whose values are not known yet
        stop_if_silent(state, plan)
    return state


def _init(plan: Plan, buffer: Buffer, key: PRNGKeyArray) -> State:
    buffer = {site: buffer[site] for site in plan.sites}
    start = functools.partial(_start, plan=plan)
    if plan.mesh is None:
        parts = [start(buffer, key, groups=groups) for groups in _programs(plan)]
        return parts[0]._replace(stacks=tuple(stack for part in parts for stack in part.stacks))
    start = functools.partial(start, groups=tuple(range(len(plan.groups))))
    return jax.jit(start, out_shardings=shardings(plan, jax.eval_shape(start, buffer, key)))(buffer, key)


def run_steps(state: State, buffer: Buffer, n: int, plan: Plan) -> tuple[State, Means]:
    """`n` optimiser steps of every SAE on rows of the buffer; `state` is given up. A new `n` needs no compilation.

    `buffer[site]` is (n_tokens, d) in any float type, row i the same token at every site, for the sites in
    `plan.sites`. Step t draws `batch_size` rows with replacement by a key folded with t: chunks of any length give the
    same bits.
    """
    if n < 1:
        raise TrainingError(f"statistics are means over the steps: at least one must be taken, got {n}")
    buffer, n = {site: buffer[site] for site in plan.sites}, jnp.int32(n)
    done = [
        _run(tuple(state.stacks[g] for g in groups), state.step, state.key, buffer, n, plan, groups)
        for groups in _programs(plan)
    ]
    order = np.argsort([i for group in plan.groups for i in group])
    means = jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *(means for *_, means in done))
    return State(done[-1][0], state.key, tuple(stack for _, stacks, _ in done for stack in stacks)), means


def finish(
    state: State, plan: Plan, metadata: Mapping[str, str | int | float | bool] | None = None
) -> dict[Member, SAE]:
    """The SAEs, with both normalisations folded into the weights, and the norms of decoder rows too (exact).

    They take and give raw activations; a latent is in units of the norm that it writes (not for topk, whose choice
    would change).
    """
    recipe, done = plan.recipe, {}
    for stack, group in zip(state.stacks, plan.groups, strict=True):
        for row, i in enumerate(group):
            one, member = jax.tree.map(lambda leaf, row=row: leaf[row], stack), plan.members[i]
            weights = jax.tree.map(lambda w: w.astype(jnp.float32), one.weights)
            fold = OBJECTIVES[recipe.objective].fold
            fields = fold(weights, one.norm_in, one.norm_out, one.threshold, member.sparsity)
            meta = {"training_steps": recipe.n_steps, "training_batch": recipe.batch_size} | dict(metadata or {})
            meta = tuple(sorted((meta | {"sparsity": member.sparsity}).items()))
            done[i] = SAE(**fields, site_in=member.site, site_out=output_site(member.site), metadata=meta)
    return {m: done[i] for i, m in enumerate(plan.members)}


def _check_buffer(plan: Plan, buffer: Buffer) -> None:
    shapes = {str(s): tuple(buffer[s].shape) for s in plan.sites if s in buffer}
    if missing := [str(s) for s in plan.sites if s not in buffer]:
        raise TrainingError(f"no activations for {', '.join(missing)}: harvest needed_sites(sites), inputs and targets")
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise TrainingError(f"every site needs activations (n_tokens, d) of the same tokens, got {shapes}")
    if any(0 in shape for shape in shapes.values()):
        raise TrainingError(f"there are no activations to train on, got {shapes}: give more text")
    for site, width in plan.widths:
        if site in buffer and buffer[site].shape[1] != width:
            raise TrainingError(f"activations at {site} must be {width} wide as planned, got {buffer[site].shape[1]}")


def _rows(buffer: Buffer, index: Array, sites: Sequence[Site]) -> dict[Site, Array]:
    """Rows `index` of each site, float32."""
    return {site: buffer[site][index].astype(jnp.float32) for site in sites}


def _pairs(rows: Mapping[Site, Array], plan: Plan, group: Sequence[int]) -> tuple[Array, Array]:
    """Inputs and targets (n_saes, tokens, d) of a group."""
    sites = [plan.members[i].site for i in group]
    return jnp.stack([rows[s] for s in sites]), jnp.stack([rows[output_site(s)] for s in sites])


@functools.partial(jax.jit, static_argnames=("plan", "groups"))
def _start(buffer: Buffer, key: PRNGKeyArray, plan: Plan, groups: tuple[int, ...]) -> State:
    """Data-dependent start of some of the groups from a sample of the first buffer; see `Objective.init`."""
    init_key, step_key = jax.random.split(key)
    init_key, index_key = jax.random.split(init_key)
    n_tokens = buffer[plan.sites[0]].shape[0]
    rows = _rows(buffer, jax.random.randint(index_key, (_SAMPLE,), 0, n_tokens), plan.sites)
    keys = jax.random.split(init_key, len(plan.members))
    stacks = tuple(
        _start_stack(*_pairs(rows, plan, g), keys[np.asarray(g)], plan.members[g[0]].d_sae, plan)
        for g in (plan.groups[i] for i in groups)
    )
    return State(jnp.int32(0), jax.random.key_data(step_key), stacks)


def _start_stack(x, y, keys, d_sae: int, plan: Plan) -> Stack:
    norm_in, norm_out, recipe = _mean_norm(x), _mean_norm(y), plan.recipe
    n = x.shape[0]

    def one(x, y, norm_in, norm_out, key):
        x, y = _scale(x, norm_in), _scale(y, norm_out)
        return OBJECTIVES[recipe.objective].init(x, y, d_sae, recipe, key=key)

    # cut by latents, each SAE is whole on every device while it is made (an orthogonal start is not divided): in turns
    in_turns = plan.mesh is not None and plan.shard == "latent"
    each = (lambda *all: jax.lax.map(lambda own: one(*own), all)) if in_turns else jax.vmap(one)
    weights = each(x, y, norm_in, norm_out, keys)
    # from this start the rate of a latent that never fires falls to `dead_rate` after `dead_after` steps
    rate = jnp.full((n, d_sae), math.e * recipe.dead_rate, jnp.float32) if recipe.dead_rate else None
    silent, none = jnp.zeros((n, d_sae), jnp.int32), jnp.full(n, -1, jnp.int32)
    moments = optimiser.start(weights, recipe)
    return Stack(weights, moments, silent, rate, norm_in, norm_out, none.astype(jnp.float32), none)


def _dead(stack: Stack, recipe: Recipe) -> Array:
    """Which latents are dead, by their silence or by their rate."""
    dead = stack.silent >= recipe.dead_after
    return dead if stack.rate is None else dead | (stack.rate < recipe.dead_rate)


def _mean_norm(x: Array) -> Array:
    return jnp.mean(jnp.linalg.norm(x, axis=-1), axis=-1)


def _scale(x, norm):
    """To a mean norm of sqrt(d)."""
    return x * (math.sqrt(x.shape[-1]) / norm)


@functools.partial(jax.jit, static_argnames=("plan", "groups"), donate_argnames="stacks")
def _run(stacks, start: Array, key: Array, buffer: Buffer, n: Array, plan: Plan, groups: tuple[int, ...]):
    """`n` steps of some of the groups: the step afterwards, their stacks, and their `Means` group after group."""
    n_tokens = buffer[plan.sites[0]].shape[0]
    members = [plan.groups[g] for g in groups]
    zeros = tuple(jnp.zeros(len(g)) for g in members)
    key = jax.random.wrap_key_data(key)

    def step(i, carry):
        stacks, l0, fvu = carry
        index_key, ghost_key = jax.random.split(jax.random.fold_in(key, i))
        rows = _rows(buffer, jax.random.randint(index_key, (plan.recipe.batch_size,), 0, n_tokens), plan.sites)
        keys = jax.random.split(ghost_key, len(plan.members))
        done = [_step_stack(s, rows, keys[np.asarray(g)], i, plan, g) for s, g in zip(stacks, members, strict=True)]
        stacks, stats = tuple(d[0] for d in done), [d[1] for d in done]
        l0 = tuple(a + s.l0 for a, s in zip(l0, stats, strict=True))
        return stacks, l0, tuple(a + s.fvu for a, s in zip(fvu, stats, strict=True))

    # the bounds are traced, so that a last chunk of another length needs no second compilation
    stacks, l0, fvu = jax.lax.fori_loop(start, start + n, step, (stacks, zeros, zeros))
    dead = [jnp.mean(_dead(s, plan.recipe), axis=1) for s in stacks]
    mean = lambda parts: jnp.concatenate(parts) / n.astype(jnp.float32)
    bad_step = jnp.concatenate([s.bad_step for s in stacks])
    return start + n, stacks, Means(mean(l0), mean(fvu), jnp.concatenate(dead), bad_step)


def _step_stack(stack: Stack, rows, keys, i, plan: Plan, group) -> tuple[Stack, Stats]:
    """One step of all SAEs of a group."""
    x, y = _pairs(rows, plan, group)
    sparsity = jnp.asarray([plan.members[j].sparsity for j in group], jnp.float32)
    k_max = int(max(plan.members[j].sparsity for j in group)) if plan.recipe.top else 0
    by_latent = plan.mesh is not None and plan.shard == "latent"
    sparse = plan.recipe.top and not by_latent and kernels.by_pairs(stack.silent.shape[1], k_max)
    one = functools.partial(_step_one, step=i, recipe=plan.recipe, k_max=k_max, sparse=sparse)
    row = plan.recipe.batch_size * stack.silent.shape[1] * 6 * 4 / (plan.mesh.size if by_latent else 1)
    over = functools.partial(_over_saes, one, plan.recipe, fitting(row, budget=_SIDE_BY_SIDE))
    if plan.mesh is not None and plan.shard == "sae":
        spec = PartitionSpec(AXIS)
        over = jax.shard_map(over, mesh=plan.mesh, in_specs=spec, out_specs=spec, axis_names={AXIS}, check_vma=False)
    stack, stats = over(stack, x, y, sparsity, keys)
    if by_latent:
        stack = jax.lax.with_sharding_constraint(stack, shardings(plan, State(i, i, (stack,))).stacks[0])
    return stack, stats


def _programs(plan: Plan) -> list[tuple[int, ...]]:
    """Groups that are compiled together: all of them, but on a CPU each by itself. XLA's CPU runtime (jaxlib 0.10.2,
    two cores) hung for good when three groups ran side by side in one program."""
    every = tuple(range(len(plan.groups)))
    return [(g,) for g in every] if kernels.on_cpu() else [every]


def _over_saes(function, recipe: Recipe, lanes: int, stack: Stack, *rest):
    """`vmap` of `lanes` SAEs at a time on accelerators, on a CPU one after the other.

    There its (batch, d_sae) arrays stay in the cache, which is 2 to 3 times as fast. `function(..., revive)` is told
    whether any latent is dead: of all SAEs under `vmap`, where a branch cannot differ from SAE to SAE.
    """

    def call(stack, *rest, dead=None):
        return function(stack, *rest, jnp.any(_dead(stack, recipe)) if dead is None else dead)

    if not kernels.on_cpu():
        together = functools.partial(call, dead=jnp.any(_dead(stack, recipe)))
        if lanes >= len(stack.silent):
            return jax.vmap(together)(stack, *rest)
        return jax.lax.map(lambda args: together(*args), (stack, *rest), batch_size=lanes)
    if len(stack.silent) == 1:  # no slicing of a stack of one: its matrices would be copied
        return jax.tree.map(lambda a: a[None], call(*jax.tree.map(lambda a: a[0], (stack, *rest))))
    return jax.lax.map(lambda args: call(*args), (stack, *rest))


def _step_one(
    stack: Stack, x, y, sparsity, key, revive, step, recipe: Recipe, k_max: int, sparse: bool
) -> tuple[Stack, Stats]:
    """One optimiser step of one SAE on one batch. `revive` is true where some latent may be dead."""
    decay = recipe.norm_decay
    norm_in = decay * stack.norm_in + (1 - decay) * _mean_norm(x)
    norm_out = decay * stack.norm_out + (1 - decay) * _mean_norm(y)
    x, y = _scale(x, norm_in), _scale(y, norm_out)
    dead = _dead(stack, recipe)
    level = sparsity if recipe.top else sparsity * recipe.ramp(step)
    batch = Batch(x, y, level, dead, revive, key, k_max, sparse)
    loss, stats, grads = OBJECTIVES[recipe.objective].gradient(stack.weights, batch, recipe)
    weights, moments = optimiser.update(stack.weights, stack.moments, grads, recipe, step, key=key)
    silent = jnp.where(stats.count > 0, 0, stack.silent + 1)
    rate = None if stack.rate is None else stack.rate + (stats.count / len(x) - stack.rate) / recipe.dead_after
    if recipe.resample_every:
        due = ((step + 1) % recipe.resample_every == 0) & revive
        again = lambda p, m: optimiser.resample(p, m, dead, x, y, recipe, key=key)
        weights, moments = jax.lax.cond(due, again, lambda p, m: (p, m), weights, moments)
        silent = jnp.where(due & dead, 0, silent)
    old, least = stack.threshold, stats.least  # a running mean of the smallest feature kept
    threshold = jnp.where(old < 0, least, THRESHOLD_DECAY * old + (1 - THRESHOLD_DECAY) * least)
    threshold = jnp.where(jnp.isfinite(least), threshold, old)
    bad_step = jnp.where((stack.bad_step < 0) & ~jnp.isfinite(loss), step, stack.bad_step)
    return Stack(weights, moments, silent, rate, norm_in, norm_out, threshold, bad_step), stats
