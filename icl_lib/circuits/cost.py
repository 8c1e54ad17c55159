"""What node effects and ablations cost."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp

from icl_lib.circuits.effects import clean_pass
from icl_lib.models import ModelConfig, Site
from icl_lib.models.cost import Cost, Part, abstract_array, backward_bytes, forward_cost, token_flops
from icl_lib.saes import SAE
from icl_lib.saes.cost import Dictionary, latents_bytes
from icl_lib.tasks import Prompts, Role, Template, token_logprobs
from icl_lib.tasks.prompts import _Label


def _tables(count: int, n_tasks: int, saes: Sequence[Dictionary]) -> int:
    """Bytes of `count` tables with a number for every task, role and latent. They are whole on the first device."""
    return 4 * count * n_tasks * len(Role) * sum(d.d_sae for d in saes)


def _metric(logits, prompts):
    return token_logprobs(logits, prompts.tokens).mean(axis=-1)


def _abstract_prompts(batch: int, seq: int) -> Prompts:
    def build():
        zero = jnp.zeros((batch, seq), jnp.int32)
        return Prompts(zero, zero, zero, zero > 0, n_shots=1, template=Template(), pad_id=0, label=_Label((), ""))

    return eqx.filter_eval_shape(build)


def _abstract_suite(config: ModelConfig, dtype) -> dict[Site, SAE]:
    """A residual SAE of one latent at every layer: its gradient is asked for, its own size is counted apart."""
    d, one = config.d_model, jnp.zeros(1, dtype)
    sae = lambda site: SAE(
        jnp.zeros((d, 1), dtype), one, jnp.zeros((1, d), dtype), jnp.zeros(d, dtype), site, site, "standard"
    )
    return {site: eqx.filter_eval_shape(sae, site) for site in (Site("resid_pre", i) for i in range(config.n_layers))}


def node_effects_cost(
    config: ModelConfig, batch: int, seq: int, layers: int, n_tasks: int, saes: Sequence[Dictionary], part: Part
) -> Cost:
    """`node_effects` on one task: a pass, and its gradient back through the last `layers` layers, below which none is
    asked for.

    Each SAE runs, and its decoder once more for the gradient by the latents. Tables of two metrics, two each, and a
    ranking are held.
    """

    def program(model):
        run = lambda model, suite, prompts: clean_pass(model, suite, prompts, _metric)
        return run, _abstract_suite(model.config, model.embed.dtype), _abstract_prompts(batch, seq)

    flops = batch * seq * (token_flops(config, seq) + token_flops(config, seq, layers=layers))
    return Cost(
        batch, seq, layers, flops, backward_bytes(config, seq, layers, part), program,
        other_flops=batch * seq * sum(d.flops + d.decode_flops for d in saes), other_row=latents_bytes(seq, saes),
        fixed=_tables(5, n_tasks, saes),
    )  # fmt: skip


def ablation_cost(
    config: ModelConfig, batch: int, seq: int, layers: int, n_tasks: int, saes: Sequence[Dictionary], part: Part, whole: bool
) -> Cost:  # fmt: skip
    """One pass of an ablation on one task from the first SAE on, with all latents (`whole`) or a number that costs next
    to nothing.

    Held are tables of effects by two metrics (2 each) and means, a ranking, eight random ones, and one of a setting.
    """

    def program(model):
        run = lambda model, resid, tokens: token_logprobs(model.run_from(0, resid), tokens)
        resid = abstract_array((batch, seq, model.config.d_model), model.embed.dtype)
        return run, resid, abstract_array((batch, seq))

    return forward_cost(
        config, batch, seq, part, layers=layers, program=program, other_flops=sum(d.flops for d in saes) if whole else 0,
        other_row=latents_bytes(seq, saes, copies=4), fixed=_tables(15, n_tasks, saes),
    )  # fmt: skip
