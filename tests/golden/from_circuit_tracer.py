"""A golden file of the per-layer transcoders that circuit-tracer reads, with a skip matrix: `layer_4.safetensors`.

circuit-tracer is no package to install; its formulas (`SingleLayerTranscoder.encode`, `decode` and `compute_skip`) are
written out here for one token at a time. There, W_enc and W_dec are (d_sae, d_model) and W_skip is (output, input).
W_skip is far from symmetric and as large as the rest, so that its transpose gives other numbers, not another shape. Run
anywhere: `python tests/golden/from_circuit_tracer.py`.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "circuit_tracer" / "skip-transcoders"
D, F, TOKENS = 8, 24, 12


def transcode(w: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (F,) and output (D,) of one token."""
    f = torch.stack([torch.relu(torch.dot(w["W_enc"][i], x) + w["b_enc"][i]) for i in range(F)])
    out = w["b_dec"].clone()
    for i in range(F):
        out += f[i] * w["W_dec"][i]
    for o in range(D):
        out[o] += sum(w["W_skip"][o, i] * x[i] for i in range(D))
    return f, out


def main() -> None:
    torch.manual_seed(0)
    weights = {"W_enc": 0.4 * torch.randn(F, D), "b_enc": 0.5 * torch.randn(F), "W_dec": 0.4 * torch.randn(F, D)}
    weights |= {"b_dec": 0.5 * torch.randn(D), "W_skip": torch.randn(D, D)}
    HERE.mkdir(parents=True, exist_ok=True)
    save_file(weights, HERE / "layer_4.safetensors")
    (HERE / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    )
    x = torch.randn(TOKENS, D)
    f, x_hat = (torch.stack(rows).numpy() for rows in zip(*(transcode(weights, token) for token in x), strict=True))
    np.savez_compressed(HERE / "expected.npz", x=x.numpy(), f=f, x_hat=x_hat)


if __name__ == "__main__":
    main()
