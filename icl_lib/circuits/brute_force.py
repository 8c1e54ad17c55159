"""Every node ablated alone: what the gradient of `node_effects` approximates, measured. Source: ICL-SFC, App. E."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Int

from icl_lib.circuits.ablation import Setting, columns_of, run_ablated
from icl_lib.circuits.ranking import UNRANKED


@eqx.filter_jit
def _one_by_one(
    setting: Setting, site: Int[Array, " n"], group: Int[Array, " n"], latent: Int[Array, " n"]
) -> Float[Array, " n"]:
    batch, groups, resid, means = jax.tree.map(lambda a: a[0], setting.per_task())

    def node(args):
        site, group, latent = args
        column = {s: latent[None] % sae.d_sae for s, sae in setting.suite.items()}
        sub, value = columns_of(setting, column, means, whole=False)
        here = jnp.arange(groups.n)[:, None] == group
        rank = {
            s: jnp.where(here & (site == i), jnp.int32(0), jnp.int32(UNRANKED)) for i, s in enumerate(setting.suite)
        }
        return run_ablated(setting, sub, value, batch, groups, resid, rank, jnp.int32(0), jnp.int32(1))

    return jax.lax.map(node, (site, group, latent))


def brute_force_effects(setting: Setting, nodes: pd.DataFrame) -> Float[np.ndarray, " n"]:
    """m(M) - m(node ablated alone) of each row (layer, kind, latent, group) of a circuit's table, in a setting of one
    task.

    What `node_effects` approximates, with the same sign: positive means that the node helps.
    """
    if setting.n_tasks != 1:
        raise ValueError(
            f"brute_force_effects takes a setting of one task, got {setting.n_tasks}: prepare it with "
            "stack_prompts([prompts])"
        )
    index = {(site.layer, site.kind): i for i, site in enumerate(setting.suite)}
    places = list(zip(nodes.layer, nodes.kind, strict=True))
    if lost := set(places) - set(index):
        raise ValueError(
            f"nodes at {sorted(lost)} are outside of the setting, which has {sorted(index)}: prepare it with these "
            "layers"
        )
    columns = ([index[place] for place in places], setting.groups.numbers(nodes.group), nodes.latent)
    return np.asarray(setting.full[0] - _one_by_one(setting, *(jnp.asarray(np.asarray(c, np.int32)) for c in columns)))
