"""SAEs that `save_sae` wrote, opened by sae-lens 6.54: `written/`, each with what sae-lens computes in `expected.npz`.

Two steps, since sae-lens and JAX need not be installed together:

    python tests/golden/open_with_sae_lens.py write     # where icl_lib is installed: every form and kind of site
    python tests/golden/open_with_sae_lens.py check     # where sae-lens is installed: its numbers, how far ours are

test_golden.py holds what our SAEs compute to these numbers, and what `save_sae` writes to these files.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "written"
D, F, TOKENS = 8, 24, 12


def write() -> None:
    import jax
    import jax.numpy as jnp

    from icl_lib.models import Site
    from icl_lib.saes import SAE, save_sae

    residual, z, transcoder = (Site("resid_pre", 3),) * 2, (Site("z", 3),) * 2, (Site("mlp_in", 3), Site("mlp_out", 3))
    cases = [(name, residual, False) for name in ("standard", "gated", "jumprelu", "topk", "batchtopk")] + [
        ("gated", z, False)
    ]
    cases += [(name, transcoder, False) for name in ("standard", "gated", "jumprelu", "batchtopk")]
    cases += [(name, transcoder, True) for name in ("standard", "gated")]
    for i, (architecture, (site_in, site_out), skip) in enumerate(cases):
        keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(0), i), 12))
        normal = lambda *shape, keys=keys: 0.4 * jax.random.normal(next(keys), shape)
        extra = {"W_skip": normal(D, D)} if skip else {}
        extra |= {"threshold": jnp.abs(normal(F))} if architecture in ("jumprelu", "batchtopk") else {}
        extra |= {"r_mag": normal(F), "b_mag": normal(F)} if architecture == "gated" else {}
        sae = SAE(
            normal(D, F), normal(F), normal(F, D), normal(D), site_in, site_out, architecture,
            k=6 if architecture == "topk" else None, metadata=(("model_name", "gemma-2b"),), **extra,
        )  # fmt: skip
        to = save_sae(sae, HERE / f"{architecture}-{site_in.name}{'-skip' if skip else ''}")
        x = normal(TOKENS, D)
        np.savez_compressed(to / "ours.npz", x=x, f=sae.encode(x), x_hat=sae(x))


def check() -> None:
    import torch
    from sae_lens import SAE

    for path in sorted(p for p in HERE.iterdir() if p.is_dir()):
        sae, ours = SAE.load_from_disk(path), np.load(path / "ours.npz")
        x = torch.tensor(ours["x"])
        with torch.no_grad():
            heads = x.reshape(TOKENS, 2, D // 2) if "-z" in path.name else x
            f, x_hat = sae.encode(heads).numpy(), sae(heads).numpy().reshape(TOKENS, -1)
        worst = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in ((ours["f"], f), (ours["x_hat"], x_hat))]
        print(
            f"{path.name:20} as {sae.cfg.architecture():26} at {sae.cfg.metadata.hook_name:24} "
            f"f {worst[0]:.1e} x_hat {worst[1]:.1e}"
        )
        assert max(worst) < 1e-5, path
        np.savez_compressed(path / "expected.npz", x=x.numpy(), f=f, x_hat=x_hat)
        (path / "ours.npz").unlink()


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]]()
