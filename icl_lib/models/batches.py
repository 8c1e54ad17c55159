"""Batches of several tasks: arrays with leading axes of tasks, run task after task inside one compiled program."""

import jax
import jax.numpy as jnp


def map_tasks(function, *trees, lead: tuple[int, ...], batch_size: int | None = None):
    """`function` on each task of trees whose arrays share the leading axes `lead`, () for a single task.

    The leading axes are flattened, tasks are run in turns of `batch_size` (None: one after another), and what the
    function returns gets the axes back. Nothing but one turn is held in memory at a time.
    """
    flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[len(lead) :])), trees)
    out = jax.lax.map(lambda each: function(*each), flat, batch_size=batch_size)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)


def check_stacked(batch, what: str) -> int:
    """The number of tasks of a stacked batch. Raises `ValueError` if its tokens have no axis of tasks."""
    if batch.tokens.ndim != 3:
        shape = batch.tokens.shape
        raise ValueError(f"{what} takes stacked prompts (task, batch, seq), got tokens {shape}: use stack_prompts")
    return batch.tokens.shape[0]
