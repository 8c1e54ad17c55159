"""How an SAE is trained, as plain data: the published recipes by name, and what may be changed in them."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

OBJECTIVES = ("icl-sfc", "standard", "gated", "jumprelu", "topk", "batchtopk")


class TrainingError(ValueError):
    """Training cannot start, or met a loss that is not finite."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    r"""How to train; hashable, because it is static under `jit`. Counts are in optimiser steps.

    `make_recipe` gives the published settings of each objective. `learning_rate` rises over `warmup`, then falls along a
    cosine to a tenth (`decay="cosine"`) or stays and falls to 0 over the last fifth ("linear"); `sparsity` rises over
    `sparsity_warmup`. Gradients are clipped to norm `clip` SAE by SAE (0: not).

    Inputs and targets are scaled to a mean norm of $\sqrt d$: by a running mean of decay `norm_decay`, or by that of the
    first buffer if it is 1. A latent is dead when it has not fired for `dead_after`. Dead ones are revived by ghost gradients (icl-sfc),
    by the auxiliary loss of `k_aux` of them with weight `aux` (topk, batchtopk), or every `resample_every` (0: never).
    `unit_norm` holds decoder rows at norm 1. `bandwidth` and `threshold` (start) are jumprelu's for inputs of mean norm 1.
    `skip` adds a linear map from input to output, for transcoders. `dtype` is that of the two matrices; sums are float32.

    Raises `TrainingError` on a value that cannot be.
    """

    objective: str
    n_steps: int
    batch_size: int
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    warmup: int = 1000
    decay: str = "linear"
    sparsity_warmup: int = 0
    clip: float = 1.0
    norm_decay: float = 1.0
    dead_after: int = 1000
    resample_every: int = 0
    unit_norm: bool = False
    k_aux: int = 0
    aux: float = 1 / 32
    bandwidth: float = 0.001
    threshold: float = 0.001
    skip: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        for name, known in (("objective", OBJECTIVES), ("decay", ("cosine", "linear")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise TrainingError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("n_steps", "batch_size", "learning_rate", "dead_after", "bandwidth", "threshold"):
            if getattr(self, name) <= 0:
                raise TrainingError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup", "sparsity_warmup", "clip", "resample_every", "k_aux", "aux"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name, high in (("beta1", 1), ("beta2", 1), ("norm_decay", 1 + 1e-9)):
            if not 0 <= getattr(self, name) < high:
                raise TrainingError(f"{name} must be from 0 to 1, got {getattr(self, name)}")

    @property
    def top(self) -> bool:
        """Whether sparsity is a number of latents, k."""
        return self.objective in ("topk", "batchtopk")

    def rate(self, step: Array) -> Array:
        """Learning rate at a step, from 0."""
        done = (step + 1).astype(jnp.float32)
        rise = jnp.minimum(1.0, done / max(1, min(self.warmup, self.n_steps // 4)))
        if self.decay == "cosine":
            return self.learning_rate * rise * (0.55 + 0.45 * jnp.cos(jnp.pi * done / self.n_steps))
        return self.learning_rate * rise * jnp.clip((self.n_steps - done + 1) / max(1, self.n_steps // 5), 0, 1)

    def ramp(self, step: Array) -> Array:
        """The part of the sparsity penalty that acts at a step."""
        return jnp.minimum(1.0, (step + 1) / max(1, self.sparsity_warmup))


# What the papers state; where they give none (warm-up of L1, learning rate by width) the value of their released trainers.
_PUBLISHED = {
    # Kharlapenko et al. (2025), App. B, and their trainer
    "icl-sfc": dict(learning_rate=1e-3, beta1=0.0, beta2=0.99, warmup=128, decay="cosine", norm_decay=0.99, dead_after=2000),
    # Conerly et al., Transformer Circuits update of April 2024
    "standard": dict(learning_rate=5e-5, beta1=0.9, beta2=0.999),
    # Rajamanoharan et al. (2024), "Gated SAEs", App. D: unit decoder rows, resampled dead latents
    "gated": dict(learning_rate=3e-4, beta1=0.0, beta2=0.999, unit_norm=True, resample_every=25_000, dead_after=10_000),
    # Rajamanoharan et al. (2024), "Jumping Ahead", App. D
    "jumprelu": dict(learning_rate=7e-5, beta1=0.0, beta2=0.999, unit_norm=True, sparsity_warmup=10_000),
    # Gao et al. (2024), App. A and B
    "topk": dict(learning_rate=1e-4, beta1=0.9, beta2=0.999, unit_norm=True, k_aux=512),
    # Bussmann et al. (2024)
    "batchtopk": dict(learning_rate=3e-4, beta1=0.9, beta2=0.99, unit_norm=True, k_aux=512),
}


def make_recipe(name: str, *, n_steps: int, batch_size: int, **changes) -> Recipe:
    """The recipe published under the name of its objective, for a run of `n_steps`, with `changes` to its fields.

    Raises `TrainingError` on an unknown name or field.
    """
    if name not in _PUBLISHED:
        raise TrainingError(f"recipe must be one of {', '.join(_PUBLISHED)}, got {name!r}")
    known = {f.name for f in dataclasses.fields(Recipe)} - {"objective", "n_steps", "batch_size"}
    if unknown := sorted(set(changes) - known):
        raise TrainingError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return Recipe(**({"objective": name, "n_steps": n_steps, "batch_size": batch_size} | _PUBLISHED[name] | changes))
