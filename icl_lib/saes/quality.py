r"""How good an SAE is: sparsity, reconstruction, dead and dense latents, and what splicing it into the model costs.

Everything is measured on the tokens where `mask` is true, which leaves out BOS and padding. FVU is about the mean, CE
in nats per token; the ablation behind "CE recovered" is named. A share of nothing is NaN, never an error or infinite:
FVU of activations that do not vary, CE recovered where the ablation costs nothing, means and rates over no token.
"""

import functools
import math
from collections.abc import Hashable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float, Int

from icl_lib.models import Site, Transformer
from icl_lib.models.sites import activations_at
from icl_lib.saes.activations import Mask, Rows, rows_that_count
from icl_lib.saes.formats import check_fit
from icl_lib.saes.sae import SAE
from icl_lib.saes.survey import decoder_cosine
from icl_lib.text.tokens import batches

DENSE = 0.1  # a latent is dense if it fires on more than this part of the tokens
_ABLATIONS = ("zero", "mean")
_NO_VARIANCE = 1e-10  # of the mean square: what float32 leaves of a constant
_NO_COST = 1e-6  # of the clean CE: less is rounding


def _weights(x: Array, mask: Array | None) -> Array:
    """(*batch) float32: 1 where a token counts."""
    return jnp.ones(x.shape[:-1], jnp.float32) if mask is None else mask.astype(jnp.float32)


def masked_mean(x: Float[Array, "*batch d"], mask: Bool[Array, "*batch"] | None = None) -> Float[Array, " d"]:
    """Mean over the tokens that count, in float32."""
    w = _weights(x, mask)
    return jnp.einsum("n,nd->d", w.ravel(), x.reshape(-1, x.shape[-1]).astype(jnp.float32)) / jnp.sum(w)


def l0(f: Float[Array, "*batch d_sae"], mask: Bool[Array, "*batch"] | None = None) -> Float[Array, ""]:
    """Features above 0, mean per token."""
    w = _weights(f, mask)
    return jnp.sum(w * jnp.sum(f > 0, axis=-1, dtype=jnp.float32)) / jnp.sum(w)


def fvu(
    x: Float[Array, "*batch d"], x_hat: Float[Array, "*batch d"], mask: Bool[Array, "*batch"] | None = None
) -> Float[Array, ""]:
    r"""Fraction of variance unexplained, $\sum\|x - \hat x\|^2 / \sum\|x - \bar x\|^2$: 0 is perfect, 1 is the mean.
    NaN where x does not vary."""
    w = _weights(x, mask)
    mean = jnp.broadcast_to(masked_mean(x, mask), x.shape)
    x, x_hat = x.astype(jnp.float32), x_hat.astype(jnp.float32)
    total = lambda y: jnp.sum(w * jnp.sum(y**2, axis=-1))
    return _unexplained(total(x - x_hat), total(x - mean), total(x))


def _unexplained(err: Array, var: Array, square: Array) -> Array:
    """`err / var`, NaN where there is no variance to explain."""
    return jnp.where(var > _NO_VARIANCE * square, err / var, jnp.nan)


def recovered(abl: float, clean: float, spliced: float) -> float:
    """CE recovered from the three losses, NaN where the ablation costs nothing."""
    return (abl - spliced) / (abl - clean) if abs(abl - clean) > _NO_COST * abs(clean) else math.nan


def frequency(f: Float[Array, "*batch d_sae"], mask: Bool[Array, "*batch"] | None = None) -> Float[Array, " d_sae"]:
    """Part of the tokens on which each latent fires."""
    return masked_mean((f > 0).astype(jnp.float32), mask)


def dead_fraction(freq: Float[Array, " d_sae"]) -> Float[Array, ""]:
    """Part of the latents that never fire on these tokens. A latent rarer than one in n_tokens looks dead: use many."""
    return jnp.mean(jnp.where(jnp.isnan(freq), freq, (freq == 0).astype(jnp.float32)))


def dense_fraction(freq: Float[Array, " d_sae"]) -> Float[Array, ""]:
    """Part of the latents that fire on more than a tenth of the tokens."""
    return jnp.mean(jnp.where(jnp.isnan(freq), freq, (freq > DENSE).astype(jnp.float32)))


def cross_entropy(
    logits: Float[Array, "batch seq d_vocab"], tokens: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"]
) -> Float[Array, ""]:
    """Next-token CE in nats, summed where both the token and the next are in `mask`."""
    logp = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask[:, :-1] & mask[:, 1:], picked, 0))


def splice(sae: SAE, mask: Bool[Array, "batch seq"]):
    """A tap that puts `decode(encode(x))` in the place of the activation where `mask` is true. A transcoder reads
    `site_in` and replaces `site_out`; the error is not added back, elsewhere nothing changes."""
    seen = {}

    def tap(site, x):
        if site == sae.site_in:
            seen["x"] = x
        if site != sae.site_out:
            return x
        return jnp.where(mask[..., None], sae(seen["x"]).astype(x.dtype), x)

    return tap


def ablate(site: Site, value: Float[Array, " d"], mask: Bool[Array, "batch seq"]):
    """A tap that puts the constant `value` in the place of the activation at `site` where `mask` is true."""
    put = lambda x: jnp.where(mask[..., None], jnp.broadcast_to(value.astype(x.dtype), x.shape), x)
    return lambda at, x: put(x) if at == site else x


def ce_recovered(
    model: Transformer, sae: SAE, tokens: Rows, mask: Mask | None = None, ablation: str = "zero", *,
    batch_size: int = 32,
) -> float:  # fmt: skip
    r"""$(CE_{abl} - CE_{sae}) / (CE_{abl} - CE_{clean})$: 1 if splicing the SAE in is free, 0 if it is an ablation.

    `ablation` puts 0 or the mean over these tokens at the SAE's target. BOS and padding stay clean throughout. Raises
    `ValueError` on another ablation, or if the SAE does not fit the model.
    """
    if ablation not in _ABLATIONS:
        raise ValueError(f"ablation must be one of {', '.join(_ABLATIONS)}, got {ablation!r}")
    row = quality_table(model, {sae.site_in: sae}, tokens, mask, batch_size=batch_size).iloc[0]
    return float(row[f"ce_recovered_{ablation}"])


def quality_table(
    model: Transformer, suite: Mapping[Hashable, SAE], tokens: Rows, mask: Mask | None = None, *, batch_size: int = 32
) -> pd.DataFrame:
    """One row per SAE on held-out `tokens`; see `rows_that_count` for tokens and mask. Several may share a site.

    Columns: site, kind (residual, attention, transcoder), layer, d_sae, l0, fvu, ce_recovered_zero, ce_recovered_mean,
    dead (fires on none of these tokens), dense (fires on more than a tenth), decoder_cosine (median over latents of the
    largest cosine between a decoder row and another), ce_clean, ce_sae, ce_zero, ce_mean (nats per token). Raises
    `ValueError` before anything is computed if an SAE, a row or a token id does not fit the model.
    """
    for site, sae in suite.items():
        check_fit(sae, model.config, str(site))
    rows = zip(*batches(*rows_that_count(model, tokens, mask, pairs=True), batch_size), strict=True)
    stacked = [jnp.stack([jnp.asarray(batch) for batch in part]) for part in rows]  # (n_batches, batch, seq) each
    saes = tuple(suite.values())
    means = _target_means(model, saes, *stacked)
    table = _measure(model, saes, means, *stacked)
    return pd.DataFrame([_row(sae, {k: np.asarray(v[i]) for k, v in table.items()}) for i, sae in enumerate(saes)])


@eqx.filter_jit
def _target_means(model: Transformer, saes: tuple[SAE, ...], tokens: Array, mask: Array) -> list[Array]:
    """Mean of each SAE's target over all tokens that count."""

    def one(batch):
        cache = activations_at(model, batch[0], [sae.site_out for sae in saes])
        w = batch[1].astype(jnp.float32)
        return [jnp.einsum("bs,bsd->d", w, cache[sae.site_out].astype(jnp.float32)) for sae in saes]

    total = jnp.sum(mask, dtype=jnp.float32)
    return [jnp.sum(s, axis=0) / total for s in jax.lax.map(one, (tokens, mask))]


@eqx.filter_jit
def _measure(
    model: Transformer, saes: tuple[SAE, ...], means: list[Array], tokens: Array, mask: Array
) -> dict[str, Array]:
    """All columns, (n_saes,) each, in one compiled program. The model is compiled once, with a switch at each site;
    which SAE is spliced in, and how, is a value of the run."""
    n, d_sae = len(saes), max(sae.d_sae for sae in saes)

    def run(batch, which, how):
        logits = model(batch[0], tap=_switched(saes, means, batch[1], which, how))
        return cross_entropy(logits, *batch)

    def one(batch):
        cache = activations_at(model, batch[0], {s for sae in saes for s in (sae.site_in, sae.site_out)})
        parts = [_parts(sae, mean, cache, batch[1], d_sae) for sae, mean in zip(saes, means, strict=True)]
        sums = {name: jnp.stack([p[name] for p in parts]) for name in parts[0]}
        grid = jnp.stack(jnp.meshgrid(jnp.arange(n), jnp.arange(3), indexing="ij"), axis=-1).reshape(-1, 2)
        ce = jax.lax.map(lambda g: run(batch, g[0], g[1]), grid).reshape(n, 3)
        return sums | {"ce": ce, "clean": run(batch, jnp.asarray(-1), jnp.asarray(0))}

    sums = jax.tree.map(functools.partial(jnp.sum, axis=0), jax.lax.map(one, (tokens, mask)))
    pairs = jnp.sum(mask[..., :-1] & mask[..., 1:], dtype=jnp.float32)
    count = jnp.sum(mask, dtype=jnp.float32)
    ce, clean = sums["ce"] / pairs, jnp.broadcast_to(sums["clean"] / pairs, (n,))
    columns = {"l0": jnp.sum(sums["fired"], axis=1) / count, "fired": sums["fired"] / count}
    columns |= {"fvu": _unexplained(sums["err"], sums["var"], sums["square"])}
    return columns | {"ce_clean": clean, "ce_sae": ce[:, 0], "ce_zero": ce[:, 1], "ce_mean": ce[:, 2]}


def _parts(sae: SAE, mean: Array, cache: dict[Site, Array], mask: Array, d_sae: int) -> dict[str, Array]:
    """Sums over a batch that the columns are made of."""
    w = mask.astype(jnp.float32)
    f, y = sae.encode(cache[sae.site_in]), cache[sae.site_out].astype(jnp.float32)
    fired = jnp.einsum("bs,bsf->f", w, (f > 0).astype(jnp.float32))
    err, centred = y - sae.decode(f, cache[sae.site_in]), y - jnp.broadcast_to(mean, y.shape)
    fired = jnp.pad(fired, (0, d_sae - sae.d_sae))
    total = lambda v: jnp.einsum("bs,bsd->", w, v**2)
    return {"fired": fired, "err": total(err), "var": total(centred), "square": total(y)}


def _switched(saes: tuple[SAE, ...], means: list[Array], mask: Array, which: Array, how: Array):
    """A tap that replaces the target of SAE `which` by its reconstruction, zero or the mean (`how` = 0, 1, 2)."""
    seen: dict[Site, Array] = {}

    def tap(site, x):
        seen[site] = x
        for i, (sae, mean) in enumerate(zip(saes, means, strict=True)):
            if site == sae.site_out:
                taps = (splice(sae, mask), ablate(site, jnp.zeros_like(mean), mask), ablate(site, mean, mask))
                taps[0](sae.site_in, seen[sae.site_in])
                branches = [functools.partial(t, site) for t in taps] + [lambda value: value]
                x = jax.lax.switch(jnp.where(which == i, how, 3), branches, x)
        return x

    return tap


def _row(sae: SAE, values: Mapping[str, np.ndarray]) -> dict:
    freq = jnp.asarray(values["fired"][: sae.d_sae])
    clean, spliced = float(values["ce_clean"]), float(values["ce_sae"])
    shares = {f"ce_recovered_{a}": recovered(float(values[f"ce_{a}"]), clean, spliced) for a in _ABLATIONS}
    row = {"site": str(sae.site_in), "kind": sae.site_in.kind, "layer": sae.site_in.layer, "d_sae": sae.d_sae}
    row |= {"l0": float(values["l0"]), "fvu": float(values["fvu"])} | shares
    row |= {"dead": float(dead_fraction(freq)), "dense": float(dense_fraction(freq))}
    row |= {"decoder_cosine": float(jnp.nanmedian(decoder_cosine(sae.W_dec)))}
    return row | {name: float(values[name]) for name in ("ce_clean", "ce_sae", "ce_zero", "ce_mean")}
