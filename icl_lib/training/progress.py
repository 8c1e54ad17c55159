"""What a training job says while it runs: one line every few seconds, a bar in a terminal, and the curves that notebooks plot."""

import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from tqdm import tqdm

from icl_lib.training.plan import Member
from icl_lib.training.steps import Means


@dataclasses.dataclass(frozen=True)
class JobProgress:
    """Where a job stands. `l0` and `fvu` (means over the last pass) and `dead` (fraction of latents) hold one value a member."""

    step: int
    n_steps: int
    tokens_per_second: float
    seconds_left: float
    l0: tuple[float, ...]
    fvu: tuple[float, ...]
    dead: tuple[float, ...]

    def __str__(self) -> str:
        left = datetime.timedelta(seconds=round(self.seconds_left)) if math.isfinite(self.seconds_left) else "?"
        return (
            f"step {self.step} / {self.n_steps}  {self.tokens_per_second:.0f} tokens/s  ETA {left}  "
            f"L0 {_span(self.l0, 1)}  FVU {_span(self.fvu, 3)}  dead {_span(self.dead, 3)}"
        )


def _span(values: Sequence[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{low:.{digits}f}" if low == high else f"{low:.{digits}f} to {high:.{digits}f}"


class Reporter:
    """Calls `log` with a `JobProgress` when `every` seconds have passed since the last, and at the end.

    In a terminal there is a bar instead, on stderr. Speed and time left are those since this process began, the first
    report apart, which holds the compilation.
    """

    def __init__(
        self, step: int, n_steps: int, tokens_per_step: int, log: Callable[[JobProgress], None] | None, every: float
    ):
        self.n_steps, self.tokens_per_step, self._log, self._every = n_steps, tokens_per_step, log, every
        self._last = time.perf_counter()
        self._mark = (step, self._last)  # since when speed is measured
        self._warm = False
        terminal = log is print and sys.stderr.isatty()
        self._bar = tqdm(total=n_steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def due(self, step: int) -> bool:
        """Whether it is time to say something; the caller then reads the statistics, which waits for the device."""
        return self._log is not None and (step >= self.n_steps or time.perf_counter() - self._last >= self._every)

    def report(self, step: int, means: Means) -> None:
        """Say where the job stands."""
        now = time.perf_counter()
        steps_per_second = (step - self._mark[0]) / max(now - self._mark[1], 1e-9)
        left = (self.n_steps - step) / steps_per_second if steps_per_second else math.inf
        values = [tuple(map(float, np.asarray(v))) for v in (means.l0, means.fvu, means.dead)]
        progress = JobProgress(step, self.n_steps, steps_per_second * self.tokens_per_step, left, *values)
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
    """L0, FVU and dead fraction of every member at about 200 steps of a run: part of the checkpoint, so that none is lost or doubled."""

    def __init__(self, members: Sequence[Member], n_steps: int):
        self.members, self._every = members, max(1, n_steps // 200)
        self.points: list[list] = []  # [step, l0 of every member, fvu, dead]

    def due(self, before: int, after: int) -> bool:
        """Whether a point lies in this pass."""
        return before // self._every != after // self._every

    def add(self, step: int, means: Means) -> None:
        self.points.append(
            [step, *([round(float(v), 6) for v in np.asarray(x)] for x in (means.l0, means.fvu, means.dead))]
        )

    def table(self) -> pd.DataFrame:
        """One row for each step and member: step, site, d_sae, sparsity, l0, fvu, dead."""
        rows = [
            {
                "step": step,
                "site": str(m.site),
                "d_sae": m.d_sae,
                "sparsity": m.sparsity,
                "l0": l0,
                "fvu": fvu,
                "dead": dead,
            }
            for step, *values in self.points
            for m, l0, fvu, dead in zip(self.members, *values, strict=True)
        ]
        return pd.DataFrame(rows, columns=["step", "site", "d_sae", "sparsity", "l0", "fvu", "dead"])
