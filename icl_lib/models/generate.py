"""Greedy generation in one compiled program, with the keys and values of all earlier tokens kept."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from icl_lib.models.sites import Site, Tap, compose, record
from icl_lib.models.transformer import Past, Transformer


def generate(
    model: Transformer,
    tokens: Int[Array, "batch seq"] | Sequence[Sequence[int]] | Any,
    length: Int[Array, " batch"] | None = None,
    n_new: int = 20,
    stop: tuple[int, ...] | None = None,
    tap: Tap | None = None,
) -> Int[Array, "batch n_new"]:
    """The `n_new` most probable next tokens, one after the other, of the prompts `tokens[b, :length[b]]`, right padded.

    `tokens` may also be a list of rows of any lengths, or what has both, such as the texts of
    `icl_lib.tasks.encode_text`; a table without lengths has no padding. A prompt ends with the first token of `stop`
    (None: the config's ends of text, if it has any), which is kept, and pad ids come after it; the loop ends when every
    prompt has. Prompts of any length from 1 to `seq` share one program.

    `tap(site, x) -> x` acts as in `model(tokens, tap=tap)`: it sees the prompts once, x of shape (batch, seq, ...), and
    then one token at a time, (batch, 1, ...), the last of each prompt first. Each tap has a program of its own.

    Raises `ValueError` if `n_new` is below 1, a length is not in 1..seq, or the text would outgrow the context.
    """
    tokens, length = _table(tokens, length, model.config.pad_id or 0)
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
    return _generate(model, tokens, length, jnp.asarray(stop, jnp.int32), n_new, tap)


def _table(tokens: Any, length: Any, pad_id: int) -> tuple[Int[Array, "batch seq"], Int[Array, " batch"]]:
    """Prompts in one table, and their lengths."""
    if length is None and hasattr(tokens, "length"):
        tokens, length = tokens.tokens, tokens.length
    if not hasattr(tokens, "ndim"):
        rows = list(tokens) if isinstance(tokens, list | tuple) else []
        if not rows or any(isinstance(row, str) or np.ndim(row) != 1 for row in rows):
            raise ValueError(
                "prompts are a table of tokens or a list of rows of tokens; texts become one by "
                f"icl_lib.tasks.encode_text(tokenizer, texts); got {tokens!r:.80}"
            )
        length = [len(row) for row in rows] if length is None else length
        wide = max(map(len, rows))
        tokens = np.stack(
            [np.pad(np.asarray(row, np.int32), (0, wide - len(row)), constant_values=pad_id) for row in rows]
        )
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (batch, seq), got shape {tokens.shape}; is tokens[None] meant?")
    length = [tokens.shape[1]] * len(tokens) if length is None else length
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32)


@eqx.filter_jit
def _generate(model: Transformer, tokens, length, stop, n_new: int, tap: Tap | None = None):
    """All but the last token of each prompt fill the past; each step takes one token and writes its keys and values."""
    rows, layers = jnp.arange(tokens.shape[0]), range(model.config.n_layers)
    past = Past.record(model, tokens, length - 1, tap)
    tap = compose() if tap is None else tap
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
        seen = record([Site(name, i) for name in ("rot_k", "v") for i in layers], cache)
        logits = model.run_from(0, tap(Site("embed"), model.embedding(last)), compose(tap, seen), past)
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
