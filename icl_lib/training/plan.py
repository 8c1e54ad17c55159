"""What is trained together: the SAEs, how, and over which devices."""

import dataclasses
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from icl_lib.models import Site
from icl_lib.models.sites import as_site
from icl_lib.saes.activations import needed_sites, output_site
from icl_lib.training.recipes import Recipe, TrainingError

AXIS = "sae"  # of the mesh


@dataclasses.dataclass(frozen=True, order=True)
class Member:
    r"""One SAE of a suite. `sparsity` is $\lambda$, or $k$ for topk and batchtopk."""

    site: Site | str
    d_sae: int
    sparsity: float | int

    def __post_init__(self):
        object.__setattr__(self, "site", as_site(self.site))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained and how; plain and hashable, because it is static under `jit`.

    SAEs of one shape are stacked: `vmap` steps them together on accelerators; on a CPU they take turns (`lax.map`)
    inside the one compiled program, since a stack's (tokens, latents) arrays would leave the cache, and shapes are
    compiled one by one.

    `widths` gives the last axis of every site in `sites`, as a mapping or pairs. With a `mesh` that has an axis "sae",
    the SAEs of equal shape are divided over it (`shard="sae"`), or the latents of each ("latent"). Raises
    `TrainingError` if there are no members, two are equal, a width is missing, a number of latents cannot be, or the
    recipe has a skip matrix where a member is no transcoder.
    """

    members: Sequence[Member]
    recipe: Recipe
    widths: Mapping[Site, int] | tuple[tuple[Site, int], ...]
    mesh: Mesh | None = None
    shard: str = "sae"

    def __post_init__(self):
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "widths", tuple(sorted(dict(self.widths).items())))
        if not self.members or len(set(self.members)) != len(self.members):
            got = [str(m.site) for m in self.members]
            raise TrainingError(f"sites must be different and at least one (or their d_sae or sparsity), got {got}")
        if missing := [str(s) for s in self.sites if s not in dict(self.widths)]:
            raise TrainingError(f"no activations for {', '.join(missing)}: harvest needed_sites(sites)")
        for m in self.members:
            whole = not self.recipe.top or float(m.sparsity).is_integer() and 1 <= m.sparsity <= m.d_sae
            if m.d_sae < 1 or not m.sparsity >= 0 or not whole:
                wanted = f"a whole k from 1 to d_sae = {m.d_sae}" if self.recipe.top else "0 or more"
                name = self.recipe.objective
                raise TrainingError(f"sparsity of a {name} SAE must be {wanted}, got {m.sparsity} at {m.site}")
        if self.recipe.skip and (plain := [str(m.site) for m in self.members if output_site(m.site) == m.site]):
            raise TrainingError(f"skip is for transcoders: with it the SAE at {', '.join(plain)} would copy its input")
        self._check_mesh()

    def _check_mesh(self):
        if self.shard not in ("sae", "latent"):
            raise TrainingError(f"shard must be 'sae' or 'latent', got {self.shard!r}")
        if self.mesh is None:
            return
        if AXIS not in self.mesh.shape:
            raise TrainingError(f"the mesh needs an axis {AXIS!r}, it has {', '.join(self.mesh.shape)}")
        n = self.mesh.shape[AXIS]
        for group in self.groups:
            by_sae = self.shard == "sae"
            size, what = (len(group), "SAEs of one shape") if by_sae else (self.members[group[0]].d_sae, "latents")
            if size % n:
                raise TrainingError(f"the mesh divides {what} by {n}, no divisor of {size}: take another mesh or shard")

    @property
    def sites(self) -> list[Site]:
        """Sites that a buffer must have: inputs and targets, each once."""
        return needed_sites(m.site for m in self.members)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Members of equal input, output and dictionary width, by their position; these are stacked."""
        width, groups = dict(self.widths), {}
        for i, m in enumerate(self.members):
            groups.setdefault((width[m.site], width[output_site(m.site)], m.d_sae), []).append(i)
        return [tuple(g) for g in groups.values()]
