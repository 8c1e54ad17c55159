"""Names of the places in a transformer where an activation can be read or changed, and the taps that do so.

A *tap* is a function `tap(site, x) -> x` that the model calls at every site in the order of computation. Caching
records, steering adds, ablation replaces, freezing attention replaces the pattern: there is no other hook mechanism.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral

import equinox as eqx
from jaxtyping import Array, Float, Int

from icl_lib.files.names import did_you_mean

# Our short names in the order of computation inside a block, and TransformerLens' names for the same tensors.
LAYER_SITES = {
    "resid_pre": "hook_resid_pre",  # (b, s, d_model) input of the block
    "attn_in": "attn.hook_in",  # (b, s, d_model) what q, k and v read: norm output, gain applied
    "q": "attn.hook_q",  # (b, s, n_heads, d_head) before the rotary embedding
    "k": "attn.hook_k",  # (b, s, n_kv_heads, d_head)
    "v": "attn.hook_v",  # (b, s, n_kv_heads, d_head)
    "rot_q": "attn.hook_rot_q",  # after the rotary embedding
    "rot_k": "attn.hook_rot_k",
    "pattern": "attn.hook_pattern",  # (b, n_heads, s, keys) attention probabilities
    "z": "attn.hook_z",  # (b, s, n_heads * d_head) mixed values before the output matrix, head by head
    "attn_out": "hook_attn_out",  # (b, s, d_model) what attention adds to the residual
    "resid_mid": "hook_resid_mid",  # (b, s, d_model) after attention
    "mlp_normalized": "ln2.hook_normalized",  # (b, s, d_model) float32, after the MLP's norm but before its gain
    "mlp_in": "mlp.hook_in",  # (b, s, d_model) what the MLP reads: norm output, gain applied
    "mlp_out": "hook_mlp_out",  # (b, s, d_model) what the MLP adds to the residual
    "resid_post": "hook_resid_post",  # (b, s, d_model) output of the block
}
# What an SAE that reads a site is called everywhere: in tables, circuits, cards and figures.
KINDS = ("residual", "attention", "transcoder", "mlp")
_KIND_OF_SITE = {
    "resid_pre": "residual", "resid_mid": "residual", "resid_post": "residual", "z": "attention",
    "attn_out": "attention", "mlp_normalized": "transcoder", "mlp_in": "transcoder", "mlp_out": "mlp",
}  # fmt: skip
GLOBAL_SITES = {"embed": "hook_embed", "final_norm": "ln_final.hook_normalized", "logits": "hook_logits"}
_FROM_HOOK = {hook: name for names in (LAYER_SITES, GLOBAL_SITES) for name, hook in names.items()}


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """One named activation: `Site("resid_pre", 12)`, or `Site("embed")` for those outside the blocks.

    `str(site)` is TransformerLens' name, "blocks.12.hook_resid_pre"; `Site.parse` reads it back.
    Raises `ValueError` on an unknown name, or where a layer is missing or not wanted.
    """

    name: str
    layer: int | None = None

    def __post_init__(self):
        if self.name not in LAYER_SITES and self.name not in GLOBAL_SITES:
            known = [*LAYER_SITES, *GLOBAL_SITES]
            near = did_you_mean(self.name, known)
            raise ValueError(f"unknown site {self.name!r}{'; ' if near else '. '}{near}Sites are {', '.join(known)}")
        if (self.layer is None) == (self.name in LAYER_SITES):
            needs = "needs a" if self.layer is None else "takes no"
            raise ValueError(f"site {self.name!r} {needs} layer, got {self.layer}")

    def __str__(self) -> str:
        return GLOBAL_SITES[self.name] if self.layer is None else f"blocks.{self.layer}.{LAYER_SITES[self.name]}"

    @property
    def kind(self) -> str:
        """What an SAE that reads this site is called (one of `KINDS`); the site's own name where none is trained."""
        return _KIND_OF_SITE.get(self.name, self.name)

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site of a TransformerLens hook name."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", text)
        hook, layer = (match[2], int(match[1])) if match else (text, None)
        if hook not in _FROM_HOOK:
            raise ValueError(f"{text!r} names no site; examples are blocks.3.hook_resid_pre and hook_embed")
        return cls(_FROM_HOOK[hook], layer)


def as_site(site: Site | str) -> Site:
    """`site` itself, or that of a text: "resid_pre.4" and "embed", or TransformerLens' "blocks.4.hook_resid_pre".

    Wherever a function of this library takes a site, it takes such a text. Raises `ValueError` on any other text.
    """
    if isinstance(site, Site):
        return site
    if "hook" in (text := str(site)):
        return Site.parse(text)
    name, _, layer = text.partition(".")
    return Site(name, int(layer)) if layer.isdecimal() else Site(text)


def as_sites(sites: Iterable[Site | str] | Site | str) -> tuple[Site, ...]:
    """The sites, or the only one."""
    return tuple(map(as_site, [sites] if isinstance(sites, Site | str) else sites))


def as_layers(layers: Iterable[int] | int) -> tuple[int, ...]:
    """The layers, or the only one, as plain numbers."""
    return (int(layers),) if isinstance(layers, Integral) else tuple(map(int, layers))


Tap = Callable[[Site, Array], Array]


def compose(*taps: Tap) -> Tap:
    """One tap that applies `taps` from left to right at every site."""
    return lambda site, x: functools.reduce(lambda value, each: each(site, value), taps, x)


def record(sites: Iterable[Site | str], cache: dict[Site, Array]) -> Tap:
    """A tap that stores the named activations in `cache` and changes nothing."""
    wanted = frozenset(as_sites(sites))

    def tap(site, x):
        if site in wanted:
            cache[site] = x
        return x

    return tap


def replace(values: Mapping[Site | str, Array]) -> Tap:
    """A tap that puts `values[site]` in the place of the activation, e.g. a clean attention pattern."""
    values = {as_site(site): value for site, value in values.items()}

    def tap(site, x):
        return values.get(site, x)

    return tap


def perturb(deltas: Mapping[Site | str, Array]) -> Tap:
    """A tap that adds `deltas[site]`. Differentiating at zero deltas gives the gradient at every site in one pass."""
    deltas = {as_site(site): delta for site, delta in deltas.items()}

    def tap(site, x):
        return x + deltas[site].astype(x.dtype) if site in deltas else x

    return tap


def check_sites(config, sites: Iterable[Site | str] | Site | str) -> tuple[Site, ...]:
    """The sites as a tuple, each once. Raises `ValueError` on a layer that the model does not have."""
    sites = tuple(dict.fromkeys(as_sites(sites)))
    for site in sites:
        if site.layer is not None:
            config.check_layer(site.layer, f"layer of site {site}")
    return sites


def activations_at(model, tokens: Int[Array, "batch seq"], sites: Iterable[Site]) -> dict[Site, Array]:
    """What `sites` see in one pass. Not compiled: inside of a compiled program nothing above the sites is computed."""
    cache: dict[Site, Array] = {}
    model(tokens, tap=record(sites, cache))
    return cache


@eqx.filter_jit
def _run_with_cache(model, tokens, sites):
    cache: dict[Site, Array] = {}
    return model(tokens, tap=record(sites, cache)), cache


def run_with_cache(
    model, tokens: Int[Array, "batch seq"], sites: Iterable[Site | str] | Site | str
) -> tuple[Float[Array, "batch seq d_vocab"], dict[Site, Array]]:
    """Logits and the activations at `sites`, by `Site`, from one compiled forward pass.

    A site may be given as a text: "resid_pre.4", or TransformerLens' name, "blocks.4.hook_resid_pre". Raises
    `ValueError` on a layer out of range, before anything is computed.
    """
    return _run_with_cache(model, tokens, check_sites(model.config, sites))
