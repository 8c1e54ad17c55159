r"""Insert a vector into the residual stream and measure what it does to the answer.

Most experiments add one vector at one late token of a zero-shot prompt and ask for the loss of the answer. `cut`
freezes everything before that token once; `inserted_nll` then recomputes the few tokens after it for any number of
vectors. `steer` is the same intervention as a tap on whole prompts.

The loss is NLL2: the negative log-probability of the first two answer tokens, summed over the tokens, in nats.
Source: ICL-SFC, Secs. 2.3 and 3.2, App. F.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from icl_lib.models import Past, Site, Transformer, run_with_cache
from icl_lib.models.cost import BUDGET, fitting, lane_bytes, turn
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


def _positions(prompts: Prompts, where: str) -> np.ndarray:
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


def _answers(prompts: Prompts, n_first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    def one_task(args):
        tokens, start, index = args
        _, cache = run_with_cache(model, tokens, [Site("resid_pre", layer)])
        resid = jnp.take_along_axis(cache[Site("resid_pre", layer)], index[..., None], axis=1)
        return resid, Past.record(model, tokens[:, :n_past], start)

    return jax.lax.map(one_task, (tokens, start, index))


def cut(model: Transformer, prompts: Prompts, layer: int, where: str = "query_arrow", n_first: int = 2) -> Cut:
    """Freeze `prompts` before the token at which vectors will be added to resid_pre of `layer`.

    `where` is "query_arrow" (task vectors, executors) or "dummy_output" (the "Y" of the dummy line, detectors).
    `n_first` answer tokens count in the loss; missing ones are masked. `prompts` of one task or of a stack of tasks.
    Raises `ValueError` on a layer out of range, an unknown `where`, or prompts without that token.
    """
    model.config.check_layer(layer)
    start = _positions(prompts, where)
    targets, valid, position = _answers(prompts, n_first)
    predictor = np.where(valid, position - 1 - start[..., None], 0)
    if predictor.min() < 0:
        raise ValueError(
            f"the answer must come after the {where.replace('_', ' ')}, but in some prompt it stands before"
        )
    # static sizes shared by all tasks: the longest prefix, and the longest way from the cut to a predicting token
    n_past, n_suffix = int(start.max()), int(predictor.max()) + 1
    seq = prompts.tokens.shape[-1]
    index = np.minimum(start[..., None] + np.arange(n_suffix), seq - 1)
    flat = lambda x, keep: jnp.asarray(x, jnp.int32).reshape(-1, *x.shape[x.ndim - keep :])
    frozen = _freeze(model, flat(prompts.tokens, 2), flat(start, 1), flat(index, 2), layer, n_past)
    lead = start.shape[:-1]
    resid, past = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), frozen)
    as_int = lambda x: jnp.asarray(x, jnp.int32)
    return Cut(resid, past, as_int(targets), jnp.asarray(valid), as_int(predictor), layer)


def _target_nll(logits, position, targets, mask) -> Array:
    """(b,) nats: -log p of `targets`, whose logits stand at `position`, summed over the unmasked ones."""
    rows = jnp.take_along_axis(logits.astype(jnp.float32), position[..., None], axis=1)
    logp = jax.nn.log_softmax(rows, axis=-1)
    picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask, picked, 0.0), axis=-1)


def nll_of_one(model: Transformer, cut: Cut, vector: Array, layer: Array | None = None) -> Array:
    """(b,) NLL of one task with one `vector` (d_model,) added at the cut token; not compiled, for use inside a loop.

    `layer` may be a traced number >= cut.layer: the vector then enters at that layer's input, so that one program
    serves all layers.
    """
    add = lambda x, by: x.at[:, 0].add(by.astype(x.dtype))
    resid, tap = cut.resid, None
    if layer is None:
        resid = add(resid, vector)
    else:
        tap = lambda site, x: add(x, jnp.where(layer == site.layer, vector, 0.0)) if site.name == "resid_pre" else x
    logits = model.run_from(cut.layer, resid, tap=tap, past=cut.past)
    return _target_nll(logits, cut.target_position, cut.targets, cut.target_mask)


def at_once(model: Transformer, cut: Cut, n_tasks: int, n_vectors: int, limit: int = BUDGET) -> tuple[int, int]:
    """How many tasks and vectors fit into `limit` bytes of one compiled step, from the size of logits and MLP activations."""
    return turn(model.config, *cut.resid.shape[-3:-1], n_tasks, n_vectors, limit)


def with_task_axis(cut: Cut) -> Cut:
    """The cut with a task axis: itself, or a stack of one."""
    return cut if cut.tasks else jax.tree.map(lambda x: x[None], cut)


@eqx.filter_jit
def _all_nll(model, cut, vectors, layers, chunk: tuple[int, int]):
    """(tasks, n, b) NLL for vectors (tasks, n, d); `layers` (n,) or None gives each its own layer."""
    tasks, n = chunk

    def one_task(args):
        one, vectors = args
        return jax.lax.map(lambda a: nll_of_one(model, one, *a), (vectors, layers), batch_size=n)

    return jax.lax.map(one_task, (cut, vectors), batch_size=tasks)


def _nll(model: Transformer, cut: Cut, vectors: Array, layers: Array | None = None) -> Array:
    lead = cut.tasks
    if vectors.shape[-1] != model.config.d_model or vectors.shape[: len(lead)] != lead or vectors.ndim <= len(lead):
        raise ValueError(
            f"vectors must have shape {(*lead, '...', model.config.d_model)}: the task axis of the cut, any other axes, "
            f"d_model; got {vectors.shape}"
        )
    stack = with_task_axis(cut)
    flat = vectors.reshape(stack.tasks[0], -1, vectors.shape[-1])
    out = _all_nll(model, stack, flat, layers, at_once(model, stack, *flat.shape[:2]))
    return out.reshape(*vectors.shape[:-1], out.shape[-1])


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
    layers: Int[Array, " n_layers"] | None = None,
) -> Float[Array, "*axes n_layers batch"]:
    """`inserted_nll` with row l of `vectors` entering at the input of layer `layers[l]` (default 0, 1, 2, ...).

    The cut must be at or before the first of these layers, best at layer 0: one program then serves all layers.
    """
    first = np.arange(vectors.shape[-2]) if layers is None else np.asarray(layers)
    for layer in first.tolist():
        model.config.check_layer(layer)
    if first.min() < cut.layer:
        raise ValueError(
            f"vectors enter at layers {first.tolist()}, before the cut at layer {cut.layer}; cut at layer 0"
        )
    others = int(np.prod(vectors.shape[len(cut.tasks) : -2]))
    return _nll(model, cut, vectors, jnp.asarray(np.tile(first, others), jnp.int32))


def latent_directions(
    sae: SAE, latents: Int[Array, "*grid"], scale: Float[Array, "*grid"] | float
) -> Float[Array, "*grid d_model"]:
    r"""$s\,W_{dec}[f] / |W_{dec}[f]|$ for each latent f. Raises `ValueError` on a latent that the SAE does not have."""
    index = np.asarray(latents)
    if index.size == 0 or index.min() < 0 or index.max() >= sae.W_dec.shape[0]:
        raise ValueError(f"latents must be one or more numbers in 0..{sae.W_dec.shape[0] - 1}, got {index.tolist()}")
    rows = sae.W_dec[jnp.asarray(latents)].astype(jnp.float32)
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), index.shape)[..., None]
    return rows * (scale / jnp.maximum(norm, 1e-12))


def latent_nll(
    model: Transformer, sae: SAE, cut: Cut, latents: Int[Array, "*grid"], scale: Float[Array, "*grid"] | float
) -> Float[Array, "..."]:
    r"""NLL with one latent alone steering: $s\,W_{dec}[f]/|W_{dec}[f]|$ added at the cut token, shape (*task, *grid, b).

    `scale` is one number or one per latent; the paper uses 15 for executors and 25 for detectors of Gemma-1 2B.
    All tasks of the cut see all latents. Raises `ValueError` on a wrong latent or an SAE of another width.

    Source: ICL-SFC, Sec. 3.2 and Figs 5, 7.
    """
    check_width(model, sae)
    directions = latent_directions(sae, latents, scale)
    return _nll(
        model,
        cut,
        jnp.broadcast_to(directions.reshape((1,) * len(cut.tasks) + directions.shape), (*cut.tasks, *directions.shape)),
    )


def check_width(model: Transformer, sae: SAE) -> None:
    """Raises `ValueError` if the SAE does not write into a residual stream of the model's width."""
    if sae.W_dec.shape[-1] != model.config.d_model:
        raise ValueError(
            f"the SAE writes vectors of width {sae.W_dec.shape[-1]}, the model has d_model = {model.config.d_model}; "
            "was the SAE trained on another model?"
        )


def relative_change(nll: Float[Array, "*axes batch"], base: Float[Array, "*task batch"]) -> Float[Array, "..."]:
    r"""$(L - L_0) / L_0$ of the mean losses over the prompts; negative helps, -1 means that no loss is left.

    `base` has the leading axes of `nll` or only the first of them: (task, b) serves (task, latent, b).
    """
    if nll.shape[: base.ndim - 1] != base.shape[:-1]:
        raise ValueError(f"base of shape {base.shape} does not fit nll of shape {nll.shape}: the first axes must agree")
    loss, zero = nll.mean(axis=-1), base.mean(axis=-1)
    zero = zero.reshape(zero.shape + (1,) * (loss.ndim - zero.ndim))
    return (loss - zero) / zero


@eqx.filter_jit
def _steer(model, tokens, site, vector, mask):
    def tap(here, x):
        return jnp.where(mask[..., None], x + vector.astype(x.dtype)[None, None], x) if here == site else x

    return model(tokens, tap=tap)


def steer(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    site: Site,
    vector: Float[Array, " d_model"],
    mask: Bool[Array, "batch seq"],
) -> Float[Array, "batch seq d_vocab"]:
    """Logits with `vector` added to the activation at `site` wherever `mask` is True.

    Raises `ValueError` on a layer that the model does not have.
    """
    if site.layer is not None:
        model.config.check_layer(site.layer)
    return _steer(model, jnp.asarray(tokens), site, vector, jnp.asarray(mask))


@eqx.filter_jit
def _steer_arrows(model, tokens, arrows, answers, vectors, layer: int, n: int):
    """NLL and accuracy (tasks, n, b) with each vector added at all arrows of one task after the other."""

    def one_task(args):
        tokens, arrows, (targets, valid, predictor) = args
        _, cache = run_with_cache(model, tokens, [Site("resid_pre", layer)])
        clean = cache[Site("resid_pre", layer)]

        def one(vector):
            logits = model.run_from(
                layer, jnp.where(arrows[..., None], clean + vector.astype(clean.dtype)[None, None], clean)
            )
            right = (jnp.argmax(logits[:, :-1], axis=-1) == tokens[:, 1:]) & arrows[:, :-1]
            accuracy = right.sum(axis=-1).astype(jnp.float32) / arrows[:, :-1].sum(axis=-1).astype(jnp.float32)
            return _target_nll(logits, predictor, targets, valid), accuracy

        return jax.lax.map(one, vectors, batch_size=n)

    return jax.lax.map(one_task, (tokens, arrows, answers))


def negative_steering(
    model: Transformer,
    sae: SAE,
    prompts: Prompts,
    layer: int,
    latents: Int[Array, "*grid"],
    scale: Float[Array, "*grid"] | float,
    n_first: int = 2,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    r"""Take a latent away where the task is at work: $-s\,W_{dec}[f]/|W_{dec}[f]|$ at **all** arrows of many-shot prompts.

    Returns the NLL of the query's answer (nats) and the accuracy, the fraction of arrows whose most likely next token
    is the true one; both (*task, *grid, b). Raises `ValueError` as `cut` and `latent_nll` do.

    Source: ICL-SFC, App. F.1.
    """
    model.config.check_layer(layer)
    check_width(model, sae)
    _positions(prompts, "query_arrow")
    targets, valid, position = _answers(prompts, n_first)
    arrows = np.asarray(prompts.mask(Role.ARROW, "last")) & (np.asarray(prompts.pair) >= 0)
    vectors = -latent_directions(sae, latents, scale)
    tokens = np.asarray(prompts.tokens)
    lane = lane_bytes(model.config, *tokens.shape[-2:])
    flat = lambda x: jnp.asarray(x).reshape(-1, *x.shape[tokens.ndim - 2 :])
    answers = tuple(flat(x) for x in (targets.astype(np.int32), valid, (position - 1).astype(np.int32)))
    n = fitting(lane, vectors.size // vectors.shape[-1])
    out = _steer_arrows(
        model, flat(tokens.astype(np.int32)), flat(arrows), answers, vectors.reshape(-1, vectors.shape[-1]), layer, n
    )
    return jax.tree.map(lambda x: x.reshape(*tokens.shape[:-2], *vectors.shape[:-1], x.shape[-1]), out)
