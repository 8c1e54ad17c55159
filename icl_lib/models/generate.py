"""Greedy generation in one compiled program, with the keys and values of all earlier tokens kept."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from icl_lib.models.sites import Site, record
from icl_lib.models.transformer import Past, Transformer


def generate(
    model: Transformer, tokens: Int[Array, "batch seq"], length: Int[Array, " batch"], n_new: int,
    stop: tuple[int, ...] | None = None,
) -> Int[Array, "batch n_new"]:  # fmt: skip
    """The `n_new` most probable next tokens, one after the other, of the prompts `tokens[b, :length[b]]`, right padded.

    A prompt ends with the first token of `stop` (None: the config's ends of text, if it has any), which is kept, and
    pad ids come after it; the loop ends when every prompt has. Prompts of any length from 1 to `seq` share one program.

    Raises `ValueError` if `n_new` is below 1, a length is not in 1..seq, or the text would outgrow the context.
    """
    seq, longest, shortest = tokens.shape[1], int(length.max()), int(length.min())
    if n_new < 1 or shortest < 1 or longest > seq:
        got = f"{n_new=} and lengths {shortest} to {longest}"
        raise ValueError(f"n_new is at least 1 and lengths are 1 to {seq}, the width of tokens; got {got}")
    if longest + n_new > model.config.n_ctx:
        most = f"the model's context of {model.config.n_ctx}"
        raise ValueError(f"{longest} tokens and {n_new} new ones are more than {most}: lower n_new")
    model.config.check_length(seq, "a table of prompts")
    stop = (model.config.eos_id, *model.config.more_eos) if stop is None else tuple(stop)
    stop = tuple(end for end in stop if end is not None)
    return _generate(model, tokens.astype(jnp.int32), length.astype(jnp.int32), jnp.asarray(stop, jnp.int32), n_new)


@eqx.filter_jit
def _generate(model: Transformer, tokens, length, stop, n_new: int):
    """All but the last token of each prompt fill the past; each step takes one token and writes its keys and values."""
    rows, layers = jnp.arange(tokens.shape[0]), range(model.config.n_layers)
    past = Past.record(model, tokens, length - 1)
    room = lambda x: jnp.pad(x, ((0, 0), (0, n_new), (0, 0), (0, 0)))
    past = Past(tuple(map(room, past.k)), tuple(map(room, past.v)), past.length)
    last = jnp.take_along_axis(tokens, (length - 1)[:, None], axis=1)
    pads = jnp.full((len(rows), n_new), model.config.pad_id or 0, jnp.int32)

    def unfinished(carry):
        step, _, _, done, _ = carry
        return (step < n_new) & ~done.all()

    def one(carry):
        step, last, past, done, out = carry
        cache: dict[Site, Array] = {}
        tap = record([Site(name, i) for name in ("rot_k", "v") for i in layers], cache)
        logits = model.run_from(0, model.embedding(last), tap, past)
        token = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        written = lambda kept, name: tuple(
            x.at[rows, past.length].set(cache[Site(name, i)][:, 0].astype(x.dtype)) for i, x in enumerate(kept)
        )
        past = Past(written(past.k, "rot_k"), written(past.v, "v"), past.length + 1)
        out = out.at[:, step].set(jnp.where(done, out[:, step], token))
        done = done | (token[:, None] == stop[None, :]).any(axis=1)
        return step + 1, token[:, None], past, done, out

    start = (jnp.asarray(0, jnp.int32), last, past, jnp.zeros(len(rows), bool), pads)
    return jax.lax.while_loop(unfinished, one, start)[-1]
