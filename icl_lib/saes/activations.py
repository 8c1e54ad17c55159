"""Activations of a model at many sites, harvested for SAEs: one forward pass for all sites, without special tokens."""

from collections.abc import Iterable

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Int

from icl_lib.models import Site, Transformer
from icl_lib.models.sites import activations_at, as_site, as_sites, check_sites
from icl_lib.tasks import Prompts, Texts
from icl_lib.text.tokens import batches, check_tokens, token_mask

Rows = Int[np.ndarray, "*stack n seq"] | Int[Array, "*stack n seq"] | Prompts | Texts
Mask = Bool[np.ndarray, "*stack n seq"] | Bool[Array, "*stack n seq"]


def output_site(site_in: Site | str) -> Site:
    """What an SAE that encodes `site_in` reconstructs: the MLP's output for what the MLP reads (a transcoder), else the
    site itself.
    """
    site_in = as_site(site_in)
    return Site("mlp_out", site_in.layer) if site_in.name in ("mlp_in", "mlp_normalized") else site_in


def suite_sites(n_layers: int) -> list[Site]:
    """The paper's suite: residual SAE, attention-output SAE and transcoder of every layer."""
    return [Site(name, layer) for name in ("resid_pre", "attn_out", "mlp_in") for layer in range(n_layers)]


def needed_sites(sites: Iterable[Site | str] | Site | str) -> list[Site]:
    """Sites to harvest for SAEs that encode `sites`: inputs and targets, each once, in the order given."""
    return list(dict.fromkeys(site for s in as_sites(sites) for site in (s, output_site(s))))


def rows_that_count(
    model: Transformer, tokens: Rows, mask: Mask | None, pairs: bool = False
) -> tuple[Int[np.ndarray, "n seq"], Bool[np.ndarray, "n seq"]]:
    """Rows of tokens and where they count: what everything here that runs a model starts with.

    Of prompts, stacked or not, and of texts (`encode_text`) these are their tokens and `real`; of other rows, `mask`
    defaults to `token_mask`. Raises `ValueError` on a token id that the model does not have, on rows longer than its
    context, if the mask has another shape than the tokens, or if nothing counts (with `pairs`: no two neighbours, which
    a loss needs).
    """
    if hasattr(tokens, "tokens") and hasattr(tokens, "real"):
        tokens, mask = tokens.tokens, tokens.real if mask is None else mask
    tokens = np.asarray(tokens, np.int32)
    mask = np.asarray(token_mask(tokens, model.config) if mask is None else mask, bool)
    if mask.shape != tokens.shape or tokens.ndim < 2:
        raise ValueError(f"mask must have the shape of tokens, {tokens.shape}, with rows last, got {mask.shape}")
    tokens, mask = (a.reshape(-1, a.shape[-1]) for a in (tokens, mask))
    check_tokens(tokens, model.config)
    model.config.check_length(tokens.shape[1], "a row")
    if pairs and not (mask[:, 1:] & mask[:, :-1]).any():
        raise ValueError("a loss needs neighbouring true positions in the mask: it has none")
    if not mask.any():
        raise ValueError("the mask drops every token: it must be true where a token counts (neither BOS nor padding)")
    return tokens, mask


def harvest(
    model: Transformer,
    tokens: Rows,
    sites: Iterable[Site | str] | Site | str,
    mask: Mask | None = None,
    *,
    batch_size: int = 64,
    dtype: str = "float32",
) -> dict[Site, np.ndarray]:  # fmt: skip
    """Activations in host memory, `acts[site]` (n_tokens, d_model) in `dtype`, for the tokens where `mask` is true.

    `tokens` are rows or prompts; see `rows_that_count`, also for `mask` and for what is raised. Row i is the same token
    at every site. float16 halves the memory (n_tokens x d_model x 2 bytes a site). Raises `ValueError` also if a layer
    does not exist, or if a value overflows `dtype`.
    """
    sites = check_sites(model.config, sites)
    tokens, mask = rows_that_count(model, tokens, mask)
    n = int(mask.sum())
    acts: dict[Site, np.ndarray] = {}
    start = 0
    for rows, keep in batches(tokens, mask, batch_size):
        cache = _activations(model, rows, sites)
        stop = start + int(keep.sum())
        for site in sites:
            values = np.asarray(cache[site])[keep].astype(dtype)
            if site not in acts:
                acts[site] = np.empty((n, *values.shape[1:]), dtype)
            acts[site][start:stop] = values
        start = stop
    for site, values in acts.items():
        if not np.isfinite(values).all():
            raise ValueError(f"activations at {site} are not finite in {dtype}: harvest in float32, or check the model")
    return acts


_activations = eqx.filter_jit(activations_at)
