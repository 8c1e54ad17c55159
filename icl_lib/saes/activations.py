"""Activations of a model at many sites, harvested for training SAEs: one forward pass for all sites, special tokens dropped."""

from collections.abc import Iterable, Mapping

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Int

from icl_lib.models import Site, Transformer, record
from icl_lib.models.sites import check_sites
from icl_lib.text.tokens import batches, check_tokens, token_mask


def output_site(site_in: Site) -> Site:
    """What an SAE that encodes `site_in` reconstructs: the MLP's output for what the MLP reads (a transcoder), else the site itself."""
    return Site("mlp_out", site_in.layer) if site_in.name in ("mlp_in", "mlp_normalized") else site_in


def suite_sites(n_layers: int) -> list[Site]:
    """The paper's suite: residual SAE, attention-output SAE and transcoder of every layer."""
    return [Site(name, layer) for name in ("resid_pre", "attn_out", "mlp_in") for layer in range(n_layers)]


def needed_sites(sites: Iterable[Site]) -> list[Site]:
    """Sites to harvest for SAEs that encode `sites`: inputs and targets, each once, in the order given."""
    return list(dict.fromkeys(site for s in sites for site in (s, output_site(s))))


def harvest(
    model: Transformer,
    tokens: Int[np.ndarray, "n seq"] | Int[Array, "n seq"],
    sites: Iterable[Site],
    mask: Bool[np.ndarray, "n seq"] | Bool[Array, "n seq"] | None = None,
    *,
    batch_size: int = 64,
    dtype: str = "float32",
) -> dict[Site, np.ndarray]:
    """Activations in host memory, `acts[site]` (n_tokens, d_model) in `dtype`, for the tokens where `mask` is true.

    `mask` defaults to `token_mask`. Row i is the same token at every site. float16 halves the memory (n_tokens x d_model x
    2 bytes a site). Raises `ValueError` if nothing is left, if a layer or token id does not exist, or if a value overflows `dtype`.
    """
    sites = check_sites(model.config, dict.fromkeys(sites))
    tokens = np.asarray(tokens, dtype=np.int32)
    mask = token_mask(tokens, model.config) if mask is None else np.asarray(mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask must have the shape of tokens, {tokens.shape}, got {mask.shape}")
    check_tokens(tokens, model.config)
    n = int(mask.sum())
    if n == 0:
        raise ValueError(
            "the mask drops every token: it must be true where an activation is wanted (neither BOS nor padding)"
        )
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
    _check_finite(acts)
    return acts


@eqx.filter_jit
def _activations(model: Transformer, tokens: Array, sites: tuple[Site, ...]) -> dict[Site, Array]:
    """What `sites` see. The compiler drops what they do not need: the layers above them and the logits."""
    cache: dict[Site, Array] = {}
    model(tokens, tap=record(sites, cache))
    return cache


def _check_finite(acts: Mapping[Site, np.ndarray]) -> None:
    for site, values in acts.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"activations at {site} are not finite in {values.dtype}: harvest in float32, or check the model's weights"
            )
