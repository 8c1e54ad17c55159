"""What is read from the logits of a batch of prompts: log-probabilities in nats, float32, one number per prompt.

All functions are pure and differentiable where that has a meaning, and take any leading axes, such as one of tasks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from icl_lib.tasks.prompts import Prompts, Role


def token_logprobs(
    logits: Float[Array, "*axes seq d_vocab"], tokens: Int[Array, "*axes seq"]
) -> Float[Array, "*axes seq-1"]:
    """Log-probability in nats of each token after the first, given those before it: entry j is that of token j + 1."""
    logits = logits[..., :-1, :].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def answer_nll(logits: Float[Array, "*axes seq d_vocab"], prompts: Prompts, n_first: int = 2) -> Float[Array, "*axes"]:
    """Negative log-probability in nats of the first `n_first` tokens of the query's answer, summed over them.

    A shorter answer contributes the tokens it has. The metric of every steering experiment, with n_first = 2.
    """
    answer = prompts.answer[..., 1:]
    counted = answer & (jnp.cumsum(answer, axis=-1, dtype=jnp.int32) <= n_first)
    return -jnp.where(counted, token_logprobs(logits, prompts.tokens), 0.0).sum(axis=-1)


def answer_accuracy(logits: Float[Array, "*axes seq d_vocab"], prompts: Prompts) -> Float[Array, "*axes"]:
    """1 where the most probable token after the query's arrow is the first token of its answer, else 0."""
    answer = prompts.answer[..., 1:]
    first = answer & (jnp.cumsum(answer, axis=-1, dtype=jnp.int32) == 1)
    hit = jnp.argmax(logits[..., :-1, :], axis=-1).astype(prompts.tokens.dtype) == prompts.tokens[..., 1:]
    return (first & hit).any(axis=-1).astype(jnp.float32)


def _over_pairs(values: Float[Array, "*axes s"], prompts: Prompts, name: str) -> Float[Array, "*axes"]:
    """Mean of `values` (entry j is of token j + 1) at the first output token after every arrow but the first pair's."""
    if 0 in jax.tree.leaves(prompts.n_shots):
        raise ValueError(f"{name} needs prompts with n_shots >= 1: with none, the first pair is the only one")
    counted = (prompts.mask(Role.OUTPUT, "first") & (prompts.pair > 0))[..., 1:]
    return jnp.where(counted, values, 0.0).sum(axis=-1) / counted.sum(axis=-1).astype(jnp.float32)


def pair_logprob(logits: Float[Array, "*axes seq d_vocab"], prompts: Prompts) -> Float[Array, "*axes"]:
    """Mean log-probability in nats of the first output token after every arrow but the first pair's.

    Of the first pair nothing can be known about the task; a dummy line is left out. The query counts as a pair.
    The metric of the sparse feature circuits. Raises `ValueError` for prompts without examples.
    """
    return _over_pairs(token_logprobs(logits, prompts.tokens), prompts, "pair_logprob")


def pair_accuracy(logits: Float[Array, "*axes seq d_vocab"], prompts: Prompts) -> Float[Array, "*axes"]:
    """As `pair_logprob`, with 1 where the token is the most probable one and 0 elsewhere for its log-probability."""
    hit = jnp.argmax(logits[..., :-1, :], axis=-1).astype(prompts.tokens.dtype) == prompts.tokens[..., 1:]
    return _over_pairs(hit.astype(jnp.float32), prompts, "pair_accuracy")


def pair_logit(logits: Float[Array, "*axes seq d_vocab"], prompts: Prompts) -> Float[Array, "*axes"]:
    """As `pair_logprob`, with the logit of the token, less the mean over the vocabulary, for its log-probability.

    The gradient of a log-probability carries the factor 1 - p and vanishes where the model is sure; that of a logit
    does not. Source: ICL-SFC, the runs of its first version; SFC, Sec. 3.1 (logit differences).
    """
    at = logits[..., :-1, :].astype(jnp.float32)
    chosen = jnp.take_along_axis(at, prompts.tokens[..., 1:, None], axis=-1)[..., 0]
    return _over_pairs(chosen - at.mean(axis=-1), prompts, "pair_logit")
