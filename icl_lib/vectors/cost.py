"""What task vectors, insertions and cleaning cost, in the turns that these functions take."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp

from icl_lib.models import ModelConfig, Past, cost
from icl_lib.models.cost import Cost, Part, abstract_array
from icl_lib.vectors.cleaning import _TURN_BYTES
from icl_lib.vectors.insert import Cut, _all_nll, nll_of_one
from icl_lib.vectors.steering import _steer_arrows
from icl_lib.vectors.task_vectors import _mean_resid

ANSWER_TOKENS = 2  # rows from the query's arrow to the token that predicts the second of the answer


def abstract_cut(config: ModelConfig, batch: int, suffix: int, seq: int, dtype, n_tasks: int) -> Cut:
    """The shapes of a cut at layer 0 of `n_tasks` tasks, which runs the last `suffix` of `seq` tokens."""

    def build():
        keys = jnp.zeros((batch, seq - suffix, config.n_kv_heads, config.d_head), dtype)
        resid, target = jnp.zeros((batch, suffix, config.d_model), dtype), jnp.zeros((batch, 2), jnp.int32)
        past = Past((keys,) * config.n_layers, (keys,) * config.n_layers, target[:, 0])
        return Cut(resid, past, target, target == 0, target, layer=0)

    return jax.tree.map(lambda x: abstract_array((n_tasks, *x.shape), x.dtype), eqx.filter_eval_shape(build))


def _pass_bytes(config: ModelConfig, seq: int, part: Part) -> float | int:
    """Bytes of a row of one vector's pass: logits of all tokens, and twice more of those that predict the answer."""
    logits = cost.logits_bytes(config, seq + 2 * ANSWER_TOKENS, part)
    return max(logits, cost.block_bytes(config, seq, part))


def task_vector_cost(config: ModelConfig, batch: int, seq: int, part: Part) -> Cost:
    """`task_vector` of one task: a pass without logits, of which means are kept."""

    def program(model):
        layers = tuple(range(model.config.n_layers))
        run = lambda model, tokens, weight: _mean_resid(model, tokens, weight, layers)
        return run, abstract_array((1, batch, seq)), abstract_array((1, batch, seq), "float32")

    return dataclasses.replace(cost.forward_cost(config, batch, seq, part, logits=False), program=program)


def insertion_cost(
    config: ModelConfig, batch: int, suffix: int, seq: int, layers: int, n_tasks: int, n_vectors: int, part: Part
) -> Cost:
    """`inserted_nll` of `n_vectors` vectors for each of `n_tasks` tasks, through the last `layers` layers. The prompts
    have `seq` tokens, of which the last `suffix` are run; the keys and values of the others are held for all tasks."""
    tasks, vectors = cost.turn(config, batch, suffix, n_tasks, n_vectors)
    lanes = tasks * vectors

    def program(model):
        cut = abstract_cut(model.config, batch, suffix, seq, model.embed.dtype, tasks)
        run = lambda model, cut, v: _all_nll(model, cut, v, None, (tasks, vectors))
        return run, cut, abstract_array((tasks, vectors, config.d_model), "float32")

    flops = lanes * batch * suffix * cost.token_flops(config, seq, layers=layers)
    row, past = lanes * _pass_bytes(config, suffix, part), n_tasks * cost.past_bytes(config, seq - suffix, part)
    return Cost(batch, suffix, layers, flops, row, program, other_row=past, passes=n_tasks * n_vectors / lanes)


def steering_cost(
    config: ModelConfig, batch: int, seq: int, layers: int, n_tasks: int, n_vectors: int, part: Part
) -> Cost:
    """`negative_steering` of whole prompts of all tasks by `n_vectors` latents one after another."""
    _, lanes = cost.turn(config, batch, seq, 1, n_vectors)
    flops, row = lanes * batch * seq * cost.token_flops(config, seq, layers=layers), _pass_bytes(config, seq, part)

    def program(model):
        tokens, arrows = (abstract_array((1, batch, seq), dtype) for dtype in ("int32", bool))
        answers = tuple(abstract_array((1, batch, 2), dtype) for dtype in ("int32", bool, "int32"))
        run = lambda model, *rest: _steer_arrows(model, *rest, 0, (1, lanes))
        return run, tokens, arrows, answers, abstract_array((lanes, config.d_model), "float32")

    return Cost(batch, seq, layers, flops, lanes * row, program, passes=n_tasks * n_vectors / lanes)


def cleaning_cost(
    config: ModelConfig, batch: int, suffix: int, seq: int, layers: int, n_tasks: int, n_l1: int, n_steps: float | int,
    part: Part,
) -> Cost:  # fmt: skip
    """`clean` of every task with `n_l1` penalties, `n_steps` steps each, of a pass and its gradient by the vector."""
    tasks, _ = cost.turn(config, batch, suffix, n_tasks, 2 * n_l1, _TURN_BYTES)
    lanes = tasks * n_l1

    def program(model):
        cut = abstract_cut(model.config, batch, suffix, seq, model.embed.dtype, 1)

        def run(model, cut, vectors):
            one = jax.tree.map(lambda x: x[0], cut)
            return jax.vmap(jax.value_and_grad(lambda v: nll_of_one(model, one, v).mean()))(vectors)

        return run, cut, abstract_array((lanes, config.d_model), "float32")

    flops = 2 * lanes * batch * suffix * cost.token_flops(config, seq, layers=layers)
    row = lanes * cost.backward_bytes(config, suffix, layers, part)
    past = n_tasks * cost.past_bytes(config, seq - suffix, part)
    return Cost(batch, suffix, layers, flops, row, program, other_row=past, passes=n_tasks / tasks * n_steps)
