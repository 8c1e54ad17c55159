"""What reading answers from the logits costs."""

import jax.numpy as jnp

from icl_lib.models import ModelConfig
from icl_lib.models.cost import Cost, Part, abstract_array, forward_cost
from icl_lib.tasks import token_logprobs


def answers_cost(config: ModelConfig, batch: int, seq: int, part: Part) -> Cost:
    """One pass to the log-probabilities and hits of every token of whole prompts."""

    def run(model, tokens):
        logits = model(tokens)
        return token_logprobs(logits, tokens), jnp.argmax(logits, axis=-1)

    return forward_cost(config, batch, seq, part, program=lambda model: (run, abstract_array((batch, seq))))
