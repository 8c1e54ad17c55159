"""Training a whole suite of SAEs at once: equal shapes are stacked, and every step of all of them is one compiled program.

`init_state(suite, buffer)` gives a `State`, one pytree of arrays that holds all that training carries; `run_steps` takes a number of
steps on rows of the buffer, drawn at random; `finish` folds the result into SAEs of raw activations. Inside `run_steps` nothing is
read by the host: rows are drawn, each SAE takes one optimiser step, dead latents are counted, statistics are summed.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from icl_lib.models import Site
from icl_lib.models.cost import BUDGET, fitting
from icl_lib.saes.activations import output_site
from icl_lib.saes.sae import SAE
from icl_lib.training import optimiser
from icl_lib.training.objectives import icl_sfc, objectives
from icl_lib.training.objectives.objectives import Params
from icl_lib.training.optimiser import Moments
from icl_lib.training.plan import AXIS, Member, Suite
from icl_lib.training.recipes import Recipe, TrainingError

THRESHOLD_DECAY = 0.99  # of the running mean of batchtopk's smallest feature
PAIRS_FROM = 128  # latents per one kept from which topk goes by pairs on a CPU; dense products are faster below
_SAMPLE = 4096  # tokens that the start of training looks at
# On accelerators so many SAEs go side by side that their (batch, d_sae) arrays, about six in float32, stay below this on each device.
_SIDE_BY_SIDE = 16 * BUDGET

Buffer = Mapping[Site, Array]


class Stack(NamedTuple):
    """What training carries for SAEs of one shape; every leaf has a leading axis over them."""

    params: Params
    moments: Moments
    silent: Array  # (d_sae,) int32 steps since a latent last fired
    rate: Array | None  # (d_sae,) running mean of the part of the tokens it fires on; none without a `dead_rate`
    norm_in: Array  # () mean norm of the input
    norm_out: Array  # () mean norm of the target
    threshold: Array  # () batchtopk: running mean of the smallest feature kept, -1 before the first step
    bad_step: Array  # () int32 first step with a loss that is not finite, or -1


class State(NamedTuple):
    """All that training carries from step to step."""

    step: Array  # () int32 steps done
    key: Array  # data of the PRNG key that, with the step, gives each step's rows
    stacks: tuple[Stack, ...]  # in the order of `Suite.groups`


class Means(NamedTuple):
    """Statistics of a chunk of steps, (n_members,) each in the order of `Suite.members`."""

    l0: Array  # mean over the chunk
    fvu: Array  # mean over the chunk
    dead: Array  # fraction of latents, now
    bad_step: Array  # int32 first step with a loss that is not finite, or -1


def init_state(suite: Suite, buffer: Buffer, *, key: PRNGKeyArray) -> State:
    """Start of training, from a sample of the buffer; made in place on its shards if there is a mesh.

    Raises `TrainingError` if the buffer lacks a site, its sites differ in their number of tokens, or the mesh does not divide the SAEs.
    """
    _check_buffer(suite, buffer)
    buffer = {site: buffer[site] for site in suite.sites}
    start = functools.partial(_start, suite=suite)
    if suite.mesh is None:
        parts = [start(buffer, key, groups=groups) for groups in _programs(suite)]
        return parts[0]._replace(stacks=tuple(stack for part in parts for stack in part.stacks))
    start = functools.partial(start, groups=tuple(range(len(suite.groups))))
    return jax.jit(start, out_shardings=shardings(suite, jax.eval_shape(start, buffer, key)))(buffer, key)


def shardings(suite: Suite, state: State) -> State:
    """The `NamedSharding` of every leaf of a state (arrays or shapes), for a suite with a mesh."""

    def leaf(array, d_sae):
        if suite.shard == "sae":
            return NamedSharding(suite.mesh, PartitionSpec(AXIS))
        axes = [AXIS if size == d_sae and axis else None for axis, size in enumerate(array.shape)]
        return NamedSharding(suite.mesh, PartitionSpec(*axes[: axes.index(AXIS) + 1] if AXIS in axes else ()))

    whole = NamedSharding(suite.mesh, PartitionSpec())
    stacks = tuple(jax.tree.map(lambda a, d=s.silent.shape[1]: leaf(a, d), s) for s in state.stacks)
    return State(whole, whole, stacks)


def run_steps(state: State, buffer: Buffer, n: int, suite: Suite) -> tuple[State, Means]:
    """`n` optimiser steps of every SAE on rows of the buffer; `state` is given up. A new `n` needs no compilation.

    `buffer[site]` is (n_tokens, d) in any float type, row i the same token at every site, for the sites in `suite.sites`.
    Step t draws `batch_size` rows with replacement by a key folded with t: chunks of any length give the same bits.
    """
    buffer, n = {site: buffer[site] for site in suite.sites}, jnp.int32(n)
    done = [
        _run(tuple(state.stacks[g] for g in groups), state.step, state.key, buffer, n, suite, groups)
        for groups in _programs(suite)
    ]
    order = np.argsort([i for group in suite.groups for i in group])
    means = jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *(means for *_, means in done))
    return State(done[-1][0], state.key, tuple(stack for _, stacks, _ in done for stack in stacks)), means


def finish(
    state: State, suite: Suite, metadata: Mapping[str, str | int | float | bool] | None = None
) -> dict[Member, SAE]:
    """The SAEs, with both normalisations folded into the weights, and the norms of decoder rows too (exact).

    They take and give raw activations; a latent is in units of the norm that it writes (not for topk, whose choice would change).
    """
    done = {}
    for stack, group in zip(state.stacks, suite.groups, strict=True):
        for row, i in enumerate(group):
            done[i] = _fold(
                jax.tree.map(lambda leaf, row=row: leaf[row], stack), suite.members[i], suite.recipe, metadata or {}
            )
    return {m: done[i] for i, m in enumerate(suite.members)}


def _check_buffer(suite: Suite, buffer: Buffer) -> None:
    shapes = {str(s): tuple(buffer[s].shape) for s in suite.sites if s in buffer}
    if missing := [str(s) for s in suite.sites if s not in buffer]:
        raise TrainingError(f"no activations for {', '.join(missing)}: harvest needed_sites(sites), inputs and targets")
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise TrainingError(f"every site needs activations (n_tokens, d) of the same tokens, got {shapes}")
    for site, width in suite.widths:
        if site in buffer and buffer[site].shape[1] != width:
            raise TrainingError(
                f"activations at {site} must be {width} wide as the suite says, got {buffer[site].shape[1]}"
            )


def _rows(buffer: Buffer, index: Array, sites: Sequence[Site]) -> dict[Site, Array]:
    """Rows `index` of each site, float32."""
    return {site: buffer[site][index].astype(jnp.float32) for site in sites}


def _pairs(rows: Mapping[Site, Array], suite: Suite, group: Sequence[int]) -> tuple[Array, Array]:
    """Inputs and targets (n_saes, tokens, d) of a group."""
    sites = [suite.members[i].site for i in group]
    return jnp.stack([rows[s] for s in sites]), jnp.stack([rows[output_site(s)] for s in sites])


@functools.partial(jax.jit, static_argnames=("suite", "groups"))
def _start(buffer: Buffer, key: PRNGKeyArray, suite: Suite, groups: tuple[int, ...]) -> State:
    """Data-dependent start of some of the groups from a sample of the first buffer; see `objectives.init` and `icl_sfc.init`."""
    init_key, step_key = jax.random.split(key)
    init_key, index_key = jax.random.split(init_key)
    n_tokens = buffer[suite.sites[0]].shape[0]
    rows = _rows(buffer, jax.random.randint(index_key, (_SAMPLE,), 0, n_tokens), suite.sites)
    keys = jax.random.split(init_key, len(suite.members))
    stacks = tuple(
        _start_stack(*_pairs(rows, suite, g), keys[np.asarray(g)], suite.members[g[0]].d_sae, suite)
        for g in (suite.groups[i] for i in groups)
    )
    return State(jnp.int32(0), jax.random.key_data(step_key), stacks)


def _start_stack(x, y, keys, d_sae: int, suite: Suite) -> Stack:
    norm_in, norm_out, recipe = _mean_norm(x), _mean_norm(y), suite.recipe
    n = x.shape[0]

    def one(x, y, norm_in, norm_out, key):
        x, y = _scale(x, norm_in), _scale(y, norm_out)
        return (icl_sfc if recipe.objective == "icl-sfc" else objectives).init(x, y, d_sae, recipe, key=key)

    # cut by latents, each SAE is whole on every device while it is made (an orthogonal start cannot be divided): one at a time
    in_turns = suite.mesh is not None and suite.shard == "latent"
    each = (lambda *all: jax.lax.map(lambda own: one(*own), all)) if in_turns else jax.vmap(one)
    params = each(x, y, norm_in, norm_out, keys)
    # from this start the rate of a latent that never fires falls to `dead_rate` after `dead_after` steps
    rate = jnp.full((n, d_sae), math.e * recipe.dead_rate, jnp.float32) if recipe.dead_rate else None
    silent, none = jnp.zeros((n, d_sae), jnp.int32), jnp.full(n, -1, jnp.int32)
    return Stack(
        params, optimiser.start(params, recipe), silent, rate, norm_in, norm_out, none.astype(jnp.float32), none
    )


def _dead(stack: Stack, recipe: Recipe) -> Array:
    """Which latents are dead, by their silence or by their rate."""
    dead = stack.silent >= recipe.dead_after
    return dead if stack.rate is None else dead | (stack.rate < recipe.dead_rate)


def _mean_norm(x: Array) -> Array:
    return jnp.mean(jnp.linalg.norm(x, axis=-1), axis=-1)


def _scale(x, norm):
    """To a mean norm of sqrt(d)."""
    return x * (math.sqrt(x.shape[-1]) / norm)


@functools.partial(jax.jit, static_argnames=("suite", "groups"), donate_argnames="stacks")
def _run(stacks, start: Array, key: Array, buffer: Buffer, n: Array, suite: Suite, groups: tuple[int, ...]):
    """`n` steps of some of the groups: the step afterwards, their stacks, and their `Means` one group after the other."""
    n_tokens = buffer[suite.sites[0]].shape[0]
    members = [suite.groups[g] for g in groups]
    zeros = tuple(jnp.zeros(len(g)) for g in members)
    key = jax.random.wrap_key_data(key)

    def step(i, carry):
        stacks, l0, fvu = carry
        index_key, ghost_key = jax.random.split(jax.random.fold_in(key, i))
        rows = _rows(buffer, jax.random.randint(index_key, (suite.recipe.batch_size,), 0, n_tokens), suite.sites)
        keys = jax.random.split(ghost_key, len(suite.members))
        done = [_step_stack(s, rows, keys[np.asarray(g)], i, suite, g) for s, g in zip(stacks, members, strict=True)]
        stacks, stats = tuple(d[0] for d in done), [d[1] for d in done]
        l0 = tuple(a + s.l0 for a, s in zip(l0, stats, strict=True))
        return stacks, l0, tuple(a + s.fvu for a, s in zip(fvu, stats, strict=True))

    # the bounds are traced, so that a last chunk of another length needs no second compilation
    stacks, l0, fvu = jax.lax.fori_loop(start, start + n, step, (stacks, zeros, zeros))
    dead = [jnp.mean(_dead(s, suite.recipe), axis=1) for s in stacks]
    mean = lambda parts: jnp.concatenate(parts) / n.astype(jnp.float32)
    return (
        start + n,
        stacks,
        Means(mean(l0), mean(fvu), jnp.concatenate(dead), jnp.concatenate([s.bad_step for s in stacks])),
    )


def _step_stack(stack: Stack, rows, keys, i, suite: Suite, group) -> tuple[Stack, objectives.Stats]:
    """One step of all SAEs of a group."""
    x, y = _pairs(rows, suite, group)
    sparsity = jnp.asarray([suite.members[j].sparsity for j in group], jnp.float32)
    k_max = int(max(suite.members[j].sparsity for j in group)) if suite.recipe.top else 0
    by_latent = suite.mesh is not None and suite.shard == "latent"
    sparse = suite.recipe.top and _on_cpu() and not by_latent and stack.silent.shape[1] >= PAIRS_FROM * k_max
    one = functools.partial(_step_one, step=i, recipe=suite.recipe, k_max=k_max, sparse=sparse)
    row = suite.recipe.batch_size * stack.silent.shape[1] * 6 * 4 / (suite.mesh.size if by_latent else 1)
    over = functools.partial(_over_saes, one, suite.recipe, fitting(row, budget=_SIDE_BY_SIDE))
    if suite.mesh is not None and suite.shard == "sae":
        spec = PartitionSpec(AXIS)
        over = jax.shard_map(over, mesh=suite.mesh, in_specs=spec, out_specs=spec, axis_names={AXIS}, check_vma=False)
    stack, stats = over(stack, x, y, sparsity, keys)
    if by_latent:
        stack = jax.lax.with_sharding_constraint(stack, shardings(suite, State(i, i, (stack,))).stacks[0])
    return stack, stats


def _programs(suite: Suite) -> list[tuple[int, ...]]:
    """Groups that are compiled together: all of them, but on a CPU each by itself.

    XLA's CPU runtime (jaxlib 0.10.2, two cores) hung for good when three groups ran side by side in one program.
    """
    every = tuple(range(len(suite.groups)))
    return [(g,) for g in every] if _on_cpu() else [every]


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _over_saes(function, recipe: Recipe, lanes: int, stack: Stack, *rest):
    """`vmap` of `lanes` at a time on accelerators. On a CPU one SAE after the other: its (batch, d_sae) arrays stay in the cache, 2-3 x faster.

    `function(..., revive)` is told whether any latent is dead: of all SAEs under `vmap`, where a branch cannot differ from SAE to SAE.
    """

    def call(stack, *rest, dead=None):
        return function(stack, *rest, jnp.any(_dead(stack, recipe)) if dead is None else dead)

    if not _on_cpu():
        together = functools.partial(call, dead=jnp.any(_dead(stack, recipe)))
        if lanes >= len(stack.silent):
            return jax.vmap(together)(stack, *rest)
        return jax.lax.map(lambda args: together(*args), (stack, *rest), batch_size=lanes)
    if len(stack.silent) == 1:  # no slicing of a stack of one: its matrices would be copied
        return jax.tree.map(lambda a: a[None], call(*jax.tree.map(lambda a: a[0], (stack, *rest))))
    return jax.lax.map(lambda args: call(*args), (stack, *rest))


def _step_one(
    stack: Stack, x, y, sparsity, key, revive, step, recipe: Recipe, k_max: int, sparse: bool
) -> tuple[Stack, objectives.Stats]:
    """One optimiser step of one SAE on one batch. `revive` is true where some latent may be dead."""
    decay = recipe.norm_decay
    norm_in = decay * stack.norm_in + (1 - decay) * _mean_norm(x)
    norm_out = decay * stack.norm_out + (1 - decay) * _mean_norm(y)
    x, y = _scale(x, norm_in), _scale(y, norm_out)
    dead = _dead(stack, recipe)
    if recipe.objective == "icl-sfc":
        gradient = jax.value_and_grad(icl_sfc.loss, has_aux=True)
        (loss, stats), grads = gradient(
            stack.params, x, y, sparsity * recipe.ramp(step), dead, key=key, revive=revive, loss_scale=recipe.loss_scale
        )
    else:
        level = sparsity if recipe.top else sparsity * recipe.ramp(step)
        loss = functools.partial(objectives.loss, x=x, y=y, sparsity=level, recipe=recipe, k_max=k_max, sparse=sparse)
        (loss, stats), grads = jax.value_and_grad(loss, has_aux=True)(stack.params)
        if recipe.k_aux:
            loss, grads = _add_auxiliary(loss, grads, stack.params, x, stats.err, dead, revive, recipe, key)
        stats = stats._replace(err=None)
    params, moments = optimiser.update(stack.params, stack.moments, grads, recipe, step, key=key)
    silent = jnp.where(stats.count > 0, 0, stack.silent + 1)
    rate = None if stack.rate is None else stack.rate + (stats.count / len(x) - stack.rate) / recipe.dead_after
    if recipe.resample_every:
        due = ((step + 1) % recipe.resample_every == 0) & revive
        again = lambda p, m: optimiser.resample(p, m, dead, x, y, recipe, key=key)
        params, moments = jax.lax.cond(due, again, lambda p, m: (p, m), params, moments)
        silent = jnp.where(due & dead, 0, silent)
    bad_step = jnp.where((stack.bad_step < 0) & ~jnp.isfinite(loss), step, stack.bad_step)
    return Stack(
        params, moments, silent, rate, norm_in, norm_out, _smooth(stack.threshold, stats.least), bad_step
    ), stats


def _add_auxiliary(loss, grads: Params, params: Params, x, err, dead, revive, recipe: Recipe, key):
    """Loss and gradients with those of the auxiliary loss where `revive` is true.

    The branch is around a gradient of its own: inside a loss, the branch not taken would give a gradient of zeros to add, and around
    the whole gradient it would keep that from running beside the rest.
    """

    def add(loss, grads):
        more, slope = jax.value_and_grad(objectives.auxiliary)(params, x, err, dead, recipe, key=key)
        return loss + more, jax.tree.map(jnp.add, grads, slope)

    return jax.lax.cond(revive, add, lambda *same: same, loss, grads)


def _smooth(threshold: Array, least: Array) -> Array:
    """Running mean of the smallest feature kept."""
    new = jnp.where(threshold < 0, least, THRESHOLD_DECAY * threshold + (1 - THRESHOLD_DECAY) * least)
    return jnp.where(jnp.isfinite(least), new, threshold)


def _fold(one: Stack, member: Member, recipe: Recipe, metadata: Mapping) -> SAE:
    """An SAE of raw activations from one row of a stack."""
    p = Params(*(None if w is None else w.astype(jnp.float32) for w in one.params))
    W_enc = p.W_enc.T if recipe.top else p.W_enc
    gain_in = math.sqrt(W_enc.shape[0]) / one.norm_in
    gain_out = math.sqrt(p.W_dec.shape[1]) / one.norm_out
    W_dec = p.W_dec / gain_out
    # one factor for all latents of topk, which compares them
    norms = jnp.ones(len(W_dec)) / gain_out if recipe.objective == "topk" else jnp.linalg.norm(W_dec, axis=1) + 1e-12
    gated = p.r_mag is not None
    scale = jnp.ones(len(W_dec)) if gated else norms
    extra = {"r_mag": p.r_mag + jnp.log(norms), "b_mag": p.b_mag * norms} if gated else {}
    if recipe.objective in ("jumprelu", "batchtopk"):
        extra["threshold"] = norms * (jnp.maximum(one.threshold, 0) if recipe.top else jnp.exp(p.log_threshold))
    if recipe.objective == "topk":
        extra["k"] = int(member.sparsity)
    if p.W_skip is not None:
        extra["W_skip"] = p.W_skip * (gain_in / gain_out)
    meta = (
        {"training_steps": recipe.n_steps, "training_batch": recipe.batch_size}
        | dict(metadata)
        | {"sparsity": member.sparsity}
    )
    return SAE(
        W_enc=W_enc * gain_in * scale[None],
        b_enc=p.b_enc * scale,
        W_dec=W_dec / norms[:, None],
        b_dec=p.b_dec / gain_out,
        site_in=member.site,
        site_out=output_site(member.site),
        architecture="gated" if gated else recipe.objective,
        metadata=tuple(sorted(meta.items())),
        **extra,
    )


def stop_if_bad(means: Means, suite: Suite) -> None:
    """Raises `TrainingError` with the step and site of the first loss that was not finite."""
    bad = np.asarray(means.bad_step)
    if (bad >= 0).any():
        i = int(np.argmin(np.where(bad >= 0, bad, np.iinfo(bad.dtype).max)))
        raise TrainingError(
            f"the loss of the SAE at {suite.members[i].site} is not finite at step {bad[i]}: check its activations for inf or NaN "
            "(float16 overflows at 65504), or lower the learning rate"
        )
