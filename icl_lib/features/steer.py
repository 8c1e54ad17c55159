r"""Which latent alone acts on which task: steering with one latent, the length to steer with, controls, and sharing.

The effect of a latent on a task is the relative loss decrease $(L_0 - L_f) / L_0$ when $s\,W_{dec}[f] / |W_{dec}[f]|$
is added at the cut token: 1 removes the whole loss, 0 does nothing, negative harms.

Source: ICL-SFC, Secs. 3.2 and 4.2, Figs. 5 and 7; the choice of the length and the controls are ours.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from icl_lib.models import Transformer, run_with_cache
from icl_lib.saes import SAE
from icl_lib.vectors import Cut, base_nll, inserted_nll, latent_directions, relative_change


def loss_decrease(
    model: Transformer, cut: Cut, directions: Float[Array, "n d_model"] | Float[Array, "tasks n d_model"]
) -> Float[np.ndarray, "tasks n"]:
    """Relative loss decrease with each direction added at the cut token of a stack of tasks.

    `directions` are the same for all tasks, or each task has its own; there may be none. NaN for a task that has no
    loss to lose. Raises `ValueError` if they do not fit the model.
    """
    every = jnp.broadcast_to(directions, (*cut.tasks, *directions.shape[-2:]))
    return -np.asarray(relative_change(inserted_nll(model, cut, every), base_nll(model, cut)))


def latent_decrease(
    model: Transformer, sae: SAE, cut: Cut, latents: Int[np.ndarray, " n"], scale: float | Float[np.ndarray, " n"]
) -> Float[np.ndarray, "tasks n"]:
    """`loss_decrease` of the decoder directions of `latents`, `scale` long or each of its own length.

    Raises `ValueError` on an unknown latent.
    """
    scale = scale if isinstance(scale, float) else jnp.asarray(scale, jnp.float32)
    return loss_decrease(model, cut, latent_directions(sae, jnp.asarray(latents, jnp.int32), scale))


def active_latents(
    model: Transformer,
    sae: SAE,
    tokens: Int[Array, "tasks batch seq"],
    real: Bool[Array, "tasks batch seq"] | None = None,
) -> Bool[np.ndarray, " d_sae"]:
    """Latents that fire on a token of any task: on any at all, or on those of a mask such as `prompts.real`."""
    real = jnp.ones(tokens.shape, bool) if real is None else jnp.asarray(real)
    resid = lambda rows: run_with_cache(model, rows, [sae.site_in])[1][sae.site_in]
    fires = lambda rows, mask: ((sae.encode(resid(rows)) > 0) & mask[..., None]).any(axis=(0, 1))
    return np.any([fires(rows, mask) for rows, mask in zip(tokens, real, strict=True)], axis=0)


def random_latents(
    active: Bool[np.ndarray, " d_sae"],
    n: int,
    exclude: Sequence[int] | Int[np.ndarray, " m"] = (),
    *,
    key: PRNGKeyArray,
) -> Int[np.ndarray, " n"]:
    """A control: n different latents drawn from the active ones without those in `exclude`.

    There are fewer than n where fewer are left, and none where none is: figures and percentiles then say so.
    """
    pool = np.setdiff1d(np.flatnonzero(active), np.asarray(exclude, int))
    if not len(pool):
        return np.zeros(0, np.int32)
    return np.asarray(jax.random.choice(key, jnp.asarray(pool, jnp.int32), (min(n, len(pool)),), replace=False))


def first_candidates(*kinds: Bool[np.ndarray, "... d_sae"], most: int = 100) -> Int[np.ndarray, " n"]:
    """The latents that are on in any row of the first of `kinds` that has one: those that survive, or else encode, ...

    All of the first kind; of a later one, which only stands in for it, the first `most`. Without any it is those of
    the dictionary, so that there is always something to try.
    """
    found = [np.flatnonzero(np.asarray(kind).reshape(-1, kind.shape[-1]).any(axis=0)) for kind in kinds]
    if len(found[0]):
        return found[0]
    return next((latents for latents in found if len(latents)), np.arange(kinds[0].shape[-1]))[:most]


def percentile_of(control: Float[np.ndarray, "tasks m"], percentile: float | int) -> Float[np.ndarray, " tasks"]:
    """The percentile of each task's control; NaN for an empty control, of which nothing is known."""
    return np.percentile(control, percentile, axis=1) if control.shape[1] else np.full(len(control), np.nan)


class LengthSweep(eqx.Module):
    """Effects against the length of the added direction.

    `norm` is the mean norm of the residual stream at the cut token, the unit of the multiples that were tried; `best`
    the decrease by the best latent of each task, `control` the 95th percentile of that by the control latents; both are
    NaN where there were no latents to try.
    """

    norm: float
    lengths: Float[np.ndarray, " k"]
    best: Float[np.ndarray, "tasks k"]
    control: Float[np.ndarray, "tasks k"]

    @property
    def margin(self) -> Float[np.ndarray, " k"]:
        """How far the best latent stands above the control, mean over the tasks with an effect; harm and no control
        count 0.
        """
        known = ~np.isnan(self.best).any(axis=1)
        above = np.maximum(self.best, 0) - np.maximum(np.nan_to_num(self.control), 0)
        return above[known].mean(axis=0) if known.any() else np.full(len(self.lengths), np.nan)

    @property
    def clearest(self) -> float:
        """The shortest length whose margin is within 2 % of the largest: the optimum, or the near end of a plateau.

        There is a plateau where the added vector outgrows the residual stream, since norms then remove its length.
        Where no margin is known, it is the length nearest to the norm of the residual stream.
        """
        if np.isnan(self.margin).all():
            return float(self.lengths[np.argmin(np.abs(self.lengths - self.norm))])
        top = np.nanmax(self.margin)
        return float(self.lengths[np.argmax(self.margin >= top - 0.02 * abs(top))])


def length_sweep(
    model: Transformer,
    sae: SAE,
    cut: Cut,
    latents: Int[np.ndarray, " n"],
    control: Int[np.ndarray, " m"],
    multiples: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5),
) -> LengthSweep:
    """Steer with every latent at lengths of `multiples` times the residual stream's norm. Raises as `latent_decrease`
    does.
    """
    norm = float(jnp.linalg.norm(cut.resid[..., 0, :].astype(jnp.float32), axis=-1).mean())
    lengths = norm * np.array(multiples)
    tried = lambda latents: [latent_decrease(model, sae, cut, latents, s) for s in lengths.tolist()]
    best = [found.max(axis=1) if found.size else np.full(len(found), np.nan) for found in tried(latents)]
    drawn = [percentile_of(found, 95) for found in tried(control)]
    return LengthSweep(norm, lengths, np.stack(best, axis=1), np.stack(drawn, axis=1))


def best_lengths(
    model: Transformer, sae: SAE, cut: Cut, latents: Int[np.ndarray, " n"], lengths: Sequence[float]
) -> Float[np.ndarray, " n"]:
    """For each latent the one of `lengths` at which it takes most from the loss of the task that it serves best.

    Choose on prompts other than those reported, and give a control the same choice: the best of many lengths flatters
    any latent. Source: ICL-SFC, App. F.2 (15 lengths from 32 to 316 on Gemma-2).
    """
    best = np.stack([latent_decrease(model, sae, cut, latents, s).max(axis=0) for s in lengths])
    return np.asarray(lengths, np.float32)[best.argmax(axis=0)]


def stands_out(
    own: Float[np.ndarray, " tasks"], control: Float[np.ndarray, "tasks m"], *, bar: float = 0.2, percentile: float = 95
) -> Bool[np.ndarray, " tasks"]:
    """Whether a task's latent decreases the loss by `bar` or more, and by more than that percentile of the control.

    Never where there is no control, or no effect is known.
    """
    return (own >= bar) & (own > percentile_of(control, percentile))


def serves_one(latents: Int[np.ndarray, " tasks"], labels: Sequence[str]) -> Bool[np.ndarray, " tasks"]:
    """Whether the latent of a task is that of tasks of one label only.

    With the tasks' names as labels: of no other task. With their groups: it may be shared, but inside the group.
    """
    latents, labels = np.asarray(latents), np.asarray(labels)
    return np.array([len(set(labels[latents == latent].tolist())) == 1 for latent in latents])
