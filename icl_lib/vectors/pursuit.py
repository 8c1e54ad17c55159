r"""Inference-time optimisation (ITO): a sparse non-negative code of a vector over a fixed dictionary.

Gradient pursuit picks one more direction per step and moves all chosen weights along the gradient. The dictionary is
used as it is: rows are not normalised, and no bias is taken off.

Source: Blumensath and Davies (2008); Smith (2024), GDM progress update 1; used as a baseline in ICL-SFC, Sec. 3.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _step(v: Float[Array, " d"], dictionary: Float[Array, "d_sae d"], w: Float[Array, " d_sae"]):
    r"""One pursuit step for one vector. $r = v - wD,\; c = Dr,\; S = \mathrm{supp}(w) \cup \{\arg\max c\},\; g = c
    1_S,\; u = gD,\; w' = \max(w + g \langle u, r\rangle / \langle u, u\rangle, 0)$."""
    residual = v - w @ dictionary
    c = dictionary @ residual
    chosen = (w > 0).at[jnp.argmax(c)].set(True)
    g = jnp.where(chosen, c, 0.0)
    u = g @ dictionary
    # A residual of zero, or one orthogonal to the chosen rows, has no direction to move in: stay.
    norm = u @ u
    eta = jnp.where(norm > 0, u @ residual / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jnp.maximum(w + eta * g, 0.0)


@functools.partial(jax.jit, static_argnames=("k", "path"))
def _compiled(v, dictionary, k: int, path: bool):
    step = jax.vmap(_step, in_axes=(0, None, 0))

    def body(w, _):
        w = step(v, dictionary, w)
        return w, (w if path else None)

    w, steps = jax.lax.scan(body, jnp.zeros((v.shape[0], dictionary.shape[0])), length=k)
    return steps if path else w


def _pursue(v, dictionary, k: int, path: bool) -> Array:
    """Weights (*batch, d_sae), or those after each step with `path`, which is then the first axis."""
    if v.shape[-1] != dictionary.shape[-1]:
        writes = f"the dictionary writes vectors of d_model = {dictionary.shape[-1]}"
        raise ValueError(f"{writes}, but v has shape {v.shape}; was the SAE trained on another model?")
    if not 1 <= k <= dictionary.shape[0]:
        raise ValueError(f"k must be in 1..{dictionary.shape[0]} (the rows of the dictionary), got {k}")
    flat = v.astype(jnp.float32).reshape(-1, v.shape[-1])
    w = _compiled(flat, dictionary.astype(jnp.float32), k, path)
    return w.reshape(*w.shape[:-2], *v.shape[:-1], w.shape[-1])


def gradient_pursuit(
    v: Float[Array, "*batch d_model"], dictionary: Float[Array, "d_sae d_model"], k: int
) -> Float[Array, "*batch d_sae"]:
    r"""Non-negative weights of at most `k` dictionary rows with $w D \approx v$.

    `dictionary` is usually `sae.W_dec`; the reconstruction `w @ dictionary` is used without `b_dec`. float32.
    Raises `ValueError` if the widths differ or `k` is not in 1..d_sae.

    Source: Smith (2024); ICL-SFC, Sec. 3 (k = 5 and 20).
    """
    return _pursue(v, dictionary, k, path=False)


def pursuit_path(
    v: Float[Array, "*batch d_model"], dictionary: Float[Array, "d_sae d_model"], k: int
) -> Float[Array, "k *batch d_sae"]:
    """The weights after each of `k` steps of `gradient_pursuit`: row j has at most j + 1 active latents. A step does
    not depend on the number of steps to come, so one run gives a whole sweep over k."""
    return _pursue(v, dictionary, k, path=True)
