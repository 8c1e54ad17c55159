r"""Ablation of nodes inside the forward pass, and the faithfulness of what is left.

At the tokens of its groups an ablated latent is taken out of what the SAE writes; everything else stays:

$$y' = y + \sum_i g_{k(t), i}\,(v_{k(t), i} - f_i(x))\, W_{dec, i} ,$$

with k(t) the group of token t, g = 1 for ablated nodes and v = 0 (zero ablation) or the mean activation in the group
(mean ablation). Since y = decode(f) + err, the error is kept, and with nothing ablated the pass is the plain one. Later
SAEs see the ablated stream. Faithfulness of a set of nodes C is (m(C) - m(empty)) / (m(M) - m(empty)).

Which nodes are ablated is never stored as a mask: nodes carry a rank (0 = most helpful), and a pass ablates those with
lo <= rank < hi. A latent of a folded SAE does not depend on its neighbours, so a pass that ablates few nodes computes
only the latents of those (`compact`), which is the same function at a fraction of the cost.

Source: ICL-SFC, Sec. 4.1, Eq. (4); SFC, Sec. 3.2.
"""

from collections.abc import Iterable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from icl_lib.circuits.effects import Effects, Metric, Patch, Suite, sites_of, suite_in_layers
from icl_lib.circuits.groups import Groups
from icl_lib.circuits.ranking import ALL, UNRANKED, Ranking, compact, rank_nodes, restrict
from icl_lib.models import Site, Tap, Transformer, compose, record
from icl_lib.models.batches import check_stacked, map_tasks


def splice(
    suite: Suite,
    index: Int[Array, "b s"],
    gate: dict[Site, Bool[Array, "n_groups _"]],
    values: dict[Site, Array] | None,
) -> Tap:
    """The tap that ablates the latents of `suite` at the groups where `gate` is true; `values` None puts zero in."""
    pending: dict[Site, Array] = {}

    def tap(site, x):
        if site in suite:
            sae = suite[site]
            f = sae.encode(x.astype(sae.W_enc.dtype))
            put = jnp.zeros_like(f) if values is None else values[site].astype(f.dtype)[index]
            pending[sae.site_out] = jnp.where(gate[site][index], put - f, jnp.zeros_like(f)) @ sae.W_dec
        if site in pending:
            x = x + pending.pop(site).astype(x.dtype)
        return x

    return tap


class Setting(eqx.Module):
    """All that stays the same in an ablation experiment: made by `prepare`.

    `resid` is the clean residual at the first layer with SAEs, from which every pass starts; `full` and `empty` are
    m(M) and m(empty) of every task, in units of the metric.
    """

    model: Transformer
    suite: Suite
    batch: Any
    groups: Groups
    resid: Float[Array, "tasks b s d_model"]
    means: dict[Site, Float[Array, "tasks n_groups _"]] | None
    full: Float[Array, " tasks"]
    empty: Float[Array, " tasks"]
    first: int = eqx.field(static=True)
    metric: Metric = eqx.field(static=True)

    @property
    def n_tasks(self) -> int:
        """The number of stacked tasks."""
        return self.full.shape[0]

    def faithfulness(self, value: Float[Array, "tasks ..."]) -> Float[Array, "tasks ..."]:
        """(m - m(empty)) / (m(M) - m(empty)), with the tasks on the first axis; NaN where m(M) = m(empty)."""
        column = lambda a: a.reshape(-1, *[1] * (value.ndim - 1))
        return _share(value, column(self.empty), column(self.full))

    def per_task(self):
        """What one pass needs of every task: batch, groups, residual and mean activations."""
        return self.batch, self.groups, self.resid, self.means


def _share(value, empty, full):
    gap = full - empty
    return (value - empty) / jnp.where(gap == 0, jnp.nan, gap)


def run_ablated(setting: Setting, sub: Suite, means, batch, groups, resid, rank, lo, hi) -> Float[Array, ""]:
    """Metric of one task with the nodes lo <= rank < hi ablated."""
    # The row of "none" holds no nodes: tokens without a group are left as they are.
    gate = {site: ((r >= lo) & (r < hi)).at[0].set(False) for site, r in rank.items()}
    cache: dict[Site, Array] = {}
    tap = compose(splice(sub, groups.index, gate, means), record(sites_of(setting.model, setting.metric), cache))
    return jnp.mean(setting.metric(setting.model.run_from(setting.first, resid, tap=tap), cache, batch))


def columns_of(setting: Setting, latent, means, whole: bool):
    """SAEs and mean activations of the columns of one task's ranking."""
    if whole:
        return setting.suite, means
    sub = {site: sae.take(latent[site]) for site, sae in setting.suite.items()}
    return sub, None if means is None else {site: m[:, latent[site]] for site, m in means.items()}


@eqx.filter_jit
def _evaluate(
    setting: Setting, ranking: Ranking, lo: Int[Array, "tasks n"], hi: Int[Array, "tasks n"]
) -> Float[Array, "tasks n"]:
    """Metric of every task for each of its ranges of ranks."""

    def task(batch, groups, resid, means, rank, latent, lo, hi):
        sub, means = columns_of(setting, latent, means, ranking.whole)
        one = lambda ends: run_ablated(setting, sub, means, batch, groups, resid, rank, *ends)
        return jax.lax.map(one, (lo, hi))

    lead = (setting.n_tasks,)
    return map_tasks(task, *setting.per_task(), ranking.rank, ranking.latent, lo, hi, lead=lead)


@eqx.filter_jit
def _prefix(model, tokens, first: int):
    """Residual at block `first` of every task."""

    def task(tokens):
        cache: dict[Site, Array] = {}
        model(tokens, tap=record([Site("resid_pre", first)], cache))
        return cache[Site("resid_pre", first)]

    return map_tasks(task, tokens, lead=tokens.shape[:-2])


def prepare(
    model: Transformer,
    suite: Suite,
    batch: Any,
    *,
    layers: Iterable[int] | int,
    metric: Metric,
    groups: Groups | None = None,
    patch: Patch = "zero",
    empty: Literal["all", "positive"] = "all",
    effects: Effects | None = None,
) -> Setting:
    """The setting of ablations in `layers` on stacked prompts (usually held out), with m(M) and m(empty) of every task.

    `groups` are by role by default. m(empty) ablates all latents of the range at all groups, or with "positive" only
    those with a positive effect. `effects` of the same tasks is needed for "positive" and for mean ablation. Raises
    `ValueError` on a layer out of range, a layer without SAEs, prompts that are not stacked, too short or longer than
    the model's context, missing effects, or a metric that reads a site before the first of these layers.
    """
    n_tasks = check_stacked(batch, "an ablation")
    if patch not in ("zero", "mean") or empty not in ("all", "positive"):
        raise ValueError(f"patch must be 'zero' or 'mean' and empty 'all' or 'positive', got {patch!r} and {empty!r}")
    if effects is None and (patch == "mean" or empty == "positive"):
        raise ValueError(
            "mean ablation and empty='positive' need the effects of these tasks: pass effects=node_effects(...)"
        )
    suite = suite_in_layers(model, suite, layers)
    first = next(iter(suite)).layer
    for site in sites_of(model, metric):
        if site.name == "embed" or (site.layer is not None and site.layer < first):
            raise ValueError(
                f"the metric reads {site}, before layer {first}, the first that is ablated: nothing changes there"
            )
    groups = Groups.by_role(batch) if groups is None else groups
    means = {site: effects.means[site] for site in suite} if patch == "mean" else None
    unknown = jnp.zeros(n_tasks)
    resid = _prefix(model, batch.tokens, first)
    setting = Setting(model, suite, batch, groups, resid, means, unknown, unknown, first, metric)
    if empty == "positive":
        ranking = restrict(rank_nodes(effects), suite)
    else:
        rank = {site: jnp.zeros((n_tasks, groups.n, sae.d_sae), jnp.int32) for site, sae in suite.items()}
        latent = {site: jnp.zeros((n_tasks, sae.d_sae), jnp.int32) for site, sae in suite.items()}
        ranking = Ranking(rank, latent, unknown.astype(jnp.int32))
    lo, hi = jnp.zeros((n_tasks, 2), jnp.int32), jnp.tile(jnp.array([0, UNRANKED], jnp.int32), (n_tasks, 1))
    values = _evaluate(setting, ranking, lo, hi)
    return eqx.tree_at(lambda s: (s.full, s.empty), setting, (values[:, 0], values[:, 1]))


def _fitting(setting: Setting, ranking: Ranking, n: int | None) -> Ranking:
    """The ranking for the SAEs of the setting, compact where at most n nodes are ablated."""
    if ranking.n.shape[0] != setting.n_tasks:
        raise ValueError(
            f"the ranking is of {ranking.n.shape[0]} tasks and the prompts are of {setting.n_tasks}: stack the same "
            "tasks in both"
        )
    if (rows := next(iter(ranking.rank.values())).shape[1]) != setting.groups.n:
        raise ValueError(
            f"nodes are ranked in {rows - 1} groups of tokens, but the ablation has {setting.groups.n - 1}: give "
            "both the same groups"
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
    with these nodes ablated and all others kept. A count beyond the ranked nodes takes all of them.

    NaN for a task with m(M) = m(empty), where ablating everything changes nothing.
    """
    if mode not in ("keep", "inverse"):
        raise ValueError(f"mode must be 'keep' or 'inverse', got {mode!r}")
    counts = list(counts)
    ranking = _fitting(setting, ranking, max(counts) if mode == "inverse" else None)
    n = jnp.minimum(jnp.asarray(counts, jnp.int32)[None, :], ranking.n[:, None])
    ends = (n, jnp.full_like(n, ALL)) if mode == "keep" else (jnp.zeros_like(n), n)
    return setting.faithfulness(_evaluate(setting, ranking, *ends))


@eqx.filter_jit
def _halve(setting: Setting, ranking: Ranking, target: float, n_max: Int[Array, " tasks"]):
    def task(batch, groups, resid, means, rank, latent, full, empty, n_max):
        sub, means = columns_of(setting, latent, means, ranking.whole)
        zero = jnp.int32(0)

        def below(n):
            value = run_ablated(setting, sub, means, batch, groups, resid, rank, zero, n)
            return _share(value, empty, full) < target

        def step(state):
            low, high, reached = state  # the metric is not below at low, and is at high once reached
            n = jnp.where(reached, (low + high) // 2, jnp.clip(2 * low, 1, n_max))
            hit = below(n)
            return jnp.where(hit, low, n), jnp.where(hit, n, high), reached | hit

        going = lambda state: jnp.where(state[2], state[1] - state[0] > 1, state[0] < n_max)
        _, high, reached = jax.lax.while_loop(going, step, (zero, n_max, jnp.array(False)))
        return high, reached

    ends = (setting.full, setting.empty, n_max)
    return map_tasks(task, *setting.per_task(), ranking.rank, ranking.latent, *ends, lead=n_max.shape)


def nodes_to_halve(
    setting: Setting, ranking: Ranking, target: float = 0.5, max_nodes: int = 1024
) -> tuple[Int[Array, " tasks"], Bool[Array, " tasks"]]:
    """How many of the first nodes have to be ablated until a task's own faithfulness is below `target`.

    The count is doubled until that happens and the last doubling is bisected, so where the curve is not monotone it is
    the first crossing seen at powers of two. The second array says whether it happened within `max_nodes` (and the
    ranked nodes); where it did not, as in a task with m(M) = m(empty), the count is that limit.
    """
    ranking = _fitting(setting, ranking, max_nodes)
    return _halve(setting, ranking, target, jnp.minimum(ranking.n, jnp.int32(max_nodes)))


@eqx.filter_jit
def _cross(setting: Setting, ranking: Ranking, n: Int[Array, " tasks"]) -> Float[Array, "ablated tested"]:
    def ablated(rank, latent, n):
        sub, _ = columns_of(setting, latent, None, ranking.whole)

        def tested(batch, groups, resid, means):
            if not (ranking.whole or means is None):
                means = {site: m[:, latent[site]] for site, m in means.items()}
            return run_ablated(setting, sub, means, batch, groups, resid, rank, jnp.int32(0), n)

        return map_tasks(tested, *setting.per_task(), lead=n_tasks)

    n_tasks = (setting.n_tasks,)
    return map_tasks(ablated, ranking.rank, ranking.latent, n, lead=n_tasks)


def task_matrix(setting: Setting, ranking: Ranking, n: Int[Array, " tasks"]) -> Float[Array, "ablated tested"]:
    """Faithfulness of the tested task when the first n[a] nodes of task a are ablated in its prompts.

    m(empty), m(M) and mean activations are those of the tested task; the change shown in the paper is this minus 1.
    """
    n = jnp.asarray(n, jnp.int32)
    ranking = _fitting(setting, ranking, int(n.max()))
    return setting.faithfulness(_cross(setting, ranking, n).T).T
