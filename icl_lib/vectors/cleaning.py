r"""Task vector cleaning (TVC): keep the few latents of a task vector that do the work.

The latents' pre-activations $\theta$ are optimised so that the decoded vector, inserted in zero-shot prompts, answers
them, under an L1 penalty. Only the tokens from the insertion on are recomputed at each step. What to know:

- A latent that is off has no gradient, so the support can only shrink: TVC selects and re-weights, it never adds.
- `b_dec` is part of the inserted vector, whatever is switched off.
- The L1 penalty is plain: it is not weighted by decoder norms.

Source: ICL-SFC, Sec. 3.1 and Algorithm 1.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from icl_lib.models import Transformer
from icl_lib.models.batches import map_tasks
from icl_lib.models.cost import BUDGET, turn
from icl_lib.saes import SAE
from icl_lib.vectors.insert import Cut, check_width, nll_of_one
from icl_lib.vectors.pursuit import gradient_pursuit

MONITORS = ("l0", "loss")
INITS = ("encoder", "pursuit")
# Tasks run in turns of about this size: a turn lasts as long as its slowest lane, and larger are no faster on a CPU.
_TURN_BYTES = BUDGET // 4


class Cleaned(eqx.Module):
    """Cleaned task vectors, one per lane; the lanes are (task, l1) or what is left of these axes."""

    f: Float[Array, "*lanes d_sae"]  # surviving latents
    vector: Float[Array, "*lanes d_model"]  # decode(f), b_dec included: what is inserted
    l0: Int[Array, "*lanes"]  # latents with f > 0
    nll: Float[Array, "*lanes"]  # mean NLL in nats of the optimisation prompts with `vector` inserted
    steps: Int[Array, "*lanes"]  # Adam steps taken before the stop
    nll_curve: Float[Array, "*lanes max_steps"]  # entry t: NLL of iterate t (0 is the start); NaN after the stop
    l0_curve: Float[Array, "*lanes max_steps"]  # entry t: L0 of iterate t; NaN after the stop

    def take(self, index: Int[Array, "*lanes"]) -> "Cleaned":
        """One l1 value per lane: `index` (*task,) picks along the l1 axis, which is the last of the lanes."""

        def pick(x):
            at = jnp.asarray(index).reshape(index.shape + (1,) * (x.ndim - index.ndim))
            return jnp.take_along_axis(x, at, axis=index.ndim).squeeze(index.ndim)

        return jax.tree.map(pick, self)


def _start(sae: SAE, vector: Array, init: str | Array, k: int) -> Array:
    """(tasks, d_sae) first pre-activations of a folded SAE for vectors (tasks, d_model)."""
    if not isinstance(init, str):
        return jnp.asarray(init, jnp.float32).reshape(len(vector), sae.d_sae)
    if init == "encoder":
        return jax.vmap(sae.pre)(vector).astype(jnp.float32)
    # decode adds b_dec, so the pursuit explains the rest; a chosen latent below its threshold would be dead on arrival
    w = gradient_pursuit(vector - jnp.broadcast_to(sae.b_dec, vector.shape).astype(vector.dtype), sae.W_dec, k)
    lowest = 1.01 * jnp.maximum(sae.threshold.astype(jnp.float32), 0.0)
    return jnp.where(w > 0, jnp.maximum(w, jnp.broadcast_to(lowest, w.shape)), 0.0)


class _State(eqx.Module):
    theta: Array
    adam: optax.OptState
    step: Array
    best: Array  # lowest value of the monitored quantity
    waited: Array  # steps since then, counting the step that reached it
    kept: Array  # what is returned
    nll_curve: Array
    l0_curve: Array


def _clean_one(model, sae, theta, cut, l1, lr, patience: int, max_steps: int, monitor: str) -> Cleaned:
    """TVC of one task at one l1; under `vmap` a lane that has stopped keeps its state until all have."""
    optimiser = optax.chain(optax.zero_nans(), optax.adam(lr))
    count = lambda theta: jnp.sum(sae.activate(theta) > 0)

    def losses(theta):
        f = sae.activate(theta)
        nll = jnp.mean(nll_of_one(model, cut, sae.decode(f)))
        return nll + l1 * jnp.sum(f), nll

    def going(s):
        return (s.step < max_steps) & (s.waited <= patience)

    def advance(s):
        (loss, nll), gradient = jax.value_and_grad(losses, has_aux=True)(s.theta)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            update, adam = optimiser.update(gradient, s.adam)
        theta = s.theta + update
        # L0 is judged after the step, as published; the loss belongs to the iterate before it, which is then kept.
        signal = count(theta).astype(jnp.float32) if monitor == "l0" else loss
        better = signal < s.best
        kept = theta if monitor == "l0" else jnp.where(better, s.theta, s.kept)
        waited = jnp.where(better, 0, s.waited) + 1
        nlls = s.nll_curve.at[s.step].set(nll)
        l0s = s.l0_curve.at[s.step].set(count(s.theta).astype(jnp.float32))
        return _State(theta, adam, s.step + 1, jnp.where(better, signal, s.best), waited, kept, nlls, l0s)

    zero = jnp.zeros((), jnp.int32)
    empty = jnp.full(max_steps, jnp.nan)
    first = _State(theta, optimiser.init(theta), zero, jnp.full((), jnp.inf), zero, theta, empty, empty)
    last = jax.lax.while_loop(going, advance, first)
    f = sae.activate(last.kept)
    vector = sae.decode(f)
    nll = jnp.mean(nll_of_one(model, cut, vector))
    return Cleaned(f, vector, count(last.kept).astype(jnp.int32), nll, last.step, last.nll_curve, last.l0_curve)


@eqx.filter_jit
def _clean(model, sae, theta, cut, l1, lr, patience: int, max_steps: int, monitor: str, chunk: int):
    def one_task(theta, cut):
        return jax.vmap(lambda l1: _clean_one(model, sae, theta, cut, l1, lr, patience, max_steps, monitor))(l1)

    return map_tasks(one_task, theta, cut, lead=cut.tasks, batch_size=chunk)


def _check(model, sae: SAE, vector, cut: Cut, monitor: str, init, l1: np.ndarray, max_steps: int) -> None:
    check_width(model, sae)
    if sae.d_in != sae.d_out:
        raise ValueError(f"cleaning needs an SAE of the residual stream, got one from width {sae.d_in} to {sae.d_out}")
    if vector.shape != (*cut.tasks, sae.d_in):
        wanted = (*cut.tasks, sae.d_in)
        raise ValueError(f"vector must have shape {wanted} (the tasks of the cut, d_model), got {vector.shape}")
    if monitor not in MONITORS:
        raise ValueError(f"monitor must be one of {', '.join(MONITORS)}, got {monitor!r}")
    if isinstance(init, str) and init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, or pre-activations, got {init!r}")
    if not isinstance(init, str) and init.shape != (*cut.tasks, sae.d_sae):
        raise ValueError(
            f"init must have shape {(*cut.tasks, sae.d_sae)} (the tasks of the cut, d_sae), got {init.shape}"
        )
    if l1.ndim > 1 or l1.size == 0 or (l1 < 0).any() or max_steps < 1:
        got = f"{l1.tolist()} and {max_steps}"
        raise ValueError(f"l1 must be one number or a list of numbers >= 0, and max_steps at least 1; got {got}")


def clean(
    model: Transformer, sae: SAE, vector: Float[Array, "*task d_model"], cut: Cut, *,
    l1: float | Sequence[float] | Float[Array, " n_l1"], lr: float, patience: int = 50, max_steps: int = 1000,
    monitor: str = "l0", init: str | Float[Array, "*task d_sae"] = "encoder", k: int = 7,
) -> Cleaned:  # fmt: skip
    r"""Clean task vectors: Adam on $\mathrm{NLL}(v_\theta) + \lambda \sum_i f_i$ with $f = \mathrm{act}(\theta)$,
    $v_\theta = f W_{dec} + b_{dec}$.

    $\theta$ starts at the SAE's pre-activations of `vector`, or with `init="pursuit"` (the paper's choice for
    detectors) at the `k` weights of gradient pursuit on `vector - b_dec`, raised to just above their thresholds where
    need be, or at pre-activations that are given: with `l1` 0 only their weights are tuned, which is the baseline for
    latents that were picked in another way. The NLL is the mean over the prompts of `cut`, in nats. One lane for every
    task of the cut and every value of `l1`, all in one compiled call; a single number for `l1` gives no l1 axis.

    With `monitor="l0"` (published) a lane stops once `patience` further steps have not lowered L0, and the **last**
    iterate is returned. With `monitor="loss"` it stops on the penalised loss, and the best iterate is returned.
    NaN gradients count as zero. Raises `ValueError` on shapes that do not fit and on unknown options.

    Source: ICL-SFC, Sec. 3.1, Algorithm 1; lr 0.15, patience 50, at most 1000 steps, 24 prompts.
    """
    penalties = np.asarray(l1, np.float32)
    _check(model, sae, vector, cut, monitor, init, penalties, max_steps)
    folded, stack = sae.fold(), cut if cut.tasks else jax.tree.map(lambda x: x[None], cut)
    theta = _start(folded, vector.reshape(-1, vector.shape[-1]), init, k)
    # the backward pass keeps about twice what the forward pass needs
    chunk, _ = turn(model.config, *stack.resid.shape[-3:-1], stack.tasks[0], 2 * penalties.size, _TURN_BYTES)
    l1 = jnp.asarray(penalties.reshape(-1))
    out = _clean(model, folded, theta, stack, l1, jnp.float32(lr), patience, max_steps, monitor, chunk)
    lanes = cut.tasks + penalties.shape
    return jax.tree.map(lambda x: x.reshape(*lanes, *x.shape[2:]), out)


def select_l1(
    l0: Float[Array, "*task n_l1"] | Int[Array, "*task n_l1"], nll: Float[Array, "*task n_l1"],
    reference: Float[Array, "*task"], *, tolerance: float = 1.02, shared: bool = False,
) -> Int[Array, "*task"]:  # fmt: skip
    r"""Index of the l1 with the smallest L0 among those with NLL <= `tolerance` x `reference`, per task.

    `nll` and `reference` (the task vector's own) are mean losses on **validation** prompts. Ties in L0 go to the lower
    NLL; where no l1 is good enough, the one with the lowest NLL is taken. With `shared`, one l1 is chosen for all
    tasks from the means over the tasks. Use with `cleaned.take(index)`.
    """
    shape = reference.shape
    l0, nll = l0.astype(jnp.float32), nll.astype(jnp.float32)
    if shared:
        over = tuple(range(len(shape)))
        l0, nll, reference = l0.mean(axis=over), nll.mean(axis=over), reference.mean()
    good = nll <= tolerance * reference[..., None]
    smallest = jnp.min(jnp.where(good, l0, jnp.inf), axis=-1, keepdims=True)
    candidate = jnp.where(good.any(axis=-1, keepdims=True), good & (l0 == smallest), True)
    return jnp.broadcast_to(jnp.argmin(jnp.where(candidate, nll, jnp.inf), axis=-1), shape)
