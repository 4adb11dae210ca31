"""Files of the hub: from a folder or its cache, fetched once, of one commit; what a checkpoint may not have fetched."""

import json
import os
import subprocess
import sys

import pytest

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.weights.hub import WEIGHTS, hub_file, hub_folder
from neucore_plugin.weights.trust import refuse_strangers

hub = pytest.importorskip("huggingface_hub")
REPO, COMMIT = "someone/model", "a" * 40
PARTS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
INDEX = json.dumps({"weight_map": {"a": PARTS[0], "b": PARTS[1], "c": PARTS[0]}})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub whose files are `held`, an empty cache, and `asked`: (name, revision) of everything that was fetched."""

    class Server:
        def __init__(self):
            self.held = {"config.json": "{}", "model.safetensors.index.json": INDEX, "tokenizer.json": "{}"}
            self.held |= dict.fromkeys(PARTS, "weights")
            self.asked, self.online, self.cache = [], True, tmp_path / "hub"

        def fetch(self, repo, name, revision=None, **_):
            self.asked.append((name, revision))
            if not self.online:
                raise hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled")
            folder = self.cache / f"models--{repo.replace('/', '--')}"
            if name not in self.held:
                marker = folder / ".no_exist" / COMMIT / name
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                raise hub.errors.EntryNotFoundError("404")
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / "main").write_text(COMMIT)
            path = folder / "snapshots" / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.held[name])
            return str(path)

    found = Server()
    cached = hub.try_to_load_from_cache
    monkeypatch.setattr(hub, "hf_hub_download", found.fetch)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: cached(*a, cache_dir=found.cache, **k))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(found.cache))
    return found


def test_a_model_is_fetched_once_and_of_one_commit(server):
    folder = hub_folder(REPO, "model.repo", weights=True, further=("tokenizer.json", "vocab.txt"))
    fetched = {path.name for path in folder.iterdir()}
    assert fetched == set(server.held) and folder.name == COMMIT
    assert server.asked[0] == ("config.json", None) and {revision for _, revision in server.asked[1:]} == {COMMIT}
    assert [name for name, _ in server.asked].count(PARTS[0]) == 1
    server.asked.clear()
    server.online = False  # what is there, and what is known not to be there, is not asked for again
    assert hub_folder(REPO, "model.repo", weights=True, further=("tokenizer.json", "vocab.txt")) == folder
    assert server.asked == []


def test_what_cannot_be_fetched_names_everything(server):
    hub_folder(REPO, "model.repo")
    server.online = False
    with pytest.raises(CheckpointError) as caught:
        hub_folder(REPO, "model.repo", weights=True)
    text = str(caught.value)
    assert f"model.repo: cannot fetch {WEIGHTS[0]} of the repository {REPO}" in text
    assert str(server.cache / "models--someone--model") in text and f"hf download {REPO}" in text
    server.online = True
    with pytest.raises(CheckpointError, match=r"the repository someone/model of the hub has no vocab.txt"):
        hub_file(REPO, "vocab.txt", "model.repo")
    server.held = {"config.json": "{}"}
    with pytest.raises(CheckpointError, match=r"holds no weights; wanted: one of model.safetensors"):
        hub_folder("other/model", "model.repo", weights=True)


def test_a_path_that_is_not_here_is_told_as_both_and_offline_nothing_is_asked(tmp_path):
    """`a/b` may be a mistyped path or a repository; a process of its own, as the client reads the variable once."""
    code = (
        "import socket\n"
        "def refuse(*_, **__): print('ASKED')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from neucore_plugin.weights.hub import hub_file\n"
        "try: hub_file('outptu/run', 'config.json', 'checkpoint')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ASKED" not in done.stdout and done.stdout.startswith("CheckpointError checkpoint: cannot fetch"), done
    assert f"there is no outptu/run in {tmp_path}, so it was taken for a repository of the hub" in done.stdout
    assert "hf download outptu/run" in done.stdout


def test_without_the_hubs_client_a_mistyped_path_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"there is no outptu/run in .*correct the path, or run: pip install hugg"):
        hub_file("outptu/run", "config.json", "checkpoint")


def test_of_a_whole_copied_repository_nothing_further_is_wanted(server):
    """As `hf download` fills a cache: it leaves no mark of what the repository does not have."""
    folder = hub_folder(REPO, "model.repo", further=("tokenizer.json",))
    server.online = False
    with pytest.raises(CheckpointError, match="cannot fetch vocab.txt"):
        hub_file(REPO, "vocab.txt", "model.repo", optional=True)
    (folder / ".gitattributes").touch()
    assert hub_file(REPO, "vocab.txt", "model.repo", optional=True) is None
    assert hub_file(REPO, "vocab.txt", "model.repo", COMMIT, optional=True) is None
    with pytest.raises(CheckpointError, match="cannot fetch vocab.txt"):
        hub_file(REPO, "vocab.txt", "model.repo")


def test_a_folder_is_never_looked_for_on_the_hub(server, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="the folder .*mine lacks config.json"):
        hub_folder(str(folder), "model.repo")
    (folder / "config.json").write_text("{}")
    assert hub_folder(str(folder), "model.repo", further=("vocab.txt",)) == folder
    assert server.asked == []
    for name in ("no/such/folder", "/no/where", "what ever", "a/b@c"):
        with pytest.raises(ConfigError, match="is no folder here, and no repository OWNER/NAME"):
            hub_file(name, "config.json", "model.repo")


@pytest.mark.parametrize(
    ("encoder", "key"),
    [
        ({"name": "huggingface", "repo": REPO}, "repo"),
        ({"name": "huggingface", "repo": ".", "tokenizer": REPO}, "tokenizer"),
        ({"name": "open_clip", "arch": f"hf-hub:{REPO}"}, "arch"),
        ({"name": "open_clip", "config": {"text_cfg": {"hf_model_name": REPO}}}, "config.text_cfg.hf_model_name"),
    ],
)
def test_a_checkpoint_has_no_repository_fetched_that_nobody_named(server, encoder, key):
    held = {"backbone": {"text": encoder}}
    with pytest.raises(
        CheckpointError, match=f"made of the repository {REPO}.*hf download.*model.backbone.text.{key}="
    ):
        refuse_strangers("x.pth", held)
    refuse_strangers("x.pth", held, held)  # its user names it too
    hub_file(REPO, "config.json", "model.repo")
    refuse_strangers("x.pth", held)  # or has it
