r"""Nulls with the same chances as the claim: the best of k random latents, chosen as the best of k candidates is.

A task's executor is the candidate that takes most from its loss on one pool of pairs, and is judged on another. A
single random latent had no such choice. The null is therefore a *set* of as many latents, each as active as the
candidate it stands for, from which the best is chosen on the first pool and judged on the second. The p-value of a task
is $(1 + \#\{\text{draws that do as well}\}) / (1 + \text{draws})$ (Phipson and Smyth, 2010), and over the tasks
the rate of false discoveries is held by Benjamini and Hochberg's rule (1995).

Sets of one dictionary overlap, and its few best latents win in many of them, so that such p-values are smaller than
those of independent draws. How often the verdict passes by chance is therefore measured: random sets take the
candidates' place, one after the other, and are judged in the same way.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from scipy.stats import false_discovery_control

from icl_lib.models import Site, Transformer, run_with_cache
from icl_lib.saes import SAE


def mean_activity(
    model: Transformer, sae: SAE, tokens: Int[Array, "tasks batch seq"], real: Bool[Array, "tasks batch seq"]
) -> Float[np.ndarray, " d_sae"]:
    """The mean activation of every latent over the tokens that `real` marks, all tasks together."""

    def total(rows, mask):
        cache: dict[Site, Array] = run_with_cache(model, rows, [sae.site_in])[1]
        return jnp.where(mask[..., None], sae.encode(cache[sae.site_in]).astype(jnp.float32), 0.0).sum(axis=(0, 1))

    sums = [total(rows, jnp.asarray(mask)) for rows, mask in zip(tokens, real, strict=True)]
    return np.asarray(sum(sums)) / max(float(np.sum(real)), 1.0)


@partial(jax.jit, static_argnames="draws")
def _draw(near: Bool[Array, "n pool"], draws: int, key: PRNGKeyArray) -> Int[Array, "draws n"]:
    """For each draw one of the near ones for each candidate, none twice: candidates choose in random order."""

    def one(key):
        order_key, *keys = jax.random.split(key, 1 + near.shape[0])
        order = jax.random.permutation(order_key, near.shape[0])

        def choose(taken, at):
            row, key = at
            free = 1.0 + near[row].astype(jnp.float32)  # any other where no near one is left
            chosen = jnp.argmax(jnp.where(taken, 0.0, free + jax.random.uniform(key, free.shape)))
            return taken.at[chosen].set(True), chosen

        chosen = jax.lax.scan(choose, jnp.zeros(near.shape[1], bool), (order, jnp.stack(keys)))[1]
        return jnp.zeros(near.shape[0], jnp.int32).at[order].set(chosen.astype(jnp.int32))

    return jax.lax.map(one, jax.random.split(key, draws))


def matched_sets(
    activity: Float[np.ndarray, " d_sae"], candidates: Int[np.ndarray, " n"], draws: int, *, key: PRNGKeyArray
) -> Int[np.ndarray, "draws n"]:
    """Random sets of as many latents as there are candidates: each stands for one of them and is about as active.

    The latent for a candidate is drawn from those nearest to it in the logarithm of the mean activation: from twice as
    many as there are candidates, fifty at least. Candidates and latents that never fire are in no set, and no latent is
    twice in one. Raises `ValueError` if there are fewer such latents than candidates.
    """
    pool = np.setdiff1d(np.flatnonzero(np.asarray(activity) > 0), candidates)
    if len(pool) < len(candidates):
        raise ValueError(
            f"{len(pool)} active latents are left beside {len(candidates)} candidates, too few for a set of equal "
            "size: take fewer candidates, or count activity on more text"
        )
    level = np.log(np.maximum(activity, 1e-12))
    distance = np.abs(level[np.asarray(candidates)][:, None] - level[pool])
    rank = distance.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    near = rank < max(50, 2 * len(candidates))
    return pool[np.asarray(_draw(jnp.asarray(near), draws, key))]


def best_of(
    choosing: Float[np.ndarray, "tasks d_sae"],
    judging: Float[np.ndarray, "tasks d_sae"],
    sets: Int[np.ndarray, "draws n"],
) -> Float[np.ndarray, "draws tasks"]:
    """The effect, on the judging pairs, of the latent of each set that is best for a task on the choosing pairs.

    Effects of latents that are in no set may be NaN.
    """
    best = np.take_along_axis(sets[:, None, :], choosing.T[sets].argmax(axis=1)[:, :, None], axis=2)[..., 0]
    return judging[np.arange(len(judging)), best]


def p_values(own: Float[np.ndarray, " tasks"], null: Float[np.ndarray, "draws tasks"]) -> Float[np.ndarray, " tasks"]:
    """How often the null does as well as a task's own latent, itself counted in; NaN where that has no effect."""
    p = (1 + (null >= own).sum(axis=0)) / (1 + len(null))
    return np.where(np.isnan(own), np.nan, p)


def discoveries(p: Float[np.ndarray, " tasks"], rate: float = 0.05) -> Bool[np.ndarray, " tasks"]:
    """The tasks that stand out at this rate of false discoveries among those that stand out; never one without p."""
    known, found = np.isfinite(p), np.zeros(len(p), bool)
    if known.any():
        found[known] = false_discovery_control(p[known]) <= rate
    return found


class BestOfNull(eqx.Module):
    """The candidates' best latents against those of random sets.

    `own` is the effect of each task's best candidate on the judging pairs, `null` that of each random set, `p` the
    p-value, `stands` whether the task is a discovery with an effect of the bar or more, and `by_chance` the number of
    such tasks for each random set that was put in the candidates' place.
    """

    own: Float[np.ndarray, " tasks"]
    null: Float[np.ndarray, "draws tasks"]
    p: Float[np.ndarray, " tasks"]
    stands: Bool[np.ndarray, " tasks"]
    by_chance: Int[np.ndarray, " pretenders"]


def against_sets(
    choosing: Float[np.ndarray, "tasks d_sae"],
    judging: Float[np.ndarray, "tasks d_sae"],
    activity: Float[np.ndarray, " d_sae"],
    candidates: Int[np.ndarray, " n"],
    *,
    key: PRNGKeyArray,
    bar: float = 0.2,
    draws: int = 400,
    pretenders: int = 20,
) -> BestOfNull:
    """Judge the best candidates against the best of `draws` random sets, and `pretenders` such sets in their place.

    `choosing` and `judging` are the effects of all active latents on two pools of pairs (NaN for the others). Where
    fewer than twice as many other latents are active as there are candidates, nothing is known: no draws, p is NaN and
    no task stands out.
    """
    pool = np.setdiff1d(np.flatnonzero(np.asarray(activity) > 0), candidates)
    if len(pool) < 2 * len(candidates):
        own = best_of(choosing, judging, np.asarray(candidates)[None])[0]
        unknown = np.full(len(own), np.nan)
        return BestOfNull(own, np.zeros((0, len(own))), unknown, np.zeros(len(own), bool), np.zeros(0, int))

    def judged(chosen, activity, key):
        null = best_of(choosing, judging, matched_sets(activity, chosen, draws, key=key))
        own = best_of(choosing, judging, chosen[None])[0]
        p = p_values(own, null)
        return own, null, p, discoveries(p) & (own >= bar)

    keys = jax.random.split(key, pretenders + 2)
    without = np.where(np.isin(np.arange(len(activity)), candidates), 0.0, activity)
    sets = matched_sets(activity, candidates, pretenders, key=keys[0])
    by_chance = [judged(chosen, without, k)[3].sum() for chosen, k in zip(sets, keys[2:], strict=True)]
    return BestOfNull(*judged(np.asarray(candidates), activity, keys[1]), np.array(by_chance, int))
