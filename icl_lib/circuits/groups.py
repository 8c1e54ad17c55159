"""Groups of tokens: the part of a node that says where. The effects of a latent are summed over the tokens of a group.

The roles of few-shot prompts are one way to make groups, positions another, all tokens together a third.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Groups(eqx.Module):
    """The group of every token; `index` counts in `names`, whose entry 0, "none", is of tokens that are part of no
    node.

    A stack of tasks has a leading axis on `index`, as its tokens have.
    """

    index: Int[Array, "*tasks b s"]
    names: tuple[str, ...] = eqx.field(static=True)

    @property
    def n(self) -> int:
        """The number of groups, that of the tokens without nodes included."""
        return len(self.names)

    @classmethod
    def by_role(cls, prompts: Any) -> "Groups":
        """The roles of few-shot prompts, as `prompts.groups()` gives them. Raises `ValueError` for another batch."""
        if not hasattr(prompts, "groups"):
            raise ValueError(
                f"a {type(prompts).__name__} has no roles: pass groups=Groups.by_position(batch) or "
                "Groups.all_tokens(batch)"
            )
        return cls(*prompts.groups())

    @classmethod
    def by_position(cls, batch: Any) -> "Groups":
        """Every position a group of its own, named by its number from 0; of `batch.real`, if it has that, only true
        ones.
        """
        names = tuple(map(str, range(batch.tokens.shape[-1])))
        position = jnp.broadcast_to(jnp.arange(1, len(names) + 1, dtype=jnp.int32), batch.tokens.shape)
        return cls(jnp.where(_real(batch), position, 0), ("none", *names))

    @classmethod
    def all_tokens(cls, batch: Any) -> "Groups":
        """One group, "all", of every token that counts: of `batch.real` where there is one (no BOS, no padding)."""
        return cls(_real(batch).astype(jnp.int32), ("none", "all"))

    def indicator(self) -> Float[Array, "*tasks b s n_groups"]:
        """One column per group, 1 at its tokens; the column of "none" is zero, because it has no nodes."""
        return jax.nn.one_hot(self.index, self.n, dtype=jnp.float32).at[..., 0].set(0.0)

    def numbers(self, names) -> Int[np.ndarray, " k"]:
        """The index of each named group. Raises `ValueError` on a name that none has."""
        names = [str(name) for name in names]
        if lost := sorted(set(names) - set(self.names[1:])):
            raise ValueError(f"no group is called {', '.join(lost)}; there are {', '.join(self.names[1:])}")
        return np.array([self.names.index(name) for name in names], np.int32)


def _real(batch: Any) -> Array:
    real = getattr(batch, "real", None)
    return jnp.ones(batch.tokens.shape, bool) if real is None else jnp.asarray(real)
