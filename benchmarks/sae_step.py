"""Tokens per second of one SAE training step on stored activations, beside sae-lens and dictionary_learning, float32,
in one run.

    pip install -e '.[bench]'
    python benchmarks/sae_step.py                                   # all objectives, three shapes
    python benchmarks/sae_step.py --shapes 2048,16384,1024 --objectives topk --peers /path/to/other/python

Libraries take turns of four steps or more, each figure is the median of `--repeats`, over rows drawn from a buffer in
memory. PyTorch's MKL takes its AVX2 path on AMD processors; "+avx512" are the same libraries with a preloaded answer to
MKL's question for the maker, which needs gcc: `avx512` says whether it was there. `ratio` is ours over the fastest of
the others. `limit_share` is what 12 x batch x d_model x d_sae operations would take at the rate of the encoder's
product, measured in the same run, over the time taken. `cpu` is the same by processor seconds, which other programs on
the machine disturb less.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import avx512, write_line

SHAPES = ("128,1024,2048", "512,8192,2048", "2048,16384,1024")
OBJECTIVES = ("standard", "jumprelu", "gated", "topk", "batchtopk")
PEERS = ("sae_lens", "dictionary_learning")


class Worker:
    """A process that holds one library's SAE and takes steps when asked."""

    def __init__(self, python: str, library: str, objective: str, shape: str, env: dict):
        command = [python, str(Path(__file__).parent / "sae_peers.py"), library, objective, shape]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )

    def ready(self) -> None:
        for line in self.process.stdout:  # libraries may talk while they start
            if line.strip() == "ready":
                return
        raise SystemExit(f"{' '.join(self.process.args)} did not start:\n{self.process.stderr.read()}")

    def steps(self, n: int) -> tuple[float, float]:
        """Wall and processor seconds of each of n steps."""
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        wall, cpu = map(float, self.process.stdout.readline().split())
        return wall / n, cpu / n

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(objective: str, shape: str, repeats: int, peers_python: str, preload: dict) -> None:
    """One line of results: all libraries on one objective and shape."""
    d, d_sae, batch = map(int, shape.split(","))
    workers = {name: Worker(sys.executable, name, objective, shape, {}) for name in ("matmul", "ours")}
    for peer in PEERS:
        workers[peer] = Worker(peers_python, peer, objective, shape, {})
        if preload:
            workers[peer + "+avx512"] = Worker(peers_python, peer, objective, shape, preload)
    for worker in workers.values():
        worker.ready()
    n = max(
        4, int(2e11 / (12 * batch * d * d_sae))
    )  # about a second a turn, or four steps: `train_suite` takes more at a time
    times: dict[str, list] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            times[name].append(worker.steps(n))
    for worker in workers.values():
        worker.close()
    line = {
        "objective": objective,
        "d_model": d,
        "d_sae": d_sae,
        "batch": batch,
        "repeats": repeats,
        "avx512": bool(preload),
    }
    for i, clock in enumerate(("", "_cpu")):
        median = {name: statistics.median(t[i] for t in each) for name, each in times.items()}
        limit = 6 * median.pop("matmul")
        fastest = min(seconds for name, seconds in median.items() if name != "ours")
        line |= {f"{name}{clock}": round(batch / seconds, 1) for name, seconds in median.items()}
        line |= {
            f"ratio{clock}": round(fastest / median["ours"], 3),
            f"limit_share{clock}": round(limit / median["ours"], 3),
        }
    write_line("sae_step", **line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default=sys.executable, help="python of the environment that has the two peers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        preload = avx512(folder)
        for shape in args.shapes:
            for objective in args.objectives:
                compare(objective, shape, args.repeats, args.peers, preload)


if __name__ == "__main__":
    main()
