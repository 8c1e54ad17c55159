r"""Ablation of nodes inside the forward pass, and the faithfulness of what is left.

At the positions of its roles an ablated latent is taken out of what the SAE writes; everything else stays:

$$y' = y + \sum_i g_{r(t), i}\,(v_{r(t), i} - f_i(x))\, W_{dec, i} ,$$

with g = 1 for ablated nodes and v = 0 (zero ablation) or the mean activation at the role (mean ablation). Since
y = decode(f) + err, the error is kept, and with nothing ablated the pass is the plain one. Later SAEs see the ablated
stream. Faithfulness of a set of nodes C is (m(C) - m(empty)) / (m(M) - m(empty)).

Which nodes are ablated is never stored as a mask: nodes carry a rank (0 = most helpful), and a pass ablates those with
lo <= rank < hi. A latent of a folded SAE does not depend on its neighbours, so a pass that ablates few nodes computes
only the latents of those (`compact`), which is the same function at a fraction of the cost.

Source: ICL-SFC, Sec. 4.1, Eq. (4); SFC, Sec. 3.2.
"""

from collections.abc import Iterable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float, Int

from icl_lib.circuits.effects import (
    KINDS,
    N_ROLES,
    Effects,
    Metric,
    Patch,
    Suite,
    map_tasks,
    node_roles,
    suite_in_layers,
)
from icl_lib.circuits.ranking import ALL, UNRANKED, Ranking, compact, rank_nodes, restrict
from icl_lib.models import Site, Tap, Transformer, record
from icl_lib.tasks import Prompts, Role
from icl_lib.tasks.metrics import pair_logprob


def splice(
    suite: Suite, roles: Int[Array, "b s"], gate: dict[Site, Bool[Array, "n_roles _"]], values: dict[Site, Array] | None
) -> Tap:
    """The tap that ablates the latents of `suite` at the roles where `gate` is true; `values` None puts zero in."""
    pending: dict[Site, Array] = {}

    def tap(site, x):
        if site in suite:
            sae = suite[site]
            f = sae.encode(x.astype(sae.W_enc.dtype))
            put = jnp.zeros_like(f) if values is None else values[site].astype(f.dtype)[roles]
            pending[sae.site_out] = jnp.where(gate[site][roles], put - f, jnp.zeros_like(f)) @ sae.W_dec
        if site in pending:
            x = x + pending.pop(site).astype(x.dtype)
        return x

    return tap


def gather_latents(sae, latent: Int[Array, " k"]):
    """`sae` with the named latents only; it encodes them as the whole does (its decoder bias is of no use)."""
    parts = lambda s: (s.W_enc, s.b_enc, s.threshold, s.W_dec)
    picked = (sae.W_enc[:, latent], sae.b_enc[latent], sae.threshold[latent], sae.W_dec[latent])
    return eqx.tree_at(parts, sae, picked)


class Setting(eqx.Module):
    """All that stays the same in an ablation experiment: made by `prepare`.

    `resid` is the clean residual at the first layer with SAEs, from which every pass starts; `full` and `empty` are m(M)
    and m(empty) of every task, in units of the metric.
    """

    model: Transformer
    suite: Suite
    prompts: Prompts
    roles: Int[Array, "tasks b s"]
    resid: Float[Array, "tasks b s d_model"]
    means: dict[Site, Float[Array, "tasks n_roles _"]] | None
    full: Float[Array, " tasks"]
    empty: Float[Array, " tasks"]
    first: int = eqx.field(static=True)
    metric: Metric = eqx.field(static=True)

    def faithfulness(self, value: Float[Array, "tasks ..."]) -> Float[Array, "tasks ..."]:
        """(m - m(empty)) / (m(M) - m(empty)), with the tasks on the first axis."""
        column = lambda a: a.reshape(-1, *[1] * (value.ndim - 1))
        return (value - column(self.empty)) / column(self.full - self.empty)


def _pass(setting: Setting, sub: Suite, means, prompts, roles, resid, rank, lo, hi) -> Float[Array, ""]:
    """Metric of one task with the nodes lo <= rank < hi ablated."""
    # The OTHER row holds no nodes: tokens without a role are left as they are.
    gate = {site: ((r >= lo) & (r < hi)).at[Role.OTHER].set(False) for site, r in rank.items()}
    tap = splice(sub, roles, gate, means)
    return jnp.mean(setting.metric(setting.model.run_from(setting.first, resid, tap=tap), prompts))


def _sub(setting: Setting, latent, means, whole: bool):
    """SAEs and mean activations of the columns of one task's ranking."""
    if whole:
        return setting.suite, means
    sub = {site: gather_latents(sae, latent[site]) for site, sae in setting.suite.items()}
    return sub, None if means is None else {site: m[:, latent[site]] for site, m in means.items()}


@eqx.filter_jit
def _evaluate(
    setting: Setting, ranking: Ranking, lo: Int[Array, "tasks n"], hi: Int[Array, "tasks n"]
) -> Float[Array, "tasks n"]:
    """Metric of every task for each of its ranges of ranks."""

    def task(prompts, roles, resid, means, rank, latent, lo, hi):
        sub, means = _sub(setting, latent, means, ranking.whole)
        one = lambda ends: _pass(setting, sub, means, prompts, roles, resid, rank, *ends)
        return jax.lax.map(one, (lo, hi))

    s = setting
    return map_tasks(task, s.prompts, s.roles, s.resid, s.means, ranking.rank, ranking.latent, lo, hi)


@eqx.filter_jit
def _prefix(model, prompts, first: int):
    """Residual at block `first` of every task."""

    def task(prompts):
        cache: dict[Site, Array] = {}
        model(prompts.tokens, tap=record([Site("resid_pre", first)], cache))
        return cache[Site("resid_pre", first)]

    return map_tasks(task, prompts)


def prepare(
    model: Transformer,
    suite: Suite,
    prompts: Prompts,
    *,
    layers: Iterable[int],
    patch: Patch = "zero",
    empty: Literal["all", "positive"] = "all",
    effects: Effects | None = None,
    metric: Metric = pair_logprob,
) -> Setting:
    """The setting of ablations in `layers` on stacked prompts (usually held out), with m(M) and m(empty) of every task.

    m(empty) ablates all latents of the range at all roles, or with "positive" only those with a positive effect. `effects`
    of the same tasks is needed for "positive" and for mean ablation. Raises `ValueError` on a layer out of range, a layer
    without SAEs, prompts that are not stacked or too short, or missing effects.
    """
    if prompts.tokens.ndim != 3:
        raise ValueError(
            f"ablations take stacked prompts (task, batch, seq), got tokens of shape {prompts.tokens.shape}: use stack_prompts"
        )
    if patch not in ("zero", "mean") or empty not in ("all", "positive"):
        raise ValueError(f"patch must be 'zero' or 'mean' and empty 'all' or 'positive', got {patch!r} and {empty!r}")
    if effects is None and (patch == "mean" or empty == "positive"):
        raise ValueError(
            "mean ablation and empty='positive' need the effects of these tasks: pass effects=node_effects(...)"
        )
    suite = suite_in_layers(model, suite, layers)
    first = next(iter(suite)).layer
    n_tasks = prompts.tokens.shape[0]
    means = {site: effects.means[site] for site in suite} if patch == "mean" else None
    unknown = jnp.zeros(n_tasks)
    setting = Setting(
        model,
        suite,
        prompts,
        node_roles(prompts),
        _prefix(model, prompts, first),
        means,
        unknown,
        unknown,
        first,
        metric,
    )
    if empty == "positive":
        ranking = restrict(rank_nodes(effects), suite)
    else:
        every = {site: jnp.zeros((n_tasks, N_ROLES, sae.d_sae), jnp.int32) for site, sae in suite.items()}
        ranking = Ranking(
            every,
            {s: jnp.zeros((n_tasks, sae.d_sae), jnp.int32) for s, sae in suite.items()},
            unknown.astype(jnp.int32),
        )
    lo, hi = jnp.zeros((n_tasks, 2), jnp.int32), jnp.tile(jnp.array([0, UNRANKED], jnp.int32), (n_tasks, 1))
    values = _evaluate(setting, ranking, lo, hi)
    return eqx.tree_at(lambda s: (s.full, s.empty), setting, (values[:, 0], values[:, 1]))


def _fitting(setting: Setting, ranking: Ranking, n: int | None) -> Ranking:
    """The ranking for the SAEs of the setting, compact where at most n nodes are ablated."""
    n_tasks = setting.full.shape[0]
    if ranking.n.shape[0] != n_tasks:
        raise ValueError(
            f"the ranking is of {ranking.n.shape[0]} tasks and the prompts are of {n_tasks}: stack the same tasks in both"
        )
    if len(ranking.rank) != len(setting.suite):
        raise ValueError(
            f"nodes are ranked at {len(ranking.rank)} sites, but the ablation covers {len(setting.suite)}: "
            "give node_effects and prepare the same layers, so that the counts of nodes mean the same"
        )
    ranking = restrict(ranking, setting.suite)
    return ranking if n is None else compact(ranking, n)


def faithfulness(
    setting: Setting, ranking: Ranking, counts: Iterable[int], mode: Literal["keep", "inverse"] = "keep"
) -> Float[Array, "tasks n_counts"]:
    """Faithfulness of every task with its `counts` first nodes kept and all others of the range ablated, or ("inverse")
    with these nodes ablated and all others kept. A count beyond the ranked nodes takes all of them."""
    if mode not in ("keep", "inverse"):
        raise ValueError(f"mode must be 'keep' or 'inverse', got {mode!r}")
    counts = list(counts)
    ranking = _fitting(setting, ranking, max(counts) if mode == "inverse" else None)
    n = jnp.minimum(jnp.asarray(counts, jnp.int32)[None, :], ranking.n[:, None])
    ends = (n, jnp.full_like(n, ALL)) if mode == "keep" else (jnp.zeros_like(n), n)
    return setting.faithfulness(_evaluate(setting, ranking, *ends))


@eqx.filter_jit
def _halve(setting: Setting, ranking: Ranking, target: float, n_max: Int[Array, " tasks"]):
    def task(prompts, roles, resid, means, rank, latent, full, empty, n_max):
        sub, means = _sub(setting, latent, means, ranking.whole)
        zero = jnp.int32(0)

        def below(n):
            value = _pass(setting, sub, means, prompts, roles, resid, rank, zero, n)
            return (value - empty) / (full - empty) < target

        def step(state):
            low, high, reached = state  # the metric is not below at low, and is at high once reached
            n = jnp.where(reached, (low + high) // 2, jnp.clip(2 * low, 1, n_max))
            hit = below(n)
            return jnp.where(hit, low, n), jnp.where(hit, n, high), reached | hit

        going = lambda state: jnp.where(state[2], state[1] - state[0] > 1, state[0] < n_max)
        _, high, reached = jax.lax.while_loop(going, step, (zero, n_max, jnp.array(False)))
        return high, reached

    s = setting
    return map_tasks(task, s.prompts, s.roles, s.resid, s.means, ranking.rank, ranking.latent, s.full, s.empty, n_max)


def nodes_to_halve(
    setting: Setting, ranking: Ranking, target: float = 0.5, max_nodes: int = 1024
) -> tuple[Int[Array, " tasks"], Bool[Array, " tasks"]]:
    """How many of the first nodes have to be ablated until a task's own faithfulness is below `target`.

    The count is doubled until that happens and the last doubling is bisected, so where the curve is not monotone it is
    the first crossing seen at powers of two. The second array says whether it happened within `max_nodes` (and the
    ranked nodes); where it did not, the count is that limit.
    """
    ranking = _fitting(setting, ranking, max_nodes)
    return _halve(setting, ranking, target, jnp.minimum(ranking.n, jnp.int32(max_nodes)))


@eqx.filter_jit
def _cross(setting: Setting, ranking: Ranking, n: Int[Array, " tasks"]) -> Float[Array, "ablated tested"]:
    def ablated(rank, latent, n):
        weights = (
            {} if ranking.whole else {site: gather_latents(sae, latent[site]) for site, sae in setting.suite.items()}
        )

        def tested(prompts, roles, resid, means):
            if ranking.whole:
                return _pass(setting, setting.suite, means, prompts, roles, resid, rank, jnp.int32(0), n)
            means = None if means is None else {site: m[:, latent[site]] for site, m in means.items()}
            return _pass(setting, weights, means, prompts, roles, resid, rank, jnp.int32(0), n)

        return map_tasks(tested, setting.prompts, setting.roles, setting.resid, setting.means)

    return map_tasks(ablated, ranking.rank, ranking.latent, n)


def task_matrix(setting: Setting, ranking: Ranking, n: Int[Array, " tasks"]) -> Float[Array, "ablated tested"]:
    """Faithfulness of the tested task when the first n[a] nodes of task a are ablated in its prompts.

    m(empty), m(M) and mean activations are those of the tested task; the change shown in the paper is this minus 1.
    """
    n = jnp.asarray(n, jnp.int32)
    ranking = _fitting(setting, ranking, int(n.max()))
    return setting.faithfulness(_cross(setting, ranking, n).T).T


@eqx.filter_jit
def _one_by_one(
    setting: Setting, site: Int[Array, " n"], role: Int[Array, " n"], latent: Int[Array, " n"]
) -> Float[Array, " n"]:
    prompts, roles, resid, means = jax.tree.map(
        lambda a: a[0], (setting.prompts, setting.roles, setting.resid, setting.means)
    )

    def node(args):
        site, role, latent = args
        column = {s: latent[None] % sae.d_sae for s, sae in setting.suite.items()}
        sub, value = _sub(setting, column, means, whole=False)
        here = jnp.arange(N_ROLES)[:, None] == role
        rank = {
            s: jnp.where(here & (site == i), jnp.int32(0), jnp.int32(UNRANKED)) for i, s in enumerate(setting.suite)
        }
        return _pass(setting, sub, value, prompts, roles, resid, rank, jnp.int32(0), jnp.int32(1))

    return jax.lax.map(node, (site, role, latent))


def brute_force_effects(setting: Setting, nodes: pd.DataFrame) -> Float[np.ndarray, " n"]:
    """m(M) - m(node ablated alone) of each row (layer, kind, latent, role) of a circuit's table, in a setting of one task.

    What `node_effects` approximates, with the same sign: positive means that the node helps.
    """
    if setting.full.shape[0] != 1:
        raise ValueError(
            f"brute_force_effects takes a setting of one task, got {setting.full.shape[0]}: prepare it with stack_prompts([prompts])"
        )
    index = {(site.layer, KINDS[site.name]): i for i, site in enumerate(setting.suite)}
    if lost := {(layer, kind) for layer, kind in zip(nodes.layer, nodes.kind, strict=True)} - set(index):
        raise ValueError(
            f"nodes at {sorted(lost)} are outside of the setting, which has {sorted(index)}: prepare it with these layers"
        )
    site = [index[layer, kind] for layer, kind in zip(nodes.layer, nodes.kind, strict=True)]
    role = [int(Role[name]) for name in nodes.role]
    to_array = lambda values: jnp.asarray(np.asarray(values), jnp.int32)
    return np.asarray(setting.full[0] - _one_by_one(setting, to_array(site), to_array(role), to_array(nodes.latent)))
