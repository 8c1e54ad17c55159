r"""Node effects: how much each SAE latent, at each role of a prompt, adds to a metric.

A node is (site, role, latent). Its indirect effect under zero ablation, to first order at the clean run, is

$$\widehat{IE}_{r,i} = \frac{1}{B} \sum_b \sum_{t \in r} f_i(x_{b,t})\; W_{dec,i} \cdot \nabla_{y_{b,t}} m ,$$

with x what the SAE reads and y what it writes (for a transcoder x = mlp_in and y = mlp_out). STYLE defines IE as
m(patched) - m(clean); here the sign is turned, so that **positive means that the node helps** and that ablating it
would lower m by this much. The error node of a site and role is the same sum with y - decode(f) for f_i W_dec,i.
All gradients come from one backward pass through zero perturbations at the outputs of all SAEs.

Source: ICL-SFC, Sec. 4.1; SFC (Marks et al. 2025), Sec. 3.1.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from icl_lib.models import Site, Transformer, compose, perturb, record
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Role
from icl_lib.tasks.metrics import pair_logprob

Metric = Callable[[Array, Prompts], Array]  # (logits, prompts) -> (b,), larger is better
Suite = dict[Site, SAE]  # keyed by site_in
Patch = Literal["zero", "mean"]

N_ROLES = len(Role)
# What an SAE that reads a site is called in a circuit; sites in the order of computation.
KINDS = {
    "resid_pre": "residual", "z": "attn_out", "attn_out": "attn_out", "mlp_normalized": "transcoder", "mlp_in": "transcoder",
    "mlp_out": "mlp_out",
}  # fmt: skip


def suite_in_layers(model: Transformer, suite: Suite, layers: Iterable[int]) -> Suite:
    """The folded SAEs of `suite` that sit in `layers`, in the order in which the model meets them.

    Raises `ValueError` on a layer that the model does not have, a layer without any SAE, or an SAE of another width.
    """
    layers = sorted(set(layers))
    if not layers:
        raise ValueError("layers is empty: name at least one layer whose SAEs are to be used")
    for layer in layers:
        model.config.check_layer(layer)
    have = sorted({site.layer for site in suite})
    missing = [layer for layer in layers if layer not in have]
    if missing:
        raise ValueError(
            f"the suite has no SAE in layers {missing}, only in {have}: train or load these, or leave them out of layers"
        )
    order = list(KINDS)
    unknown = [str(site) for site in suite if site.name not in KINDS]
    if unknown:
        raise ValueError(
            f"circuits use SAEs at {', '.join(order)}, but the suite has {', '.join(unknown)}: leave these out of it"
        )
    sites = sorted((s for s in suite if s.layer in layers), key=lambda s: (s.layer, order.index(s.name)))
    kinds: dict[tuple, Site] = {}
    for site in sites:
        if suite[site].d_in != model.config.width(site.name):
            raise ValueError(
                f"the SAE at {site} reads d_in = {suite[site].d_in}, but the model has {model.config.width(site.name)} there: "
                "was it trained on another model?"
            )
        if (twin := kinds.setdefault((site.layer, KINDS[site.name]), site)) != site:
            raise ValueError(
                f"the SAEs at {twin} and {site} are both the {KINDS[site.name]} of layer {site.layer}: leave one out of the suite"
            )
    return {site: suite[site].fold() for site in sites}


def node_roles(prompts: Prompts) -> Int[Array, "*tasks b s"]:
    """The role under which each token is part of nodes, `Role.OTHER` where it is part of none.

    Of a word or an arrow only the last token counts; BOS, padding and the answer of the query never do.
    Source: ICL-SFC, Sec. 4.1.1, and the authors' code, which takes the last token of a word.
    """
    roles = jnp.zeros_like(prompts.roles)
    for role in Role:
        scheme = "last" if role in (Role.INPUT, Role.ARROW, Role.OUTPUT) else "all"
        roles = jnp.where(prompts.mask(role, scheme) & ~prompts.answer, jnp.asarray(int(role), roles.dtype), roles)
    return roles


def role_indicator(roles: Int[Array, "*batch s"]) -> Float[Array, "*batch s n_roles"]:
    """One column per role, 1 at its tokens; the column of `Role.OTHER` is zero, because it has no nodes."""
    return jax.nn.one_hot(roles, N_ROLES, dtype=jnp.float32).at[..., Role.OTHER].set(0.0)


class CleanPass(eqx.Module):
    """What the SAEs of a suite see in the clean run; every dict is keyed by the site that the SAE reads."""

    reads: dict[Site, Float[Array, "b s _"]]  # x at site_in
    writes: dict[Site, Float[Array, "b s _"]]  # y at site_out
    grads: dict[Site, Float[Array, "b s _"]]  # gradient of the mean metric in y
    metric: Float[Array, ""]  # mean over prompts


@eqx.filter_jit
def clean_pass(model: Transformer, suite: Suite, prompts: Prompts, metric: Metric) -> CleanPass:
    """One forward and one backward pass; `prompts` of one task."""
    outs = [sae.site_out for sae in suite.values()]

    def forward(deltas):
        cache: dict[Site, Array] = {}
        # The perturbation comes first, so that a site reads what the rest of the model reads.
        logits = model(prompts.tokens, tap=compose(perturb(deltas), record([*suite, *outs], cache)))
        return jnp.mean(metric(logits, prompts)), cache

    zeros = {sae.site_out: jnp.zeros((*prompts.tokens.shape, sae.W_dec.shape[1])) for sae in suite.values()}
    (value, cache), grads = jax.value_and_grad(forward, has_aux=True)(zeros)
    pick = lambda values, attribute: {site: values[attribute(site)].astype(jnp.float32) for site in suite}
    reads = pick(cache, lambda site: site)
    writes, grads = (pick(values, lambda site: suite[site].site_out) for values in (cache, grads))
    return CleanPass(reads, writes, grads, value)


def latents_and_error(sae: SAE, x: Float[Array, "b s d_in"], y: Float[Array, "b s d_out"]) -> tuple[Array, Array]:
    """f (b, s, d_sae) and what the SAE does not explain of its output, err = y - decode(f) (b, s, d_out)."""
    f = sae.encode(x.astype(sae.W_enc.dtype))
    return f.astype(jnp.float32), y - sae.decode(f, x).astype(jnp.float32)


class Effects(eqx.Module):
    """Effects of all nodes, in units of the metric; rows of the tables are roles, by the value of `Role`.

    Sums over the positions of the role, averaged over prompts; positive means that the node helps. `means` is the mean
    activation over the positions of the role (also what mean ablation puts in). Error nodes have one number a role.
    With stacked prompts every array has a leading task axis.
    """

    latents: dict[Site, Float[Array, "*tasks n_roles _"]]
    errors: dict[Site, Float[Array, "*tasks n_roles"]]
    means: dict[Site, Float[Array, "*tasks n_roles _"]]
    metric: Float[Array, "*tasks"]

    def task(self, index: int) -> "Effects":
        """The effects of one task of a stack."""
        return jax.tree.map(lambda a: a[index], self)


def _site_effects(
    sae: SAE, x: Array, y: Array, grad: Array, indicator: Array, patch: Patch
) -> tuple[Array, Array, Array]:
    """Effects (n_roles, d_sae), error effects (n_roles,) and mean activations (n_roles, d_sae) of one SAE."""
    f, err = latents_and_error(sae, x, y)
    total = lambda values: jnp.einsum("bsf,bsr->rf", values, indicator)
    count = jnp.maximum(jnp.sum(indicator, axis=(0, 1)), 1.0)[:, None]
    mean = total(f) / count
    grad_f = grad @ sae.W_dec.astype(jnp.float32).T
    effect, effect_err = total(grad_f * f), jnp.sum(total(grad * err), axis=-1)
    if patch == "mean":
        effect = effect - total(grad_f) * mean
        effect_err = effect_err - jnp.sum(total(grad) * total(err) / count, axis=-1)
    return effect, effect_err, mean


def _task_effects(model: Transformer, suite: Suite, prompts: Prompts, metric: Metric, patch: Patch) -> Effects:
    """Effects on one task."""
    clean = clean_pass(model, suite, prompts, metric)
    indicator = role_indicator(node_roles(prompts))
    parts = {
        s: _site_effects(suite[s], clean.reads[s], clean.writes[s], clean.grads[s], indicator, patch) for s in suite
    }
    latents, errors, means = ({site: part[i] for site, part in parts.items()} for i in range(3))
    return Effects(latents, errors, means, clean.metric)


@eqx.filter_jit
def _effects(model, suite, prompts, metric, patch):
    one = lambda each: _task_effects(model, suite, each, metric, patch)
    if prompts.tokens.ndim == 2:
        return one(prompts)
    return map_tasks(one, prompts)


def map_tasks(function, *stacked):
    """`function` on each task of stacked trees, one after another, inside one compiled program."""
    return jax.lax.map(lambda each: function(*each), stacked)


def node_effects(
    model: Transformer,
    suite: Suite,
    prompts: Prompts,
    layers: Iterable[int],
    metric: Metric = pair_logprob,
    patch: Patch = "zero",
) -> Effects:
    r"""Effects of the latents and error nodes of every SAE in `layers`, for one task or a stack of tasks.

    `patch` names what a node would be replaced by: "zero" gives $\nabla m \cdot f$, "mean" $\nabla m \cdot (f - \bar f)$ with
    $\bar f$ the mean over the positions of the role in these prompts. Raises `ValueError` on a layer out of range, a layer
    without SAEs, an unknown patch, or prompts too short for the metric.
    """
    if patch not in ("zero", "mean"):
        raise ValueError(f"patch must be 'zero' or 'mean', got {patch!r}")
    return _effects(model, suite_in_layers(model, suite, layers), prompts, metric, patch)
