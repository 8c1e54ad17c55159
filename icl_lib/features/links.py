r"""Detector to executor: does taking a detector out of the output tokens silence an executor at the arrows?

At layer l_d the residual is changed at the chosen positions, by one of

- steer:  $x' = x - s\,\bar a_d\,W_{dec,d} / |W_{dec,d}|$, with $\bar a_d$ the mean activation of d over
  all tokens of the prompts
- push:   $x' = x - \ell_t\,W_{dec,d} / |W_{dec,d}|$, with one length $\ell_t$ for every direction in task t: what a
  control needs, since random latents are less active and would be pushed less by the first rule
- ablate: $x' = x - f_d(x)\,W_{dec,d}$, the latent's own contribution taken out, no more

and the blocks up to the executors' layer run on it with their attention patterns frozen at the clean ones: values and
MLPs respond, queries and keys do not. The effect on executor e is the mean over arrows (the last token of each) at
which it was active of

$$p = 1 - \mathrm{clip}(f_e(x') / f_e(x), 0, 1) .$$

Nothing is filtered here. The paper divides each task by its maximum and averages over the tasks with an effect, as
`display_strength` does, after it has dropped pairs with max p < 0.1; `mean_strength` does none of this.

Source: ICL-SFC, Sec. 4.3, Fig. 8.
"""

from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from icl_lib.models import Site, Transformer, compose, record, replace
from icl_lib.models.batches import check_stacked, map_tasks
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Role
from icl_lib.vectors.insert import check_latents


class Links(eqx.Module):
    """Effects of detectors on executors, 0 (none) to 1 (silenced), task by task.

    `effect` has one slice per strength (one in all for ablation); it is NaN where the executor is active at no arrow of
    the task and 0 where the detector is never active. `peak` is max p over the arrows, 0 in both cases. `detector_mean`
    and `executor_mean` are the clean mean activations over all tokens and over arrows.
    """

    effect: Float[np.ndarray, "n_strengths tasks n_detectors n_executors"]
    peak: Float[np.ndarray, "n_strengths tasks n_detectors n_executors"]
    detector_mean: Float[np.ndarray, "tasks n_detectors"]
    executor_mean: Float[np.ndarray, "tasks n_executors"]


def _drop(
    f: Float[Array, "b s n"], clean: Float[Array, "b s n"], arrows: Bool[Array, "b s"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Mean and maximum of p = 1 - clip(f / clean, 0, 1) over the arrows with clean > 0; NaN and 0 without any."""
    on = (clean > 0) & arrows[:, :, None]
    ratio = jnp.clip(jnp.where(on, f, 0.0) / jnp.where(on, clean, 1.0), 0.0, 1.0)
    p = jnp.where(on, 1.0 - ratio, 0.0)
    return jnp.sum(p, axis=(0, 1)) / jnp.sum(on, axis=(0, 1)).astype(jnp.float32), jnp.max(p, axis=(0, 1))


@eqx.filter_jit
def _links(model, detectors: SAE, executors: SAE, tokens, roles, arrows, where, scales, mode: str):
    first, last = detectors.site_in, executors.site_in
    patterns = [Site("pattern", layer) for layer in range(first.layer, last.layer)]

    def task(tokens, roles, arrows, where, scales):
        cache: dict[Site, Array] = {}
        model(tokens, tap=record([first, last, *patterns], cache))
        x, frozen = cache[first], {site: cache[site] for site in patterns}
        f_d = detectors.encode(x.astype(detectors.W_enc.dtype)).astype(jnp.float32)
        f_e = executors.encode(cache[last].astype(executors.W_enc.dtype)).astype(jnp.float32)
        real = roles != Role.OTHER
        mean_d = jnp.sum(jnp.where(real[:, :, None], f_d, 0.0), axis=(0, 1)) / jnp.sum(real).astype(jnp.float32)
        mean_e = jnp.sum(jnp.where(arrows[:, :, None], f_e, 0.0), axis=(0, 1)) / jnp.sum(arrows).astype(jnp.float32)

        def one(node):
            index, scale = node
            row = detectors.W_dec[index].astype(jnp.float32)
            unit = row / jnp.maximum(jnp.linalg.norm(row), 1e-9)
            if mode == "ablate":
                shift = f_d[:, :, index][:, :, None] * row[None, None, :]
            else:
                length = scale if mode == "push" else scale * mean_d[index]
                shift = jnp.broadcast_to((length * unit)[None, None, :], x.shape)
            changed = x - jnp.where(where[:, :, None], shift, 0.0).astype(x.dtype)
            seen: dict[Site, Array] = {}
            model.run_from(first.layer, changed, tap=compose(replace(frozen), record([last], seen)))
            drop, peak = _drop(
                executors.encode(seen[last].astype(executors.W_enc.dtype)).astype(jnp.float32), f_e, arrows
            )
            silent = (mean_d[index] < 1e-6) & (mode != "push")
            return jnp.where(silent & ~jnp.isnan(drop), 0.0, drop), jnp.where(silent, 0.0, peak)

        grid = jnp.meshgrid(jnp.arange(mean_d.shape[0]), scales, indexing="ij")
        effect, peak = (x.reshape(*grid[0].shape, -1) for x in jax.lax.map(one, tuple(axis.ravel() for axis in grid)))
        return effect, peak, mean_d, mean_e

    return map_tasks(task, tokens, roles, arrows, where, scales, lead=tokens.shape[:1])


def detector_executor(
    model: Transformer,
    sae_detector: SAE,
    sae_executor: SAE,
    prompts: Prompts,
    detectors: Sequence[int] | Int[np.ndarray, " n_detectors"],
    executors: Sequence[int] | Int[np.ndarray, " n_executors"],
    *,
    positions: Literal["outputs", "all"] = "outputs",
    mode: Literal["steer", "ablate", "push"] = "steer",
    strengths: Sequence[float] = (50.0,),
    lengths: Float[np.ndarray, "tasks n_strengths"] | None = None,
) -> Links:
    """The effect of every detector on every executor in every task of stacked prompts, in one compiled program.

    Both SAEs are residual ones, the executors' later than the detectors'. There may be no detectors. `positions` are
    all tokens of outputs, or all tokens. Of the modes above, "steer" takes `strengths`, multiples of the detector's
    mean activation (the paper has 50), "push" takes `lengths`, in units of the residual stream, and "ablate" neither.
    Raises `ValueError` on other sites, an order that cannot act, unknown latents, lengths that do not fit, or prompts
    that are not stacked or too long.
    """
    first, last = sae_detector.site_in, sae_executor.site_in
    for what, site in (("detectors", first), ("executors", last)):
        if site.name != "resid_pre":
            raise ValueError(f"{what} must be latents of a residual SAE (resid_pre), got one at {site}")
        model.config.check_layer(site.layer, f"layer of the {what}")
    if first.layer >= last.layer:
        raise ValueError(
            f"detectors act on later layers, so their layer must be below that of the executors, got {first.layer} "
            f"and {last.layer}"
        )
    check_stacked(prompts, "detector_executor")
    if mode not in ("steer", "ablate", "push") or positions not in ("outputs", "all"):
        raise ValueError(
            f"mode must be 'steer', 'ablate' or 'push' and positions 'outputs' or 'all', got {mode!r} and {positions!r}"
        )
    detectors, executors = np.asarray(detectors, np.int32), np.asarray(executors, np.int32)
    check_latents(sae_detector, detectors)
    check_latents(sae_executor, executors)
    roles = jnp.asarray(prompts.roles)
    if (mode == "push") != (lengths is not None) or (lengths is not None and len(lengths) != len(roles)):
        came = "none" if lengths is None else f"an array of shape {lengths.shape}"
        raise ValueError(f"mode 'push' takes lengths (tasks = {len(roles)}, n), and no other mode does; got {came}")
    every = [1.0] if mode == "ablate" else list(strengths)
    scales = jnp.asarray(np.tile(every, (len(roles), 1)) if lengths is None else lengths, jnp.float32)
    if not len(detectors):  # a control for which no latent was left
        none, unknown = (scales.shape[1], len(roles), 0, len(executors)), np.full((len(roles), len(executors)), np.nan)
        return Links(np.zeros(none), np.zeros(none), np.zeros((len(roles), 0)), unknown)
    where = roles == Role.OUTPUT if positions == "outputs" else jnp.ones(roles.shape, bool)
    d, e = sae_detector.fold().take(jnp.asarray(detectors)), sae_executor.fold().take(jnp.asarray(executors))
    arrows = jnp.asarray(prompts.mask(Role.ARROW, "last"))  # where the output is predicted from
    effect, peak, mean_d, mean_e = _links(model, d, e, jnp.asarray(prompts.tokens), roles, arrows, where, scales, mode)
    by_strength = lambda x: np.asarray(x.transpose(2, 0, 1, 3))
    return Links(by_strength(effect), by_strength(peak), np.asarray(mean_d), np.asarray(mean_e))


def display_strength(
    effect: Float[np.ndarray, "tasks n_detectors n_executors"],
    peak: Float[np.ndarray, "tasks n_detectors n_executors"] | None = None,
) -> Float[np.ndarray, "n_detectors n_executors"]:
    """The paper's Fig. 8: each task divided by its maximum, then the mean over the tasks with a value above 0 (else 0).

    With `peak` the pairs that lose less than 0.1 at every arrow count as none, which is the paper's filter; without it
    nothing is left out. NaN where the executor is active in no task.
    """
    shown = np.nan_to_num(effect) if peak is None else np.where(peak < 0.1, 0.0, np.nan_to_num(effect))
    top = shown.max(axis=(1, 2), keepdims=True, initial=0)
    scaled = shown / np.where(top > 0, top, 1)
    mean = (scaled.sum(axis=0) / np.maximum((scaled > 0).sum(axis=0), 1)).astype(np.float32)
    return np.where(np.isnan(effect).all(axis=0), np.float32(np.nan), mean)


def mean_strength(
    effect: Float[np.ndarray, "tasks n_detectors n_executors"],
) -> Float[np.ndarray, "n_detectors n_executors"]:
    """The plain mean over all tasks in which the executor is active at some arrow (NaN without any), not divided
    further.
    """
    n = (~np.isnan(effect)).sum(axis=0)
    return np.where(n > 0, np.nan_to_num(effect).sum(axis=0) / np.maximum(n, 1), np.nan).astype(np.float32)
