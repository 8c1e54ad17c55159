r"""Task vectors: what the residual stream says, on average, at one kind of token of many-shot prompts.

Source: ICL-SFC, Sec. 2.3 (arrows) and App. G (outputs, for detectors).
"""

from collections.abc import Iterable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from icl_lib.models import Site, Transformer
from icl_lib.models.batches import map_tasks
from icl_lib.models.sites import as_layers
from icl_lib.tasks import Prompts, Role


@eqx.filter_jit
def _mean_resid(model, tokens, weight, layers):
    """(*task, n_layers, d_model) weighted means of resid_pre; only the sums are kept, never the activations."""

    def one_task(tokens, weight):
        sums = {}

        def tap(site, x):
            if site.name == "resid_pre" and site.layer in layers:
                sums[site] = jnp.einsum("bs,bsd->d", weight, x.astype(jnp.float32))
            return x

        model(tokens, tap=tap)
        return jnp.stack([sums[Site("resid_pre", i)] for i in layers]) / weight.sum()

    return map_tasks(one_task, tokens, weight, lead=tokens.shape[:-2])


def _mean_at(model: Transformer, tokens, mask: np.ndarray, layers: Iterable[int] | int | None, what: str) -> Array:
    layers = as_layers(range(model.config.n_layers) if layers is None else layers)
    for layer in layers:
        model.config.check_layer(layer)
    if not mask.any(axis=(-2, -1)).all():
        raise ValueError(f"no {what} found in the prompts of some task to average over; make them with n_shots >= 1")
    return _mean_resid(model, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, jnp.float32), layers)


def task_vector(
    model: Transformer, prompts: Prompts, layers: Iterable[int] | int | None = None
) -> Float[Array, "*task n_layers d_model"]:
    r"""The task vector of every layer: mean of resid_pre over **all** arrow tokens of all prompts.

    $v_l = \mathrm{mean}_{b,\,t:\,tok_t = \mathrm{arrow}}\; x^{pre}_l[b, t]$, first example and query included, the
    dummy line `X -> Y` not; of a separator of several tokens the last one, where vectors are inserted. One row per
    entry of `layers` (default: all), in units of the residual stream, float32. `prompts` of one task or of a stack of
    tasks. Raises `ValueError` on a layer out of range or prompts without arrow or longer than the model's context.

    Source: ICL-SFC, Sec. 2.3.
    """
    mask = np.asarray(prompts.mask(Role.ARROW, "last")) & (np.asarray(prompts.pair) >= 0)
    return _mean_at(model, prompts.tokens, mask, layers, "arrow")


def output_vector(
    model: Transformer, prompts: Prompts, layers: Iterable[int] | int | None = None
) -> Float[Array, "*task n_layers d_model"]:
    r"""Mean of resid_pre over the last output token of every example, the vector from which detectors are cleaned.

    The query is left out: its answer ends the prompt, no newline follows it. Raises as `task_vector` does.

    Source: ICL-SFC, App. G.
    """
    pair = np.asarray(prompts.pair)
    mask = np.asarray(prompts.mask(Role.OUTPUT, "last")) & (pair >= 0) & (pair < pair.max(axis=-1, keepdims=True))
    return _mean_at(model, prompts.tokens, mask, layers, "example output")


def subtract_corrupted(
    vector: Float[Array, "*axes d_model"], corrupted: Float[Array, "*axes d_model"], *, restore_norm: bool = False
) -> Float[Array, "*axes d_model"]:
    r"""The task vector without what it owes to the format: $v_c = v - v_{corrupted}$.

    `corrupted` is the task vector of prompts whose outputs were replaced by random ones (`make_prompts(corrupt=True)`).
    With `restore_norm` the difference is scaled by $|v| / |v_c|$, so that it acts at the strength of $v$; a zero
    difference stays zero.

    Source: comment to the blog post on SAE task features; not done in ICL-SFC.
    """
    difference = vector - corrupted
    if not restore_norm:
        return difference
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)
    return difference * (norm(vector) / jnp.maximum(norm(difference), 1e-12)).astype(vector.dtype)
