r"""Insert a vector into the residual stream and measure what it does to the answer.

Most experiments add one vector at one late token of a zero-shot prompt and ask for the loss of the answer. `cut`
freezes everything before that token once; `inserted_nll` then recomputes the few tokens after it for any number of
vectors. `steering.steer` is the same intervention as a tap on whole prompts.

The loss is NLL2: the negative log-probability of the first two answer tokens, summed over the tokens, in nats.
Source: ICL-SFC, Secs. 2.3 and 3.2, App. F.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from icl_lib.models import Past, Site, Transformer, run_with_cache
from icl_lib.models.batches import map_tasks
from icl_lib.models.cost import turn
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Role
from icl_lib.tasks.template import DUMMY


class Cut(eqx.Module):
    """A batch of prompts frozen before one token each: the past, and the clean residual from the cut token on.

    Row 0 of the suffix axis is the cut token, where vectors are added. Padding at the end of a suffix is harmless:
    attention is causal and no target stands there. A stack of tasks has one leading task axis on every array.
    """

    resid: Float[Array, "*task batch suffix d_model"]  # clean resid_pre of `layer`
    past: Past
    targets: Int[Array, "*task batch n_first"]  # first answer tokens
    target_mask: Bool[Array, "*task batch n_first"]  # False where the answer is shorter
    target_position: Int[Array, "*task batch n_first"]  # suffix row whose logits predict the target
    layer: int = eqx.field(static=True)

    @property
    def tasks(self) -> tuple[int, ...]:
        """Shape of the task axis: () for one task, (n,) for a stack."""
        return self.targets.shape[:-2]


def positions(prompts: Prompts, where: str) -> np.ndarray:
    """(*task, b) position of the cut token. Raises `ValueError` if `where` is unknown or a prompt has no such token."""
    roles, pair = np.asarray(prompts.roles), np.asarray(prompts.pair)
    if where == "query_arrow":
        there = (roles == Role.ARROW) & (pair == pair.max(axis=-1, keepdims=True))
        repair = "the separator of the template must be a token of its own"
    elif where == "dummy_output":
        there = (roles == Role.OUTPUT) & (pair == DUMMY)
        repair = 'make the prompts with Template(dummy=("X", "Y"))'
    else:
        raise ValueError(f'where must be "query_arrow" or "dummy_output", got {where!r}')
    if not there.any(axis=-1).all():
        raise ValueError(f"no {where.replace('_', ' ')} found in {int((~there.any(axis=-1)).sum())} prompts; {repair}")
    return np.asarray(getattr(prompts, where))


def answers(prompts: Prompts, n_first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token, validity and position of the first `n_first` answer tokens, each (*task, b, n_first)."""
    answer, tokens = np.asarray(prompts.answer), np.asarray(prompts.tokens)
    if n_first < 1 or not answer.any(axis=-1).all():
        raise ValueError(f"every prompt needs an answer token and n_first must be at least 1, got n_first = {n_first}")
    position = answer.argmax(axis=-1)[..., None] + np.arange(n_first)
    inside = np.minimum(position, tokens.shape[-1] - 1)
    valid = np.take_along_axis(answer, inside, axis=-1) & (position == inside)
    return np.take_along_axis(tokens, inside, axis=-1), valid, inside


@eqx.filter_jit
def _freeze(model, tokens, start, index, layer: int, n_past: int):
    def one_task(tokens, start, index):
        _, cache = run_with_cache(model, tokens, [Site("resid_pre", layer)])
        resid = jnp.take_along_axis(cache[Site("resid_pre", layer)], index[..., None], axis=1)
        return resid, Past.record(model, tokens[:, :n_past], start)

    return map_tasks(one_task, tokens, start, index, lead=tokens.shape[:-2])


def cut(model: Transformer, prompts: Prompts, layer: int, where: str = "query_arrow", n_first: int = 2) -> Cut:
    """Freeze `prompts` before the token at which vectors will be added to resid_pre of `layer`.

    `where` is "query_arrow" (task vectors, executors) or "dummy_output" (the "Y" of the dummy line, detectors).
    `n_first` answer tokens count in the loss; missing ones are masked. `prompts` of one task or of a stack of tasks.
    Raises `ValueError` on a layer out of range, an unknown `where`, or prompts without that token or longer than the
    model's context.
    """
    model.config.check_layer(layer)
    start = positions(prompts, where)
    targets, valid, position = answers(prompts, n_first)
    predictor = np.where(valid, position - 1 - start[..., None], 0)
    if predictor.min() < 0:
        raise ValueError(f"the answer must come after the {where.replace('_', ' ')}, in some prompt it stands before")
    # static sizes shared by all tasks: the longest prefix, and the longest way from the cut to a predicting token
    n_past, n_suffix = int(start.max()), int(predictor.max()) + 1
    seq = prompts.tokens.shape[-1]
    index = np.minimum(start[..., None] + np.arange(n_suffix), seq - 1)
    as_int = lambda x: jnp.asarray(x, jnp.int32)
    resid, past = _freeze(model, as_int(prompts.tokens), as_int(start), as_int(index), layer, n_past)
    return Cut(resid, past, as_int(targets), jnp.asarray(valid), as_int(predictor), layer)


def target_nll(logits, position, targets, mask) -> Array:
    """(b,) nats: -log p of `targets`, whose logits stand at `position`, summed over the unmasked ones."""
    rows = jnp.take_along_axis(logits.astype(jnp.float32), position[..., None], axis=1)
    logp = jax.nn.log_softmax(rows, axis=-1)
    picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask, picked, 0.0), axis=-1)


def nll_of_one(model: Transformer, cut: Cut, vector: Array, layer: Array | None = None) -> Array:
    """(b,) NLL of one task with one `vector` (d_model,) added at the cut token; not compiled, for use inside a loop.
    `layer` may be a traced number >= cut.layer, whose input the vector enters: one program serves all layers."""
    add = lambda x, by: x.at[:, 0].add(by.astype(x.dtype))
    resid, tap = cut.resid, None
    if layer is None:
        resid = add(resid, vector)
    else:
        tap = lambda site, x: add(x, jnp.where(layer == site.layer, vector, 0.0)) if site.name == "resid_pre" else x
    logits = model.run_from(cut.layer, resid, tap=tap, past=cut.past)
    return target_nll(logits, cut.target_position, cut.targets, cut.target_mask)


@eqx.filter_jit
def _all_nll(model, cut, vectors, layers, chunk: tuple[int, int]):
    """(*task, n, b) NLL for vectors (*task, n, d); `layers` (n,) or None gives each its own layer."""
    tasks, n = chunk

    def one_task(one, vectors):
        return jax.lax.map(lambda a: nll_of_one(model, one, *a), (vectors, layers), batch_size=n)

    return map_tasks(one_task, cut, vectors, lead=cut.tasks, batch_size=tasks)


def _nll(model: Transformer, cut: Cut, vectors: Array, layers: Array | None = None) -> Array:
    lead = cut.tasks
    if vectors.shape[-1] != model.config.d_model or vectors.shape[: len(lead)] != lead or vectors.ndim <= len(lead):
        wanted = f"{(*lead, '...', model.config.d_model)}: the task axis of the cut, any other axes, d_model"
        raise ValueError(f"vectors must have shape {wanted}; got {vectors.shape}")
    batch, suffix = cut.resid.shape[-3:-1]
    if vectors.size == 0:
        return jnp.zeros((*vectors.shape[:-1], batch))
    flat = vectors.reshape(*lead, -1, vectors.shape[-1])
    chunk = turn(model.config, batch, suffix, lead[0] if lead else 1, flat.shape[-2])
    return _all_nll(model, cut, flat, layers, chunk).reshape(*vectors.shape[:-1], batch)


def inserted_nll(model: Transformer, cut: Cut, vector: Float[Array, "*axes d_model"]) -> Float[Array, "*axes batch"]:
    """NLL in nats of each prompt's answer with `vector` added to resid_pre at the cut token.

    For a cut of several tasks the first axis of `vector` is the task; all further axes are vectors tried on the same
    prompts. Everything is one compiled call, in turns that bound memory. Raises `ValueError` on a shape that does not
    fit the model or the cut.

    Source: ICL-SFC, Sec. 2.3 (addition at scale 1, no replacement).
    """
    return _nll(model, cut, vector)


def base_nll(model: Transformer, cut: Cut) -> Float[Array, "*task batch"]:
    """NLL of the answer with nothing inserted."""
    return _nll(model, cut, jnp.zeros((*cut.tasks, model.config.d_model)))


def inserted_nll_by_layer(
    model: Transformer,
    cut: Cut,
    vectors: Float[Array, "*axes n_layers d_model"],
    layers: Int[Array, " n_layers"] | int | None = None,
) -> Float[Array, "*axes n_layers batch"]:
    """`inserted_nll` with row l of `vectors` entering at the input of layer `layers[l]` (default 0, 1, 2, ...).

    The cut must be at or before the first of these layers, best at layer 0: one program then serves all layers.
    """
    first = np.arange(vectors.shape[-2]) if layers is None else np.atleast_1d(np.asarray(layers))
    for layer in first.tolist():
        model.config.check_layer(layer)
    if first.min() < cut.layer:
        raise ValueError(f"vectors enter at layers {first.tolist()}, before the cut at layer {cut.layer}: cut at 0")
    others = int(np.prod(vectors.shape[len(cut.tasks) : -2]))
    return _nll(model, cut, vectors, jnp.asarray(np.tile(first, others), jnp.int32))


def latent_directions(
    sae: SAE, latents: Int[Array, "*grid"], scale: Float[Array, "*grid"] | float
) -> Float[Array, "*grid d_model"]:
    r"""$s\,W_{dec}[f] / |W_{dec}[f]|$ for each latent f. Raises `ValueError` on a latent that the SAE does not have."""
    index = np.asarray(latents)
    check_latents(sae, index)
    rows = sae.W_dec[jnp.asarray(latents, jnp.int32)].astype(jnp.float32)
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), index.shape)[..., None]
    return rows * (scale / jnp.maximum(norm, 1e-12))


def check_latents(sae: SAE, latents: Int[np.ndarray, "*n"]) -> None:
    """Raises `ValueError` where a latent number is outside of the dictionary; JAX would clip it silently."""
    if wrong := sorted({int(i) for i in latents.ravel() if not 0 <= i < sae.d_sae}):
        raise ValueError(f"latents {wrong[:5]} do not exist: the SAE at {sae.site_in} has latents 0..{sae.d_sae - 1}")


def check_width(model: Transformer, sae: SAE) -> None:
    """Raises `ValueError` if the SAE does not write into a residual stream of the model's width."""
    if sae.W_dec.shape[-1] != model.config.d_model:
        has = f"the SAE writes vectors of width {sae.W_dec.shape[-1]}, the model has d_model = {model.config.d_model}"
        raise ValueError(f"{has}; was the SAE trained on another model?")


def relative_change(nll: Float[Array, "*axes batch"], base: Float[Array, "*task batch"]) -> Float[Array, "..."]:
    r"""$(L - L_0) / L_0$ of the mean losses over the prompts; negative helps, -1 means that no loss is left.

    `base` has the leading axes of `nll` or only the first of them: (task, b) serves (task, latent, b). NaN where no
    loss is to be lost, $L_0 = 0$.
    """
    if nll.shape[: base.ndim - 1] != base.shape[:-1]:
        raise ValueError(f"base of shape {base.shape} does not fit nll of shape {nll.shape}: the first axes must agree")
    loss, zero = nll.mean(axis=-1), base.mean(axis=-1)
    zero = zero.reshape(zero.shape + (1,) * (loss.ndim - zero.ndim))
    return (loss - zero) / jnp.where(zero == 0, jnp.nan, zero)
