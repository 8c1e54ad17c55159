"""What training carries from step to step, where it lies over devices, and what it says of the steps done."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from icl_lib.saes.activations import output_site
from icl_lib.training.objectives import Weights
from icl_lib.training.optimiser import Moments
from icl_lib.training.plan import AXIS, Plan
from icl_lib.training.recipes import TrainingError


class Stack(NamedTuple):
    """What training carries for SAEs of one shape; every leaf has a leading axis over them."""

    weights: Weights
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
    stacks: tuple[Stack, ...]  # in the order of `Plan.groups`


class Means(NamedTuple):
    """Statistics of a chunk of steps, (n_members,) each in the order of `Plan.members`."""

    l0: Array  # mean over the chunk
    fvu: Array  # mean over the chunk
    dead: Array  # fraction of latents, now
    bad_step: Array  # int32 first step with a loss that is not finite, or -1


def shardings(plan: Plan, state: State) -> State:
    """The `NamedSharding` of every leaf of a state (arrays or shapes), for a plan with a mesh."""

    def leaf(array, d_sae):
        if plan.shard == "sae":
            return NamedSharding(plan.mesh, PartitionSpec(AXIS))
        axes = [AXIS if size == d_sae and axis else None for axis, size in enumerate(array.shape)]
        return NamedSharding(plan.mesh, PartitionSpec(*axes[: axes.index(AXIS) + 1] if AXIS in axes else ()))

    whole = NamedSharding(plan.mesh, PartitionSpec())
    stacks = tuple(jax.tree.map(lambda a, d=s.silent.shape[1]: leaf(a, d), s) for s in state.stacks)
    return State(whole, whole, stacks)


def everywhere(arrays: PyTree, plan: Plan) -> PyTree:
    """The same arrays, each whole on every device, so that every process can read them."""
    if plan.mesh is None or jax.process_count() == 1:
        return arrays
    return jax.jit(lambda x: x, out_shardings=NamedSharding(plan.mesh, PartitionSpec()))(arrays)


def stop_if_silent(state: State, plan: Plan) -> None:
    """Raises `TrainingError` naming the first SAE whose inputs or targets are all zero, which no scale changes."""
    for stack, group in zip(state.stacks, plan.groups, strict=True):
        for i, *norms in zip(group, *map(np.asarray, everywhere((stack.norm_in, stack.norm_out), plan)), strict=True):
            if 0 in norms:
                site = plan.members[i].site if norms[0] == 0 else output_site(plan.members[i].site)
                raise TrainingError(f"activations at {site} are all zero: check the model's weights and the text")


def stop_if_bad(means: Means, plan: Plan) -> None:
    """Raises `TrainingError` with the step and site of the first loss that was not finite."""
    bad = np.asarray(means.bad_step)
    if (bad >= 0).any():
        i = int(np.argmin(np.where(bad >= 0, bad, np.iinfo(bad.dtype).max)))
        what = f"the loss of the SAE at {plan.members[i].site} is not finite at step {bad[i]}"
        todo = "check its activations for inf or NaN (float16 overflows at 65504), or lower the learning rate"
        raise TrainingError(f"{what}: {todo}")
