"""neucore demo: which model, which index, and that both are kept."""

import json

import pytest
from serve_case import MappedColours

import neucore_plugin
from neucore_plugin.commands import demo
from neucore_plugin.datasets.emoji import drawings as emoji_drawings

pytest.importorskip("emoji")
IDS = ["1F468-200D-1F692", "1F469-1F3FB-200D-1F692", "2764", "E000"]


class Drawn(MappedColours):
    """Takes no text."""

    def encode_query(self, pixels, texts):
        return super().encode_query(pixels, None if texts is None else [""] * len(texts))


def run_folder(place, created, status="finished", kind="train"):
    place.mkdir(parents=True)
    record = {"status": status, "kind": kind, "fingerprint": "f", "config": {}, "created": created}
    (place / "run.json").write_text(json.dumps(record))
    (place / "checkpoint_best.pth").write_bytes(b"")
    return place / "checkpoint_best.pth"


def test_the_training_that_was_finished_last_is_taken(tmp_path):
    assert demo.newest_checkpoint(tmp_path / "nothing") is None
    run_folder(tmp_path / "cut", 9, status="running")
    run_folder(tmp_path / "evaluation", 8, kind="evaluate")
    assert demo.newest_checkpoint(tmp_path) is None
    run_folder(tmp_path / "b", 1)
    newest = run_folder(tmp_path / "a", 2)
    (tmp_path / "results.json").write_text("{}")
    assert demo.newest_checkpoint(tmp_path) == newest


@pytest.fixture
def models(monkeypatch, tmp_path):
    """Four drawings, made of one; the models that are loaded, by the name of their checkpoint."""
    from colour_model import draw

    files = {emoji_id: draw(tmp_path / "drawings" / f"{emoji_id}.png", "red") for emoji_id in IDS}
    monkeypatch.setattr(emoji_drawings, "prepare", lambda: tmp_path / "drawings")
    monkeypatch.setattr(emoji_drawings, "read_manifest", lambda folder: {"files": dict.fromkeys(files)})
    loaded = {}

    def load(checkpoint, device):
        return loaded.setdefault(str(checkpoint), Drawn(f"model {checkpoint}"))

    monkeypatch.setattr(neucore_plugin, "load_model", load)
    return loaded


def test_drawings_are_indexed_once_by_their_names_and_anew_for_another_model(models, tmp_path):
    place = tmp_path / "emoji-index"
    index = demo._indexed(tmp_path / "first.pth", place)
    assert set(index.names) == {"man firefighter", "woman firefighter light skin tone", "red heart", "E000"}
    attributes = index.attributes(index.position("woman firefighter light skin tone"))
    assert attributes == {"code": IDS[1], "kind": "person", "gender": "woman", "tone": "light"}
    (model,) = models.values()
    before = list(model.encoded)
    again = demo._indexed(tmp_path / "first.pth", place)
    assert len(again) == 4 and model.encoded == before  # nothing was encoded twice
    other = demo._indexed(tmp_path / "second.pth", place)
    assert other.model_fingerprint != index.model_fingerprint and len(other) == 4
    assert [hit.name for hit in other.search(where="tone == 'light'", text="red")] == [
        "woman firefighter light skin tone"
    ]


def test_drawings_that_moved_or_became_more_are_indexed_anew(models, tmp_path, monkeypatch, capsys):
    from colour_model import draw

    place = tmp_path / "emoji-index"
    demo._indexed(tmp_path / "first.pth", place)
    (tmp_path / "drawings").rename(tmp_path / "elsewhere")
    more = {**dict.fromkeys(IDS), "2B50": None}
    draw(tmp_path / "elsewhere" / "2B50.png", "blue")
    monkeypatch.setattr(emoji_drawings, "prepare", lambda: tmp_path / "elsewhere")
    moved = demo._indexed(tmp_path / "first.pth", place)
    assert "other drawings" in capsys.readouterr().err
    assert len(moved) == 4 and all(path.is_file() for path in moved.paths)
    monkeypatch.setattr(emoji_drawings, "read_manifest", lambda folder: {"files": more})
    assert len(demo._indexed(tmp_path / "first.pth", place)) == 5
    capsys.readouterr()
    demo._indexed(tmp_path / "first.pth", place)
    assert "anew" not in capsys.readouterr().err


def test_without_a_run_the_main_job_trains_one(models, tmp_path, monkeypatch, capsys):
    from neucore_plugin import launch

    asked = []

    def train(config, options):
        asked.append((config, options))
        run_folder(tmp_path / "output" / "emoji" / "run", 1)

    monkeypatch.setattr(launch, "run", train)
    served = {}
    monkeypatch.setattr(demo, "serve", lambda arguments, opened, *rest: served.update(index=opened(), credit=rest[1]))
    monkeypatch.setattr(emoji_drawings, "svg_files", dict)
    from neucore_plugin import cli

    for _ in range(2):
        assert cli.main(["demo", "--output", str(tmp_path / "output"), "--no-browser"]) == 0
    assert asked == [("train_emoji", [f"run.output_dir={tmp_path / 'output' / 'emoji'}"])]
    assert "trains one" in capsys.readouterr().err and "OpenMoji" in served["credit"] and len(served["index"]) == 4
