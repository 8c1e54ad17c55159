"""Nodes in order of their effect: the form in which circuits enter an ablation.

A circuit of n nodes is "the first n of a ranking". A rank per node, compared with a count inside the compiled program,
serves every size of circuit at once; no mask is ever stored.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from icl_lib.circuits.effects import Effects, Suite
from icl_lib.files.processes import to_host
from icl_lib.models import Site

UNRANKED = 2**30  # rank of a node that does not help; larger than any count of nodes
_NEAREST = 5  # free nodes among which a matched stand-in is drawn
ALL = 2**31 - 1  # upper end of a range of ranks that takes every node


class Ranking(eqx.Module):
    """Nodes of every task in order: rank 0 is the most helpful, `UNRANKED` one that does not help.

    Column j of a site's table belongs to latent `latent[site][task, j]`; rows are groups. All ranks are below `n`,
    which is the number of ranked nodes unless ranks are left empty (`random_ranking`). `whole` says that the columns
    are all latents in their own order.
    """

    rank: dict[Site, Int[Array, "tasks n_groups _"]]
    latent: dict[Site, Int[Array, "tasks _"]]
    n: Int[Array, " tasks"]
    whole: bool = eqx.field(static=True, default=True)

    def count(self, n: Int[Array | np.ndarray, " tasks"]) -> Int[np.ndarray, " tasks"]:
        """How many nodes each task has with a rank below n[task]."""
        below = np.asarray(n)[:, None, None]
        return np.sum([(np.asarray(table) < below).sum(axis=(1, 2)) for table in self.rank.values()], axis=0)


def rank_nodes(effects: Effects) -> Ranking:
    """All latents with a positive effect, in its order, task by task. `effects` of stacked tasks."""
    if effects.metric.ndim != 1:
        raise ValueError(
            "rank_nodes takes the effects of stacked tasks; compute them with stack_prompts([prompts, ...])"
        )
    sites = list(effects.latents)
    tables = {site: to_host(effects.latents[site]) for site in sites}
    n_tasks = len(next(iter(tables.values())))
    values = np.concatenate([tables[site].reshape(n_tasks, -1) for site in sites], axis=1)
    ranks = np.full(values.shape, UNRANKED, np.int32)
    for row, out in zip(values, ranks, strict=True):
        (positive,) = np.nonzero(row > 0)
        out[positive[np.argsort(-row[positive], kind="stable")]] = np.arange(len(positive), dtype=np.int32)
    ends = np.cumsum([tables[site][0].size for site in sites])
    parts = np.split(ranks, ends[:-1], axis=1)
    rank = {site: jnp.asarray(part.reshape(tables[site].shape)) for site, part in zip(sites, parts, strict=True)}
    latent = {s: jnp.asarray(np.tile(np.arange(t.shape[-1], dtype=np.int32), (n_tasks, 1))) for s, t in tables.items()}
    return Ranking(rank, latent, jnp.asarray((ranks < UNRANKED).sum(axis=1), jnp.int32))


def compact(ranking: Ranking, n: int) -> Ranking:
    """The same ranking with only the latents that have a node among the first `n`, for passes that ablate at most n.

    The number of columns is a power of two common to all tasks, so that few shapes have to be compiled; spare columns
    carry the rank `ALL`, which no range contains.
    """
    rank, latent = {}, {}
    for site, table in ranking.rank.items():
        table, latents = np.asarray(table), np.asarray(ranking.latent[site])
        used = (table < n).any(axis=1)
        width = min(max(8, 1 << int(used.sum(axis=1).max() - 1).bit_length()), table.shape[-1])
        order = np.argsort(~used, axis=1, kind="stable")[:, :width]
        spare = ~np.take_along_axis(used, order, axis=1)
        columns = np.take_along_axis(table, order[:, None], axis=2)
        rank[site] = jnp.asarray(np.where(spare[:, None], ALL, columns).astype(np.int32))
        latent[site] = jnp.asarray(np.take_along_axis(latents, order, axis=1))
    return Ranking(rank, latent, ranking.n, whole=False)


def _stand_ins(table, free, push, site_key) -> np.ndarray:
    """Ranks (tasks, groups, latents) of stand-ins for those of `table`: a node's is one of the free nodes nearest to it
    in the logarithm of its push.
    """
    rng, level = np.random.default_rng(np.asarray(jax.random.key_data(site_key))), np.log(np.maximum(push, 1e-12))
    ranks = np.full(table.shape, UNRANKED, np.int32)
    for task, group in np.ndindex(table.shape[:2]):
        left = list(np.flatnonzero(free[task, group]))
        nodes = np.flatnonzero(table[task, group] < UNRANKED)
        for node in nodes[np.argsort(table[task, group, nodes])][: len(left)]:
            near = np.argsort(np.abs(level[task, group, left] - level[task, group, node]), kind="stable")
            ranks[task, group, left.pop(rng.choice(near[:_NEAREST]))] = table[task, group, node]
    return ranks


def random_ranking(
    ranking: Ranking,
    effects: Effects,
    n: Int[Array | np.ndarray, " tasks"],
    *,
    key: PRNGKeyArray,
    suite: Suite | None = None,
) -> Ranking:
    """A control for the first n[task] nodes of `ranking`: a random node in place of each, of the same site and group.

    Nodes are drawn without repetition among the active ones outside of these n; active means that the latent fires in
    the group in the prompts of `effects`. A drawn node has the rank of the node that it stands for, so the first k of
    the control have as many nodes at every site and group as the first k of the circuit, for every k <= n. Where a
    group has too few active nodes, the circuit's last ones there have no stand-in and their ranks stay empty;
    `Ranking.count` says how many nodes there are. For k far below n, draw anew with n = k: this draw leaves out the
    other n - k nodes as well.

    With the `suite` of the effects the stand-ins are matched in what they write as well: drawn among the nearest
    in mean activation times length of the decoder row, which is how far ablation pushes the stream.
    """
    limit = jnp.minimum(jnp.asarray(n, jnp.int32), ranking.n)
    rank = {}
    for site_key, (site, table) in zip(jax.random.split(key, len(ranking.rank)), ranking.rank.items(), strict=True):
        circuit = np.asarray(table) < np.asarray(limit)[:, None, None]
        means = to_host(effects.means[site])
        free = (means > 0) & ~circuit
        if suite is not None:
            push = means * np.linalg.norm(np.asarray(suite[site].W_dec, np.float32), axis=-1)
            own = np.where(circuit, np.asarray(table), UNRANKED)
            rank[site] = jnp.asarray(_stand_ins(own, free, push, site_key))
            continue
        score = np.where(free, np.asarray(jax.random.uniform(site_key, table.shape)), -1.0)
        place = np.argsort(
            np.argsort(-score, axis=-1, kind="stable"), axis=-1, kind="stable"
        )  # in the order of the draw
        taken = np.sort(
            np.where(circuit, np.asarray(table), UNRANKED), axis=-1
        )  # ranks of this site and group, then none
        rank[site] = jnp.asarray(np.where(free, np.take_along_axis(taken, place, axis=-1), UNRANKED).astype(np.int32))
    return Ranking(rank, ranking.latent, limit)


def restrict(ranking: Ranking, suite: Suite) -> Ranking:
    """The ranking without the sites that `suite` lacks. Raises `ValueError` if a site of the suite was never ranked."""
    if missing := [str(site) for site in suite if site not in ranking.rank]:
        raise ValueError(
            f"the ranking has no nodes at {', '.join(missing)}: compute the effects for all layers that are ablated"
        )
    pick = lambda tables: {site: tables[site] for site in suite}
    return Ranking(pick(ranking.rank), pick(ranking.latent), ranking.n, ranking.whole)
