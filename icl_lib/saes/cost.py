"""What SAEs cost: their own sizes, and the passes in which they encode, are recorded for, or stand in the model."""

import dataclasses
from collections.abc import Sequence

from icl_lib.models import ModelConfig, Site
from icl_lib.models.cost import Cost, Part, abstract_array, forward_cost, logits_bytes
from icl_lib.saes.quality import cross_entropy


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """The sizes of one SAE, and the site that it reads."""

    site: Site
    d_in: int
    d_out: int
    d_sae: int

    @property
    def kind(self) -> str:
        """What an SAE of this site is called."""
        return self.site.kind

    @property
    def bytes(self) -> int:
        """In float32, the form in which SAEs are computed with."""
        return 4 * (self.d_sae * (self.d_in + self.d_out + 3) + self.d_out)

    @property
    def encode_flops(self) -> int:
        """Of one token's latents."""
        return 2 * self.d_sae * self.d_in

    @property
    def decode_flops(self) -> int:
        """Of one token's reconstruction, and of the gradient by its latents."""
        return 2 * self.d_sae * self.d_out

    @property
    def flops(self) -> int:
        """Of encoding and decoding one token."""
        return self.encode_flops + self.decode_flops


def latents_bytes(seq: int, saes: Sequence[Dictionary], copies: int = 2) -> int:
    """Bytes of `copies` of one row's latents, of the widest SAE: one is at work at a time."""
    return copies * 4 * seq * max((d.d_sae for d in saes), default=0)


def recording_cost(
    config: ModelConfig, batch: int, seq: int, part: Part, sites: int = 0, encoders: Sequence[Dictionary] = ()
) -> Cost:
    """A pass without logits that keeps `sites` residuals, some of which `encoders` encode (`harvest`, ...)."""
    return forward_cost(
        config, batch, seq, part, logits=False,
        other_flops=sum(d.encode_flops for d in encoders),
        other_row=sites * seq * config.d_model * part.size + latents_bytes(seq, encoders),
    )  # fmt: skip


def encoding_cost(rows: int, seq: int, sae: Dictionary) -> Cost:
    """One SAE alone encodes the recorded activations of all rows at once."""
    return Cost(
        rows, seq, 0, 0, 0, other_flops=rows * seq * sae.encode_flops, other_row=4 * seq * (sae.d_in + sae.d_sae)
    )


def quality_cost(config: ModelConfig, batch: int, seq: int, part: Part, saes: Sequence[Dictionary]) -> Cost:
    """One batch of `quality_table`: a clean pass and three with each SAE's target replaced; each SAE runs twice."""

    def program(model):
        run = lambda model, tokens, mask: cross_entropy(model(tokens), tokens, mask)
        return run, abstract_array((batch, seq)), abstract_array((batch, seq), bool)

    kept, flops = logits_bytes(config, seq, part), 2 * sum(d.flops for d in saes)
    cost = forward_cost(config, batch, seq, part, program=program, other_flops=flops, other_row=kept)
    return dataclasses.replace(cost, passes=1 + 3 * len(saes))
