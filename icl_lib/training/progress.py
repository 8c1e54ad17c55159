"""What training says while it runs: a line every few seconds, a bar in a terminal, and the curves of notebooks."""

import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from icl_lib.training.plan import Member, Plan
from icl_lib.training.state import Means


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where training stands, or the filling of its buffer, whose steps are passes of the language model."""

    step: int  # steps done
    n_steps: int  # of all
    tokens_per_second: float  # rows that each SAE is trained on, or that a pass gives; 0 before it is known
    seconds_left: float  # inf before a speed is known
    l0: Mapping[Member, float] = dataclasses.field(default_factory=dict)  # mean over the last pass, or chunk of steps
    fvu: Mapping[Member, float] = dataclasses.field(default_factory=dict)  # mean over the same steps
    dead: Mapping[Member, float] = dataclasses.field(default_factory=dict)  # part of the latents, now
    doing: str = "step"  # what is counted

    def __str__(self) -> str:
        left = datetime.timedelta(seconds=round(self.seconds_left)) if math.isfinite(self.seconds_left) else "?"
        text = f"{self.doing} {self.step} / {self.n_steps}  {self.tokens_per_second:.0f} tokens/s  ETA {left}"
        if self.l0:
            text += f"  L0 {_span(self.l0, 1)}  FVU {_span(self.fvu, 3)}  dead {_span(self.dead, 3)}"
        return text


def _span(values: Mapping[Member, float], digits: int) -> str:
    low, high = min(values.values()), max(values.values())
    return f"{low:.{digits}f}" if low == high else f"{low:.{digits}f} to {high:.{digits}f}"


class Reporter:
    """Calls `log` with a `Progress` when `every` seconds have passed since the last, and at the end.

    The first process alone does. In a terminal there is a bar instead, on stderr. Speed and time left are those since
    this process began, the first report apart, which holds the compilation.
    """

    def __init__(self, plan: Plan, step: int, log: Callable[[Progress], None] | None, every: float):
        self._plan, self._every = plan, every
        self._log = log if jax.process_index() == 0 else None
        self._last = time.perf_counter()
        self._mark = (step, self._last)  # since when speed is measured
        self._warm = False
        terminal = self._log is print and sys.stderr.isatty()
        n_steps = plan.recipe.n_steps
        self._bar = tqdm(total=n_steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def due(self, step: int) -> bool:
        """Whether it is time to say something; the caller then reads the statistics, which waits for the device."""
        at_end, waited = step >= self._plan.recipe.n_steps, time.perf_counter() - self._last
        return self._log is not None and (at_end or waited >= self._every)

    def report(self, step: int, means: Means) -> None:
        """Say where training stands."""
        now, n_steps = time.perf_counter(), self._plan.recipe.n_steps
        per_second = (step - self._mark[0]) / max(now - self._mark[1], 1e-9)
        left = (n_steps - step) / per_second if per_second else math.inf
        of_member = lambda values: dict(zip(self._plan.members, np.asarray(values).tolist(), strict=True))
        values = map(of_member, (means.l0, means.fvu, means.dead))
        progress = Progress(step, n_steps, per_second * self._plan.recipe.batch_size, left, *values)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(str(progress).split("  ", 1)[1])
        else:
            self._log(progress)
        self._last = now
        if not self._warm:
            self._mark, self._warm = (step, now), True

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Curves:
    """L0, FVU and dead fraction of every member at about 200 steps of a run. Checkpoints have them: none is lost."""

    def __init__(self, members: Sequence[Member], n_steps: int):
        self.members, self._every = members, max(1, n_steps // 200)
        self.points: list[list] = []  # [step, l0 of every member, fvu, dead]

    def due(self, before: int, after: int) -> bool:
        """Whether a point lies in this pass."""
        return before // self._every != after // self._every

    def add(self, step: int, means: Means) -> None:
        rounded = lambda x: [round(float(v), 6) for v in np.asarray(x)]
        self.points.append([step, *map(rounded, (means.l0, means.fvu, means.dead))])

    def table(self) -> pd.DataFrame:
        """One row for each step and member: step, site, d_sae, sparsity, l0, fvu, dead."""
        rows = [
            (step, str(m.site), m.d_sae, m.sparsity, *of_member)
            for step, *values in self.points
            for m, *of_member in zip(self.members, *values, strict=True)
        ]
        return pd.DataFrame(rows, columns=["step", "site", "d_sae", "sparsity", "l0", "fvu", "dead"])
