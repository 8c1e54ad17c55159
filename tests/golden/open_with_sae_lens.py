"""Open SAEs that `save_sae` wrote with sae-lens itself and compare what it computes with what we did.

Two steps, since sae-lens and JAX need not be installed together:

    python tests/golden/open_with_sae_lens.py write FOLDER     # where icl_lib is installed: every architecture that we write
    python tests/golden/open_with_sae_lens.py check FOLDER     # where sae-lens is installed: prints the differences
"""

import sys
from pathlib import Path

import numpy as np


def write(folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    from icl_lib.models import Site
    from icl_lib.saes import SAE, save_sae

    d, f, key = 16, 64, jax.random.key(0)
    residual, z, transcoder = (Site("resid_pre", 3),) * 2, (Site("z", 3),) * 2, (Site("mlp_in", 3), Site("mlp_out", 3))
    cases = [(name, sites) for name in ("standard", "gated", "jumprelu", "topk", "batchtopk") for sites in (residual, z)]
    cases += [(name, transcoder) for name in ("standard", "gated", "jumprelu", "batchtopk")]
    for i, (architecture, (site_in, site_out)) in enumerate(cases * 2):
        keys = iter(jax.random.split(jax.random.fold_in(key, i), 12))
        normal = lambda *shape, keys=keys: 0.4 * jax.random.normal(next(keys), shape)
        is_transcoder, skip = site_in != site_out, i >= len(cases)
        if skip and not is_transcoder:
            continue
        extra = {"W_skip": normal(d, d)} if skip else {}
        extra |= {"threshold": jnp.abs(normal(f))} if architecture in ("jumprelu", "batchtopk") else {}
        extra |= {"r_mag": normal(f), "b_mag": normal(f)} if architecture == "gated" else {}
        sae = SAE(
            normal(d, f), normal(f), normal(f, d), normal(d), site_in, site_out, architecture,
            k=8 if architecture == "topk" else None, metadata=(("model_name", "gemma-2b"),), **extra,
        )  # fmt: skip
        to = save_sae(sae, folder / f"{architecture}-{site_in.name}{'-skip' if skip else ''}")
        x = normal(20, d)
        np.savez(to / "ours.npz", x=x, f=sae.encode(x), x_hat=sae(x))


def check(folder: Path) -> None:
    import torch
    from sae_lens import SAE

    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        sae, ours = SAE.load_from_disk(path), np.load(path / "ours.npz")
        x = torch.tensor(ours["x"]).reshape(20, 2, 8) if "-z" in path.name else torch.tensor(ours["x"])
        with torch.no_grad():
            f, x_hat = sae.encode(x).numpy(), sae(x).numpy().reshape(20, -1)
        worst = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in ((ours["f"], f), (ours["x_hat"], x_hat))]
        print(
            f"{path.name:26} as {sae.cfg.architecture():26} at {sae.cfg.metadata.hook_name:24} features {worst[0]:.1e} x_hat {worst[1]:.1e}"
        )
        assert max(worst) < 1e-5, path


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
