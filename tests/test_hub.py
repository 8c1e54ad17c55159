"""The hub as a small server on this machine plays it: what is downloaded, and what is said when it is not."""

import hashlib
import http.server
import json
import re
import threading
from functools import partial

import huggingface_hub.constants
import jax
import pytest

from icl_lib.files.paths import root
from icl_lib.models import Transformer, fetch, load_config, load_model, load_tokenizer, save_model, tiny_config

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """`owner/open` is public and holds `folder`; `owner/gated` shows its list of files and keeps the files; the rest
    does not exist.
    """

    def __init__(self, folder, *args):
        self.folder = folder
        super().__init__(*args)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        api, parts = parts[0] == "api", parts[2:] if parts[0] == "api" else parts
        name, (kind, revision, *file) = "/".join(parts[:2]), parts[2:]
        sha = COMMITS.get(revision, revision)
        if name not in ("owner/open", "owner/gated"):
            return self.refuse(401, "RepoNotFound")
        if sha not in COMMITS.values():
            return self.refuse(404, "RevisionNotFound")
        if api and kind == "revision":
            return self.reply(json.dumps({"id": name, "sha": sha, "siblings": []}).encode())
        if api and kind == "tree":
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": self.etag(p)}
                for p in self.folder.iterdir()
            ]
            return self.reply(json.dumps(files).encode())
        if name == "owner/gated":
            return self.refuse(401, "GatedRepo")
        path = self.folder / file[0]
        return self.reply(path.read_bytes(), {"ETag": f'"{self.etag(path)}"', "X-Repo-Commit": sha})

    do_HEAD = do_GET

    def etag(self, path):
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reply(self, body, headers=None):
        self.send_response(200)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def move_hub(monkeypatch, port):
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def hub(tmp_path, monkeypatch, getkey):
    """The folder that `owner/open` serves."""
    folder = save_model(Transformer.init(tiny_config("qwen2"), key=getkey()), tmp_path / "served", dtype="float32")
    (folder / "pytorch_model.bin").write_bytes(b"not asked for")
    (folder / "icl_gate.json").write_text("{}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    move_hub(monkeypatch, server.server_port)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield folder
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_downloaded_once_and_found_again_without_a_network(hub, monkeypatch):
    model = load_model("owner/open")
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(load_model(hub)), strict=True):
        assert (ours == theirs).all()
    snapshot = fetch("owner/open")
    assert snapshot.name == COMMITS["main"] and not (snapshot / "pytorch_model.bin").exists()
    assert (snapshot / "icl_gate.json").is_file()  # the recorded logits come along
    move_hub(monkeypatch, 1)  # where nobody listens
    assert fetch("owner/open") == snapshot


def test_a_revision_is_pinned(hub):
    assert fetch("owner/open", revision="old").name == COMMITS["old"]
    assert load_config("owner/open", revision=COMMITS["old"]) == tiny_config("qwen2")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            "owner/gated",
            None,
            "is gated: accept its terms at https://huggingface.co/owner/gated, then log in with `hf auth login` or set",
        ),
        (
            "owner/none",
            None,
            "no repository of that name that it shows to us: check the spelling; if it is private, .*HF_TOKEN",
        ),
        ("owner/open", "no-such", "no revision 'no-such': see https://huggingface.co/owner/open/commits/main"),
        ("not a hub id", None, "no hub id .* either: pass the path of a folder with config.json"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, name, revision, message):
    with pytest.raises(FileNotFoundError, match=f"no folder '{name}' here, and .*{message}"):
        load_model(name, revision)


def test_a_name_that_may_be_a_path_is_a_missing_folder_where_the_hub_has_none(hub, monkeypatch):
    with pytest.raises(FileNotFoundError) as raised:
        load_model("assets/icl-tinny")
    message = (
        f"no folder 'assets/icl-tinny' here, where {root() / 'assets/icl-tinny'} would be .*did you mean 'icl-tiny'"
    )
    assert re.search(message, str(raised.value))
    move_hub(monkeypatch, 1)  # where nobody listens
    with pytest.raises(FileNotFoundError, match=r"here \(did you mean 'icl-tiny'\?\), and the hub could not be"):
        load_model("icl-tinny")


@pytest.mark.parametrize(
    "name", ["./x", "../x", "~/x", "/no/such/x", "x/y/z", "owner/open.gguf", "owner/x.safetensors"]
)
def test_a_path_is_never_asked_of_the_hub(hub, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    for read in (load_model, load_config, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=f"no folder '{name}' here, where /.* would be"):
            read(name)


def test_a_file_in_the_place_of_a_folder(hub):
    with pytest.raises(FileNotFoundError, match=f"is a file: pass a folder .* that it lies in, {hub}$"):
        load_model(hub / "model.safetensors")


def test_without_a_network_the_folder_to_pass_is_named(hub, monkeypatch):
    move_hub(monkeypatch, 1)  # where nobody listens
    message = r"could not be reached .*pass a folder with config.json, \*.safetensors and tokenizer.json; .*"
    message += "`hf download owner/open --revision old"
    with pytest.raises(FileNotFoundError, match=message):
        load_model("owner/open", revision="old")
