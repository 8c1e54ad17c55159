"""One sparse autoencoder (or transcoder) at one site of a model, in every form of the experiments and public files."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from icl_lib.models import Site

ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk")
# what each form has beyond the two matrices and their biases
_EXTRA = {"gated": ("r_mag", "b_mag"), "jumprelu": ("threshold",), "batchtopk": ("threshold",)}


def along(vector: Float[Array, " n"], x: Array) -> Array:
    """`vector` with the leading axes of `x`, each of length 1: nothing here relies on implicit rank promotion."""
    return jnp.expand_dims(vector, range(x.ndim - 1))


def jumprelu(pre: Float[Array, "*batch d_sae"], threshold: Float[Array, " d_sae"]) -> Float[Array, "*batch d_sae"]:
    r"""$\mathrm{ReLU}(p)\,1[p > \theta]$, the comparison strict. The gradient passes where the latent is on."""
    return jnp.where(pre > along(jnp.maximum(threshold, 0), pre), pre, 0)


def top_k(pre: Float[Array, "*batch d_sae"], k: int) -> Float[Array, "*batch d_sae"]:
    """The k largest entries along the last axis where positive, zero elsewhere; where values tie too, k at most."""
    values, index = jax.lax.top_k(pre, k)
    return jnp.put_along_axis(jnp.zeros_like(pre), index, jax.nn.relu(values), axis=-1, inplace=False)


class SAE(eqx.Module):
    r"""A sparse autoencoder of the activations at `site_in`, or a transcoder from them to those at `site_out`.

    $\hat x = f W_{dec} + b_{dec}$, to which a transcoder may add $x W_{skip}$. With $h = x W_{enc}$ the features are,
    by `architecture`,

    - standard: $f = \mathrm{ReLU}(h + b_{enc})$
    - gated: $f = 1[h + b_{enc} > 0]\,\mathrm{ReLU}(h\,e^{r_{mag}} + b_{mag})$, so that `b_enc` is the bias of the gate
    - jumprelu: $f = \mathrm{ReLU}(h + b_{enc})\,1[h + b_{enc} > \theta]$
    - topk: the `k` largest entries of $\mathrm{ReLU}(h + b_{enc})$ of each token
    - batchtopk: the same as jumprelu. Training kept the largest of a whole batch, and $\theta$ is the smallest that
      this keeps.

    Row $i$ of `W_dec` is what latent $i$ writes, in units of `site_out`. There is no normalisation of input or output,
    and no bias is taken from the input: training and file readers fold all that into the weights. `metadata` is a tuple
    of (name, value) pairs, kept in files.

    Raises `ValueError` at construction if shapes disagree or a weight of the architecture is missing or too many.
    Sources: Rajamanoharan et al. (2024), "Improving Dictionary Learning with Gated Sparse Autoencoders", Eqs. (6) to
    (8); the same authors (2024), "Jumping Ahead", Eq. (3); Gao et al. (2024), "Scaling and evaluating sparse
    autoencoders", Sec. 2.3; Bussmann et al. (2024), "BatchTopK Sparse Autoencoders"; Dunefsky et al. (2024) and Paulo
    et al. (2025), "Transcoders Beat Sparse Autoencoders for Interpretability", for transcoders without and with skip.
    """

    W_enc: Float[Array, "d_in d_sae"]
    b_enc: Float[Array, " d_sae"]
    W_dec: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    site_in: Site = eqx.field(static=True)
    site_out: Site = eqx.field(static=True)
    architecture: str = eqx.field(static=True)
    threshold: Float[Array, " d_sae"] | None = None
    r_mag: Float[Array, " d_sae"] | None = None
    b_mag: Float[Array, " d_sae"] | None = None
    W_skip: Float[Array, "d_in d_out"] | None = None
    k: int | None = eqx.field(static=True, default=None)
    metadata: tuple[tuple[str, Any], ...] = eqx.field(static=True, default=())

    def __check_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        (d_in, d_sae), d_out = self.W_enc.shape, self.W_dec.shape[1]
        wanted = {"b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
        extra = _EXTRA.get(self.architecture, ())
        wanted |= dict.fromkeys(extra, (d_sae,))
        wanted |= {} if self.W_skip is None else {"W_skip": (d_in, d_out)}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None or value.shape != shape:
                came = "nothing" if value is None else f"shape {value.shape}"
                one = f"a {self.architecture} SAE with W_enc {self.W_enc.shape}"
                raise ValueError(f"{one} needs {name} of shape {shape}, got {came}")
        for name in {"threshold", "r_mag", "b_mag"} - set(extra):
            if getattr(self, name) is not None:
                raise ValueError(f"a {self.architecture} SAE has no {name}: leave it out or choose another form")
        if (self.k is None) == (self.architecture == "topk") or (self.k is not None and not 1 <= self.k <= d_sae):
            got = f"k = {self.k} for {self.architecture}"
            raise ValueError(f"a topk SAE needs k in 1..{d_sae}, other architectures have none; got {got}")
        if self.W_skip is not None and not self.is_transcoder:
            raise ValueError(f"W_skip is for transcoders: with it, an SAE of {self.site_in} could copy its input")

    @property
    def d_in(self) -> int:
        """Width of the activations that are encoded."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what is decoded; equal to `d_in` unless this is a transcoder between widths."""
        return self.W_dec.shape[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether the target is another activation than the input."""
        return self.site_in != self.site_out

    def pre(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        r"""Pre-activations: $f$ equals them where a latent is on. For a gated SAE those of the magnitude. Raises
        `ValueError` if the last axis is not d_in."""
        h = self._project(x)
        return h + along(self.b_enc, h) if self.b_mag is None else self._magnitude(h)

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        """Features of the pre-activations that `pre` returns."""
        return top_k(pre, self.k) if self.architecture == "topk" else jumprelu(pre, self._magnitude_threshold())

    def encode(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_sae"]:
        """Features of activations, at least 0. Raises `ValueError` if the last axis is not d_in."""
        h = self._project(x)
        if self.architecture == "gated":
            return jnp.where(h + along(self.b_enc, h) > 0, jax.nn.relu(self._magnitude(h)), 0)
        return self.activate(h + along(self.b_enc, h))

    def decode(
        self, f: Float[Array, "*batch d_sae"], x: Float[Array, "*batch d_in"] | None = None
    ) -> Float[Array, "*batch d_out"]:
        """Reconstruction, in units of `site_out`. The skip matrix of a transcoder that has one acts on `x`, the encoded
        input. Raises `ValueError` if the last axis is not d_sae, or if `x` is needed and missing."""
        if f.shape[-1] != self.d_sae:
            raise ValueError(f"decode takes features of d_sae = {self.d_sae}, got shape {f.shape}: of another SAE?")
        x_hat = f.astype(self.W_dec.dtype) @ self.W_dec
        x_hat = x_hat + along(self.b_dec, x_hat)
        if self.W_skip is None:
            return x_hat
        if x is None:
            raise ValueError(f"the transcoder at {self.site_in} has a skip matrix, which needs x: call decode(f, x)")
        return x_hat + x.astype(self.W_skip.dtype) @ self.W_skip

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Reconstruction of activations: `decode(encode(x), x)`."""
        return self.decode(self.encode(x), x)

    def take(self, latents: Int[Array, " k"]) -> "SAE":
        """The SAE with the named latents only, which it encodes as the whole does; not for topk, whose latents compete.
        The decoder's bias stays, so that what `decode` gives is not a part of the whole's reconstruction."""
        if self.architecture == "topk":
            raise ValueError(f"latents of the topk SAE at {self.site_in} compete: some alone do not fire as all do")
        parts = {"W_enc": self.W_enc[:, latents], "W_dec": self.W_dec[latents]}
        vectors = ("b_enc", "threshold", "r_mag", "b_mag")
        parts |= {name: getattr(self, name)[latents] for name in vectors if getattr(self, name) is not None}
        return dataclasses.replace(self, **parts)

    def fold(self) -> "SAE":
        r"""The same function as a jumprelu SAE, a skip matrix kept beside it.

        For a gated SAE $W'_{enc} = W_{enc} e^{r}$, $b'_{enc} = b_{mag}$ and $\theta = \max(0, b_{mag} - b_{enc}
        e^{r})$: the gate $h > -b_{enc}$ becomes a threshold on the magnitude's pre-activation. Exact but for rounding.
        A batchtopk SAE has its threshold.

        Raises `ValueError` for a topk SAE: whether a latent is on depends on the others, which no threshold does.
        """
        if self.architecture == "topk":
            why = f"its latents compete for {self.k} places, and cleaning, ablation and links need independent ones"
            raise ValueError(f"the topk SAE at {self.site_in} has no jumprelu form: {why}")
        parts: dict[str, Any] = {"r_mag": None, "b_mag": None, "threshold": self._magnitude_threshold()}
        if self.architecture == "gated":
            parts |= {"W_enc": self.W_enc * jnp.exp(self.r_mag)[None, :], "b_enc": self.b_mag}
        return dataclasses.replace(self, architecture="jumprelu", **parts)

    def _project(self, x):
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            takes = f"this SAE takes activations of last axis d_in = {self.d_in} at {self.site_in}, got shape {x.shape}"
            raise ValueError(f"{takes}: was x taken from another site or model?")
        return x.astype(self.W_enc.dtype) @ self.W_enc

    def _magnitude(self, h):
        return h * along(jnp.exp(self.r_mag), h) + along(self.b_mag, h)

    def _magnitude_threshold(self) -> Float[Array, " d_sae"]:
        if self.architecture == "gated":
            return jnp.maximum(self.b_mag - self.b_enc * jnp.exp(self.r_mag), 0)
        return jnp.zeros_like(self.b_enc) if self.threshold is None else self.threshold
