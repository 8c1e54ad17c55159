"""Golden files in saex' format. saex cannot be installed any more (it pins a JAX of 2024), so its formulas are written
out here.

Trained form: `encode` and `forward` of neverix/saex, saex/sae.py. Form of the ICL-SFC experiments: `sae_encode_gated`
in neverix/micrlhf-progress, micrlhf/utils/load_sae.py. Numpy in float64: `python tests/golden/from_saex.py`.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "nev"
D, F, TOKENS = 8, 24, 12


def save(
    name: str, rng: np.random.Generator, mean_norm: float | None, tgt_mean_norm: float | None, gated: bool = True
) -> None:
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    draw = lambda scale, *shape: (scale * rng.standard_normal(shape)).astype(np.float32)
    w = {"W_enc": draw(0.4, D, F), "b_enc": draw(0.5, F), "W_dec": draw(0.4, F, D), "b_dec": draw(0.5, D)}
    w["scaling_factor"] = np.exp(draw(0.2, F))
    w |= {"s_gate": draw(0.7, F), "b_gate": draw(0.5, F)} if gated else {}
    w |= {} if mean_norm is None else {"mean_norm": np.float32(mean_norm)}
    w |= {} if tgt_mean_norm is None else {"tgt_mean_norm": np.float32(tgt_mean_norm)}
    save_file({key: np.asarray(value) for key, value in w.items()}, folder / "sae_weights.safetensors")
    cfg = {"d_in": D, "dtype": "bfloat16", "expansion_factor": F // D, "l1_coefficient": 2e-5, "train_batch_size": 2048}
    cfg |= {"dead_feature_window": 2000, "use_ghost_grads": True, "d_sae": F}
    (folder / "cfg.json").write_text(json.dumps(cfg) + "\n")

    w = {key: np.asarray(value, np.float64) for key, value in w.items()}
    x = draw(3.0, TOKENS, D)
    normed = mean_norm not in (None, 1.0)
    n = np.sqrt(D) / mean_norm if normed else 1.0
    out = np.sqrt(D) / (mean_norm if tgt_mean_norm is None else tgt_mean_norm) if normed else 1.0
    h = n * x.astype(np.float64) @ w["W_enc"]
    relu = lambda value: np.maximum(value, 0)
    result = {"x": x}
    if gated:
        s = np.log1p(np.exp(w["s_gate"])) * w["scaling_factor"]
        f = (h + w["b_enc"] > 0) * relu(h * s + w["b_gate"])
        paper = relu((h + w["b_enc"]) * s)
        result["f_paper"] = paper * (paper > relu(w["b_gate"] - w["b_enc"] * s))
        result["x_hat_paper"] = (result["f_paper"] @ w["W_dec"] + w["b_dec"]) / out
    else:
        f = relu(h + w["b_enc"]) * w["scaling_factor"]
    result |= {"f": f, "x_hat": (f @ w["W_dec"] + w["b_dec"]) / out}
    np.savez_compressed(
        folder / "expected.npz", **{key: np.asarray(value, np.float32) for key, value in result.items()}
    )


def main() -> None:
    rng = np.random.default_rng(0)
    save("gemma-2b-saex-test/it-l12-residual-test-run-1-2.00E-05", rng, 11.5, 1.0)
    save("gemma-2b-saex-test/it-l12-attn_out-test-run-1-2.00E-05", rng, 4.5, 1.0)
    save("gemma-2b-saex-test/it-l12-transcoder-test-run-1-8.00E-06", rng, 7.0, 2.5)
    save("gemma-2b-saex-test/it-l12-residual-test-run-0-3.00E-05", rng, 11.5, None)
    save("gemma-2b-saex-test/l12-test-run-5-3.00E-05", rng, None, None, gated=False)
    save("phi-3-4k-saex-test/l16-test-run-3-4e-05", rng, 1.0, 1.0)
    save("gemma2-2b-saex-test/it-l16-residual-test-run-1-2.00E-05", np.random.default_rng(1), 90.0, 1.0)


if __name__ == "__main__":
    main()
