"""How an SAE is trained, as plain data: the published recipes by name, and what may be changed in them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

OBJECTIVES = ("icl-sfc", "standard", "gated", "jumprelu", "topk", "batchtopk")


class TrainingError(ValueError):
    """Training cannot start, or met a loss that is not finite."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    r"""How to train; hashable, because it is static under `jit`. Counts are in optimiser steps.

    `make_recipe` gives the published settings of each objective. `learning_rate` rises over `warmup`, then falls along a
    cosine that reaches a tenth after `period` (0: `n_steps`; `decay="cosine"`) or stays and falls to 0 over the last fifth ("linear");
    `sparsity` rises over `sparsity_warmup`. Gradients are clipped to norm `clip` SAE by SAE (0: not).

    Inputs and targets are scaled to a mean norm of $\sqrt d$: by a running mean of decay `norm_decay`, or by that of the
    first buffer if it is 1. A latent is dead when it has not fired for `dead_after`, or on less than `dead_rate` of the tokens by a
    running mean over as many steps. Dead ones are revived by ghost gradients (icl-sfc),
    by the auxiliary loss of `k_aux` of them with weight `aux` (topk, batchtopk), or every `resample_every` (0: never).
    `unit_norm` holds decoder rows at norm 1. `bandwidth` and `threshold` (start) are jumprelu's for inputs of mean norm 1.
    `skip` adds a linear map from input to output, for transcoders. `dtype` is that of the two matrices; sums are float32.
    `centred_start` and `loss_scale` are icl-sfc's: see icl_sfc.py.

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
    period: int = 0
    sparsity_warmup: int = 0
    clip: float = 1.0
    norm_decay: float = 1.0
    dead_after: int = 1000
    dead_rate: float = 0.0
    resample_every: int = 0
    unit_norm: bool = False
    k_aux: int = 0
    aux: float = 1 / 32
    bandwidth: float = 0.001
    threshold: float = 0.001
    skip: bool = False
    dtype: str = "float32"
    centred_start: bool = False
    loss_scale: float = 0.0

    def __post_init__(self):
        for name, known in (
            ("objective", OBJECTIVES),
            ("decay", ("cosine", "linear")),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise TrainingError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("n_steps", "batch_size", "learning_rate", "dead_after", "bandwidth", "threshold"):
            if getattr(self, name) <= 0:
                raise TrainingError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in (
            "warmup",
            "period",
            "sparsity_warmup",
            "clip",
            "resample_every",
            "k_aux",
            "aux",
            "loss_scale",
            "dead_rate",
        ):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name, high in (("beta1", 1), ("beta2", 1), ("norm_decay", 1 + 1e-9)):
            if not 0 <= getattr(self, name) < high:
                raise TrainingError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.skip and self.objective == "icl-sfc":
            raise TrainingError(
                "the objective of icl-sfc has no skip matrix: take another one for transcoders with skip"
            )
        if self.resample_every and self.top:
            raise TrainingError(
                f"resample_every is not for {self.objective}, whose auxiliary loss (k_aux, aux) revives dead latents"
            )

    @property
    def top(self) -> bool:
        """Whether sparsity is a number of latents, k."""
        return self.objective in ("topk", "batchtopk")

    def rate(self, step: Array) -> Array:
        """Learning rate at a step, from 0."""
        done = (step + 1).astype(jnp.float32)
        rise = jnp.minimum(1.0, done / max(1, min(self.warmup, self.n_steps // 4)))
        if self.decay == "cosine":
            return self.learning_rate * rise * (0.55 + 0.45 * jnp.cos(jnp.pi * done / (self.period or self.n_steps)))
        return self.learning_rate * rise * jnp.clip((self.n_steps - done + 1) / max(1, self.n_steps // 5), 0, 1)

    def ramp(self, step: Array) -> Array:
        """The part of the sparsity penalty that acts at a step."""
        return jnp.minimum(1.0, (step + 1) / max(1, self.sparsity_warmup))


# What the papers state; where they give none (learning rate by width) the value of their released trainers. A function is of the
# number of steps and of the batch.
_PUBLISHED: dict[str, dict[str, Any]] = {
    # Kharlapenko et al. (2025), App. B (learning rate, betas), and their trainer; what is left out is in icl_sfc.py
    "icl-sfc": dict(
        learning_rate=1e-3, beta1=0.0, beta2=0.99, warmup=128, decay="cosine", period=lambda steps, batch: max(100_000, 2 * steps),
        norm_decay=0.99, dead_after=2000, dead_rate=5e-6, loss_scale=100.0,
    ),
    # Conerly et al., Transformer Circuits update of April 2024: the penalty rises over the first 5 % of the steps
    "standard": dict(learning_rate=5e-5, beta1=0.9, beta2=0.999, sparsity_warmup=lambda steps, batch: steps // 20),
    # Rajamanoharan et al. (2024), "Gated SAEs", App. D: unit decoder rows, resampled dead latents. The clipping and the decay over the last
    # fifth are not in the paper; they are Conerly et al.'s
    "gated": dict(learning_rate=3e-4, beta1=0.0, beta2=0.999, unit_norm=True, resample_every=25_000, dead_after=10_000),
    # Rajamanoharan et al. (2024), "Jumping Ahead", App. D. Clipping and decay as for gated; they have neither
    "jumprelu": dict(learning_rate=7e-5, beta1=0.0, beta2=0.999, unit_norm=True, sparsity_warmup=10_000),
    # Gao et al. (2024), App. A and B: dead after 10 million tokens. They take the power of two nearest d / 2 for k_aux: 512 is d = 1,024's
    "topk": dict(
        learning_rate=1e-4, beta1=0.9, beta2=0.999, unit_norm=True, k_aux=512, dead_after=lambda steps, batch: max(1, 10_000_000 // batch)
    ),
    # Bussmann et al. (2024)
    "batchtopk": dict(learning_rate=3e-4, beta1=0.9, beta2=0.99, unit_norm=True, k_aux=512),
}  # fmt: skip
# Changes to icl-sfc that suit a run of some thousand steps: a learning rate that comes down, no latent born dead. See icl_sfc.py
SHORT_RUN = {"period": 0, "centred_start": True, "loss_scale": 0.0, "dead_rate": 0.0}


def make_recipe(name: str, *, n_steps: int, batch_size: int, **changes) -> Recipe:
    """The recipe published under the name of its objective, for a run of `n_steps`, with `changes` to its fields.

    Raises `TrainingError` on an unknown name or field.
    """
    if name not in _PUBLISHED:
        raise TrainingError(f"recipe must be one of {', '.join(_PUBLISHED)}, got {name!r}")
    known = {f.name for f in dataclasses.fields(Recipe)} - {"objective", "n_steps", "batch_size"}
    if unknown := sorted(set(changes) - known):
        raise TrainingError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    values = {"objective": name, "n_steps": n_steps, "batch_size": batch_size} | _PUBLISHED[name] | changes
    return Recipe(
        **{field: value(n_steps, batch_size) if callable(value) else value for field, value in values.items()}
    )
