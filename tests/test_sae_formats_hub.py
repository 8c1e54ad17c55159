"""SAEs and suites by their names on the hub: what is asked for, at which revision, and what is said when it is not
there.
"""

import shutil

import pytest

from icl_lib.models import Site, tiny_config
from icl_lib.saes import load_sae, load_suite, save_sae, save_suite
from icl_lib.saes.formats import gemma_scope, layer_files
from tests.test_sae_formats import make, transcoder


def play_hub(monkeypatch, repo):
    """Makes `repo` every repository of the hub. Returns a list that fills with what is asked: repository, revision,
    files.
    """
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    calls = []

    def snapshot(name, revision=None, allow_patterns=None):
        everything = sorted(path.relative_to(repo).as_posix() for path in repo.rglob("*") if path.is_file())
        calls.append((name, revision, list(filter_repo_objects(everything, allow_patterns=allow_patterns))))
        return str(repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return calls


def test_from_the_hub(getkey, tmp_path, monkeypatch):
    """Only the files of that SAE are asked for, at the revision given; a missing one is named."""
    repo = tmp_path / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "abc"
    for l0 in (71, 139):
        gemma_scope.write(make(getkey, "jumprelu"), repo / f"layer_20/width_16k/average_l0_{l0}")
    calls = play_hub(monkeypatch, repo)
    sae = load_sae("google/gemma-scope-2b-pt-res/layer_20/width_16k/canonical", revision="abc")
    assert sae.site_in == Site("resid_post", 20)
    assert calls == [("google/gemma-scope-2b-pt-res", "abc", ["layer_20/width_16k/average_l0_71/params.npz"])]
    for name in (
        "gemma-scope-2b-pt-res-canonical",
        "gemma-scope-2b-pt-res",
        "google/gemma-scope-2b-pt-res-canonical",
    ):  # as SAELens has it
        assert load_sae(f"{name}/layer_20/width_16k/canonical").site_in == Site("resid_post", 20)
        assert calls.pop()[0] == "google/gemma-scope-2b-pt-res"
    with pytest.raises(
        FileNotFoundError,
        match="has no layer_20/width_16k/average_l0_23: .*tree/main .*average_l0 22, 38, 71, 139, 294",
    ):
        load_sae("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_23")


def test_settings_come_with_a_lone_file(getkey, tmp_path, monkeypatch):
    """A layer file or an npz without its settings would be read as something else."""
    layer_files.write(transcoder(getkey, architecture="standard"), tmp_path / "set")
    (tmp_path / "set/config.yaml").write_text("activation: topk\nk: 2\n")
    calls = play_hub(monkeypatch, tmp_path)
    assert load_sae("owner/repo/set/layer_1.safetensors").k == 2
    assert load_suite("owner/repo/set", tiny_config())[Site("mlp_in", 1)].k == 2
    wanted = ["set/config.yaml", "set/layer_1.safetensors"]
    assert calls == [("owner/repo", None, wanted)] * 2


def test_suite_from_the_hub(getkey, tmp_path, monkeypatch):
    """All SAE files at and below a name, and no others, at the revision given."""
    saes = [make(getkey), make(getkey, site_in=Site("attn_out", 0))]
    save_suite({s.site_in: s for s in saes}, tmp_path / "suites/small")
    layer_files.write(transcoder(getkey, architecture="standard"), tmp_path / "suites/small")
    save_sae(make(getkey), tmp_path / "suites/other")
    (tmp_path / "suites/small/attn_out.0/optimizer.pt").write_bytes(b"")
    (tmp_path / "suites/small/layer_1.safetensors.bak").write_bytes(b"")
    wanted = [
        f"{site}/{file}" for site in ("attn_out.0", "resid_pre.1") for file in ("cfg.json", "sae_weights.safetensors")
    ]
    wanted = [f"suites/small/{name}" for name in [*wanted[:2], "layer_1.safetensors", *wanted[2:]]]
    calls, sites = play_hub(monkeypatch, tmp_path), [Site("attn_out", 0), Site("mlp_in", 1), Site("resid_pre", 1)]
    assert list(load_suite("owner/repo/suites/small", tiny_config(), revision="abc")) == sites
    assert calls == [("owner/repo", "abc", wanted)]
    with pytest.raises(
        ValueError,
        match="suites/small/resid_pre.1 encodes blocks.1.hook_resid_pre, and so does another SAE of owner/repo",
    ):
        load_suite("owner/repo")
    shutil.rmtree(tmp_path / "suites/other")
    assert list(load_suite("owner/repo", layers=[0])) == sites[:1]
    assert (
        list(load_suite("owner/repo/suites/small/resid_pre.1"))
        == list(load_suite("owner/repo/suites/small/resid_pre.*"))
        == sites[2:]
    )
    assert list(load_suite("owner/repo/suites/small/layer_1.safetensors")) == sites[1:2]
    absent = (
        "no folder 'owner/repo/none' here, and the repository owner/repo has no none at v2: .*tree/v2 shows what it has"
    )
    with pytest.raises(FileNotFoundError, match=absent):
        load_suite("owner/repo/none", revision="v2")


def test_what_is_no_suite(tmp_path, monkeypatch):
    """Both possibilities are named; Gemma Scope is never downloaded as a whole."""
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for name in (
        "saes",
        "./runs/saes",
        str(tmp_path / "saes"),
        "assets/icl-tiny/no/saes",
    ):  # of the last, a part is here
        message = f"no folder '{name}' here, where .* pass a suite: a folder of SAEs, owner/repository/path on the hub"
        with pytest.raises(FileNotFoundError, match=message):
            load_suite(name)
        with pytest.raises(FileNotFoundError, match=f"no folder '{name}' here, where .* pass a folder with an SAE"):
            load_sae(name)
    with pytest.raises(FileNotFoundError, match="no folder 'assets/icl-tiny/saez' here, .*did you mean 'saes'"):
        load_suite("assets/icl-tiny/saez")
    with pytest.raises(FileNotFoundError, match="no folder 'icl-tinny' here, .*did you mean 'icl-tiny'"):
        load_suite("icl-tinny")
    with pytest.raises(FileNotFoundError, match="no folder 'assets/mine/deep' here, where .* of which there is only"):
        load_suite("assets/mine/deep")  # the hub has no such repository either
    for name in ("mine/saes", "mine/saes/deep"):
        with pytest.raises(FileNotFoundError, match=f"no folder '{name}' here.* the hub could not be reached"):
            load_suite(name)
    for name in (
        "google/gemma-scope-2b-pt-res",
        "google/gemma-scope-2b-pt-res/layer_20/width_16k",
        "gemma-scope-2b-pt-res-canonical",
    ):
        with pytest.raises(
            ValueError, match=f"no folder '{name}' here, and in Gemma Scope it holds many SAEs for each site"
        ):
            load_suite(name)
