"""Free text as tokens: with BOS and padding by the rules of prompts, and a warning of unknown words."""

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from icl_lib.tasks.template import encode, own_bos, pad_of


class Texts(NamedTuple):
    """Texts as rows of tokens, right padded. Whatever takes prompts for their `tokens` and `real` takes these too."""

    tokens: Int[Array, "batch seq"]
    length: Int[Array, " batch"]  # tokens of each text, BOS included
    real: Bool[Array, "batch seq"]  # tokens that count: neither BOS nor padding


def encode_text(tokenizer, texts: str | Sequence[str]) -> Texts:
    """One text or several as tokens, each begun with the tokenizer's BOS (once, whoever brings it).

    A tokenizer has no BOS of its own if that is its end of text, as in GPT-2 and Pythia; then none is added. Padding is
    the tokenizer's, as in `make_prompts`. Words that the tokenizer does not know become its unknown token, of which a
    model has learned nothing: a warning lists them. Raises `ValueError` on a slow tokenizer, without any text, or on a
    text of no token.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"encode_text takes a text or a list of texts, got {texts!r:.80}")
    encoded, bos = encode(texts, tokenizer), own_bos(tokenizer)
    front = [] if bos is None else [bos]
    rows = [front + list(itertools.dropwhile(lambda i: i == bos, ids)) for ids in encoded["input_ids"]]
    if not all(rows):
        raise ValueError("a text is empty, and this tokenizer has no BOS to begin it with: leave it out")
    if unknown := _unknown(tokenizer, texts, encoded):
        warnings.warn(
            f"this tokenizer does not know {', '.join(map(repr, unknown[:10]))}{' ...' * (len(unknown) > 10)}: each "
            f"becomes {tokenizer.unk_token!r}, of which a model has learned nothing",
            stacklevel=2,
        )
    length = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), length.max()), pad_of(tokenizer), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    at = np.arange(tokens.shape[1])[None]
    real = (at >= len(front)) & (at < length[:, None])
    return Texts(jnp.asarray(tokens), jnp.asarray(length), jnp.asarray(real))


def _unknown(tokenizer, texts: Sequence[str], encoded) -> list[str]:
    """The parts of the texts that became the unknown token, each once; not that token itself, written out."""
    found = (
        text[start:end].strip()
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for i, (start, end) in zip(ids, offsets, strict=True)
        if i == tokenizer.unk_token_id
    )
    return [word for word in dict.fromkeys(found) if word != tokenizer.unk_token]
