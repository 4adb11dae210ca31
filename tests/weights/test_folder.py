"""The folder form of a checkpoint: the same model bit for bit, from a folder or the hub; hostile ones are refused."""

import contextlib
import json
import os

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from neucore_plugin import __version__, load_model
from neucore_plugin.common.errors import CheckpointError, ConfigError, NeucoreError
from neucore_plugin.common.files import hub_name, new_folder, sha256_file
from neucore_plugin.weights import checkpoint, folder, trust

hub = pytest.importorskip("huggingface_hub")
COMMIT = "b" * 40


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint, as training writes it."""
    return tiny.save(tiny.build(), tmp_path_factory.mktemp("original") / "checkpoint_best.pth")


@pytest.fixture
def written(original, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    folder.write(out, checkpoint.load(original), __version__)
    return out


def edit(out, change, name=folder.CONFIG):
    """Change a JSON file; sums stay as they were but for that of the file itself."""
    content = json.loads((out / name).read_text())
    changed = change(content)
    (out / name).write_text(json.dumps(content if changed is None else changed))
    resum(out, name)


def resum(out, name):
    content = json.loads((out / folder.CONFIG).read_text())
    if name in content.get("sha256", {}):
        content["sha256"][name] = sha256_file(out / name)
        (out / folder.CONFIG).write_text(json.dumps(content))


def test_a_folder_is_the_same_model_bit_for_bit(original, written):
    first, second = load_model(original), load_model(written)
    assert first.fingerprint() == second.fingerprint()
    assert first.vocabulary.words == second.vocabulary.words and first.config == second.config
    assert first.image_processor.fingerprint == second.image_processor.fingerprint
    images = tiny.pixels(first)
    with torch.inference_mode():
        one, other = (
            model.score(model.encode_query(images, tiny.TEXTS), model.encode_image(images)) for model in (first, second)
        )
    assert torch.equal(one, other)
    assert {path.name for path in written.iterdir()} == {folder.CONFIG, folder.WEIGHTS, folder.CONCEPTS, folder.PIXELS}


def test_the_hosts_load_model_takes_a_folder(original, written):
    from lavis.models import load_model as hosts

    assert hosts("neucore", checkpoint=str(written)).fingerprint() == load_model(original).fingerprint()


def test_a_config_may_name_a_folder_for_an_evaluation(written):
    section = trust.section_of(written, {})
    assert section["config"]["arch"] == "neucore" and section["image_processor"]["image_size"] == 64


def test_words_of_an_own_vocabulary_travel(tmp_path):
    text = {"name": "glove_bigru", "width": 32, "word_dim": 8, "captions": "default", "glove": None}
    from neucore_plugin.concepts import ConceptVocabulary
    from neucore_plugin.models.neucore import NeucoreModel

    section = {**tiny.NEUCORE, "backbone": {**tiny.BACKBONE, "text": text}}
    model = NeucoreModel.from_config(section, vocabulary=ConceptVocabulary(tiny.WORDS), captions=tiny.TEXTS)
    path = tiny.save(model, tmp_path / "c.pth")
    out = tmp_path / "out"
    out.mkdir()
    folder.write(out, checkpoint.load(path), __version__)
    assert load_model(out).backbone.text.words == model.backbone.text.words
    edit(out, lambda words: [1, *words], folder.WORDS)
    with pytest.raises(CheckpointError, match="every word must be a text"):
        load_model(out)


# ---- hostile and damaged ones ----------------------------------------------------------------------------------------


def weights(change):
    def apply(out):
        state = change(load_file(out / folder.WEIGHTS))
        save_file(state, out / folder.WEIGHTS)
        resum(out, folder.WEIGHTS)

    return apply


def config(**changes):
    return lambda out: edit(out, lambda content: content.update(changes))


def encoder(side, **changes):
    return lambda out: edit(out, lambda content: content["model"]["backbone"].update({side: changes}))


def outside(name):
    def apply(out):
        place = out.parent / f"elsewhere-{name}"
        os.replace(out / name, place)
        (out / name).symlink_to(place)

    return apply


def huge_header(out):
    (out / folder.WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    resum(out, folder.WEIGHTS)


def pickled(out):
    torch.save({"a": torch.zeros(2)}, out / folder.WEIGHTS)
    resum(out, folder.WEIGHTS)


HOSTILE = [
    (weights(lambda state: {**state, "extra": torch.zeros(1)}), "unknown to the model: extra"),
    (weights(lambda state: dict(list(state.items())[1:])), "missing in the file"),
    (weights(lambda state: {k: v.reshape(1, *v.shape) for k, v in state.items()}), "other shape"),
    (weights(lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()}), "other type"),
    (huge_header, "truncated, damaged, or no file of weights"),
    (pickled, "truncated, damaged, or no file of weights"),
    (lambda out: (out / folder.WEIGHTS).write_bytes(b""), "its sha256 is"),
    (lambda out: (out / folder.WEIGHTS).unlink(), "lacks model.safetensors"),
    (lambda out: (out / folder.CONCEPTS).unlink(), "lacks concepts.json"),
    (lambda out: (out / folder.CONFIG).unlink(), "lacks config.json"),
    (outside(folder.WEIGHTS), "a link that leads out of its folder"),
    (outside(folder.CONFIG), "a link that leads out of its folder"),
    (lambda out: (out / folder.CONFIG).write_text("[" * 100_000), "nested too deeply"),
    (lambda out: (out / folder.CONFIG).write_bytes(b"\xff\xfe"), "no text in UTF-8"),
    (lambda out: os.truncate(out / folder.CONFIG, 1 << 27), "at most 67,108,864"),
    (config(format="neucore-folder-9"), "install the version that wrote it"),
    (config(format=None), "is none of our models"),
    (config(arch="other"), "architecture 'other'"),
    (config(arch=["neucore"]), "arch: missing, or of another kind"),
    (config(sha256={}), "lacks the sum of concepts.json"),
    (lambda out: edit(out, lambda content: content["sha256"].update({"../../x": "0"})), r"names files that no such"),
    (lambda out: edit(out, lambda content: content["sha256"].update({folder.WEIGHTS: "0" * 64})), "its sha256 is"),
    (config(frozen={"backbone.image": "0" * 64}), "frozen weights that are not those of the training"),
    (config(frozen={"backbone.image": 1}), "every entry must be a sum"),
    (config(model={"backbone": ["x"]}), "Did you mean|no mapping|backbone"),
    (lambda out: edit(out, lambda content: content["model"].update(nonsense=1)), "nonsense"),
    (encoder("image", name="registered", arch="x", module="os.path_of_a_stranger"), "a checkpoint may not import"),
    (encoder("text", name="clip", arch="ViT-B-32", pretrained="https://example.org/x.pt"), "none of the host's places"),
    (encoder("text", name="huggingface", repo="someone/model-nobody-has"), "may not have it fetched|not in the cache"),
    (lambda out: edit(out, lambda words: words["words"].append("more"), folder.CONCEPTS), "was altered"),
    (lambda out: edit(out, lambda pixels: pixels.update(image_size="big"), folder.PIXELS), "image_size"),
    (lambda out: edit(out, lambda pixels: pixels.update(nonsense=1), folder.PIXELS), "nonsense"),
    (lambda out: edit(out, lambda pixels: [], folder.PIXELS), "expected a JSON object"),
]


@pytest.mark.parametrize(("damage", "expected"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_folder_gives_one_clear_error(written, damage, expected):
    damage(written)
    with pytest.raises(NeucoreError, match=expected):
        load_model(written)
    with contextlib.suppress(NeucoreError):  # one of ours, or nothing that it could tell
        trust.section_of(written, {})


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(written, tmp_path, monkeypatch):
    """A hub that holds the written folder at one commit, its cache, and `asked`: (name, revision) of all fetched."""

    class Server:
        asked, online, cache = [], True, tmp_path / "hub"

        def fetch(self, repo, name, revision=None, **_):
            self.asked.append((name, revision))
            if not self.online:
                raise hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled")
            place = self.cache / f"models--{repo.replace('/', '--')}"
            if not (written / name).is_file():
                raise hub.errors.EntryNotFoundError("404")
            (place / "refs").mkdir(parents=True, exist_ok=True)
            (place / "refs" / (revision or "main")).write_text(COMMIT)
            blob, path = place / "blobs" / sha256_file(written / name), place / "snapshots" / COMMIT / name
            for one in (blob, path):
                one.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes((written / name).read_bytes())
            path.unlink(missing_ok=True)
            path.symlink_to(os.path.relpath(blob, path.parent))  # as the client lays them down
            return str(path)

    found, cached = Server(), hub.try_to_load_from_cache
    monkeypatch.setattr(hub, "hf_hub_download", found.fetch)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: cached(*a, cache_dir=found.cache, **k))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(found.cache))
    found.asked.clear()
    return found


@pytest.mark.parametrize("name", ["someone/model", "someone/model@v1.0"])
def test_a_repository_is_fetched_once_and_then_taken_from_the_cache(original, server, name):
    wanted = checkpoint.fingerprint(checkpoint.load(original)["model"])
    assert checkpoint.fingerprint(checkpoint.load(name)["model"]) == wanted
    revision = "v1.0" if "@" in name else None
    assert server.asked[0] == (folder.CONFIG, revision) and {at for _, at in server.asked[1:]} == {COMMIT}
    server.online = False
    server.asked.clear()
    assert checkpoint.fingerprint(checkpoint.load(name)["model"]) == wanted and not server.asked
    snapshot = server.cache / "models--someone--model" / "snapshots" / COMMIT
    assert checkpoint.fingerprint(checkpoint.load(snapshot)["model"]) == wanted  # the cache's folder itself


def test_offline_the_error_names_repository_and_remedy(server):
    server.online = False
    with pytest.raises(
        CheckpointError, match="checkpoint: cannot fetch config.json of the repository someone/model"
    ) as e:
        load_model("someone/model")
    assert "hf download someone/model" in str(e.value)


def test_of_a_repository_of_another_make_no_weights_are_fetched(written, server):
    (written / folder.CONFIG).write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="is none of our models"):
        load_model("someone/model")
    assert [name for name, _ in server.asked] == [folder.CONFIG]


def test_what_is_here_or_looks_like_a_file_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "run").mkdir(parents=True)
    for path in ("output/run", "output/missing", "a/best.pth", "a/b/c", "best", "/a/b", "../x", "./x", "~/x", "a/b@"):
        assert hub_name(path) is None, path
    assert hub_name("a/b") == ("a/b", None) and hub_name("a/b.c@v1/x") == ("a/b.c", "v1/x")
    with pytest.raises(CheckpointError, match="no checkpoint file output/missing"):
        load_model("output/missing")


# ---- a new folder ----------------------------------------------------------------------------------------------------


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    def stopped():
        with new_folder(tmp_path / "out") as out:
            (out / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "deep" / "out") as out:
        (out / "whole").touch()
    assert [path.name for path in (tmp_path / "deep").rglob("*")] == ["out", "whole"]
    with pytest.raises(ConfigError, match="is there already"), new_folder(tmp_path / "deep" / "out"):
        pass
    assert (tmp_path / "deep" / "out" / "whole").is_file()
