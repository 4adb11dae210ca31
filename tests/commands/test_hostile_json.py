"""Every JSON file that is read, with each of its values replaced by each of many others: read, or one clear error."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from colour_model import ColourModel, make_folder
from earlier_index import save_earlier
from published_case import cirr_entry, put

from neucore_plugin import cli
from neucore_plugin.common.errors import NeucoreError
from neucore_plugin.concepts import ConceptVocabulary, cached_concepts
from neucore_plugin.datasets import folder
from neucore_plugin.datasets.emoji.drawings import read_manifest
from neucore_plugin.datasets.feature_cache import FeatureCache
from neucore_plugin.datasets.published.circo import CIRCO, IMAGES
from neucore_plugin.datasets.published.cirr import CIRR
from neucore_plugin.datasets.published.fashioniq import FASHIONIQ
from neucore_plugin.datasets.published.shoes import SHOES
from neucore_plugin.datasets.shards import reader as shards
from neucore_plugin.datasets.shards.writer import write_shards
from neucore_plugin.evaluation import submission
from neucore_plugin.evaluation.results import show_finished
from neucore_plugin.released.captions import training_captions
from neucore_plugin.released.vocabulary import read_vocabulary
from neucore_plugin.retrieval import GalleryIndex
from neucore_plugin.training.run_folder import METRICS, RECORD, RunFolder, newest_run, read_record

OTHERS = (None, True, -1, 2**62, 0.5, "", "x", "../x", "\ud83d", "x" * 3000, [], ["x"], [[]], {}, {"x": []})
DEEP: Any = "x"
for _ in range(60):
    DEEP = [DEEP]
ROW = {"R@1": 10.0, "median_rank": 3.0, "queries": 4}


def places(value: Any, here: tuple = ()) -> Iterator[tuple]:
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*here, key))


def changed(value: Any) -> Iterator[Any]:
    """The value with one part replaced by something else, or taken out, or with a key more; and the odd whole files."""
    for place in places(value):
        for other in (*OTHERS, DEEP):
            yield replaced(value, place, other)
        if place and isinstance(place[-1], str):
            yield replaced(value, place, ...)


def replaced(value: Any, place: tuple, other: Any) -> Any:
    if not place:
        return other
    value = copy.deepcopy(value)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if other is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = other
    return value


Case = tuple[Path, Any, Callable[[], Any]]


def _cirr(root: Path) -> tuple[Path, Path]:
    captions, images = root / "captions/cap.rc2.val.json", root / "image_splits/split.rc2.val.json"
    put(captions, [cirr_entry(n, ["a", "b", "c"], 0, 1, {"b": 1.0, "c": 0.5}) for n in (1, 2)])
    put(images, {name: f"./dev/{name}.png" for name in "abc"})
    return captions, images


def _folder(root: Path) -> tuple[Path, Path]:
    make_folder(root / "images")
    entries = [{"reference": "red.png", "caption": "c", "target": ["blue.png"], "change": "x", "query_id": "q"}] * 1
    put(root / "val.json", [*entries, {"reference": "red.png", "caption": "c", "target": "blue.png"}])
    put(root / "gallery.val.json", ["red.png", "blue.png"])
    return root / "val.json", root / "gallery.val.json"


def cases(root: Path) -> dict[str, Case]:
    """{name: (file, its good content, what reads it)}"""
    found: dict[str, Case] = {}

    def case(name: str, file: Path, read: Callable[[], Any]) -> None:
        found[name] = file, json.loads(file.read_text("utf-8")), read

    captions, images = _cirr(root / "cirr")
    case("cirr captions", captions, lambda: CIRR.read(root / "cirr", "val"))
    case("cirr images", images, lambda: CIRR.read(root / "cirr", "val"))
    case("captions of a conversion", captions, lambda: training_captions([captions], "official_cirr"))
    files = [root / "fashioniq" / file for file in FASHIONIQ.files("val_dress")]
    put(files[0], [{"target": "B2", "candidate": "B1", "captions": ["red", "long"]}])
    put(files[1], ["B1", "B2"])
    for kind, file in zip(("captions", "images"), files, strict=True):
        case(f"fashioniq {kind}", file, lambda: FASHIONIQ.read(root / "fashioniq", "val_dress"))
    put(root / "shoes/eval_im_names.txt", "a.jpg\nb.jpg")
    shoes = root / "shoes/relative_captions_shoes.json"
    put(shoes, [{"ImageName": "a.jpg", "ReferenceImageName": "b.jpg", "RelativeCaption": "red"}])
    case("shoes", shoes, lambda: SHOES.read(root / "shoes", "test"))
    query = {"id": 0, "reference_img_id": 10, "relative_caption": "c", "target_img_id": 12, "gt_img_ids": [12, 15]}
    put(root / "circo/annotations/val.json", [query])
    put(root / "circo" / IMAGES, {"images": [{"id": n, "file_name": f"{n}.jpg"} for n in (10, 12, 15)]})
    for kind in ("annotations/val.json", IMAGES):
        case(f"circo {kind}", root / "circo" / kind, lambda: CIRCO.read(root / "circo", "val"))
    split, gallery = _folder(root / "folder")
    known = folder.images(root / "folder")

    def read_folder() -> Any:
        return folder.load_split(root / "folder", "val", known)

    case("folder split", split, read_folder)
    case("folder gallery", gallery, read_folder)
    put(root / "words.json", {"<pad>": 0, "red": 1})
    case("words", root / "words.json", lambda: read_vocabulary(root / "words.json"))
    write_shards(root / "shards", "folder", known, {"val": read_folder()}, progress=False)
    for name in (shards.INDEX, "triplets-val.json"):
        case(f"shards {name}", root / "shards" / name, lambda: shards.verify(root / "shards", progress=False))
    index = GalleryIndex.build(ColourModel(), root / "folder/images", progress=False)
    index.save(root / "index")
    for file in (root / "index/manifest.json", *(root / "index/units").glob("*.json")):
        case(f"index {file.stem.partition('-')[0]}", file, lambda: GalleryIndex.open(root / "index"))
    save_earlier(index, root / "earlier")
    for file in sorted((root / "earlier").glob("*.json")):
        case(f"earlier {file.stem.partition('-')[0]}", file, lambda: GalleryIndex.load(root / "earlier", verify=False))
    ConceptVocabulary(("red", "blue")).to_json(root / "concepts.json")
    case("concepts", root / "concepts.json", lambda: ConceptVocabulary.from_json(root / "concepts.json"))
    for name in ("results.json", "evaluation.json"):
        content = {"val": {"neucore": ROW}}
        put(root / name / name, content if name == "results.json" else {"results": content, "per_change": content})
        page = root / name / "page.html"
        case(f"report {name}", root / name / name, lambda n=name, p=page: report(root / n, p))
    run = root / "results.json"
    (root / "copy").mkdir()
    case("results of a finished run", run / "results.json", lambda: show_finished(run, root / "copy"))
    put(root / "run" / RECORD, dict.fromkeys(("status", "kind", "fingerprint"), "train") | {"config": {}, "created": 1})
    put(root / "run" / METRICS, {"metrics": {"val": {}}, "provenance": {"data": {}}, "files": []})
    case("run record", root / "run" / RECORD, lambda: (read_record(root / "run"), newest_run(root, "train")))
    case("run metrics", root / "run" / METRICS, lambda: RunFolder(root / "run", {}, True).stored_metrics(["val"]))
    manifest = root / "features/manifest.json"
    put(manifest, {"identity": {}, "items": 0, "width": 3, "pooled_width": 2})
    for name in ("tokens.f16", "pooled.f16", "counts.i32"):
        put(manifest.parent / name, "")
    case("features", manifest, lambda: FeatureCache(manifest.parent, []))
    put(root / "emoji/manifest.json", {"format": "neucore-emoji-drawings-1", "files": {"a": [1, "x"]}})
    case("emoji", root / "emoji/manifest.json", lambda: read_manifest(root / "emoji"))
    put(root / "cirr.json", {"version": "rc2", "metric": "recall_subset", "1": ["a", "b", "c"], "2": ["c", "b", "a"]})
    put(root / "circo.json", {str(n): list(range(50)) for n in range(3)})
    case("submission cirr", root / "cirr.json", lambda: submission.check(root / "cirr.json"))
    case("submission circo", root / "circo.json", lambda: submission.check(root / "circo.json"))
    return found


def report(run: Path, page: Path) -> None:
    if cli.main(["report", str(run), "--html", str(page), "--svg", str(page.with_suffix(".svg"))]):
        raise NeucoreError(str(run))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Case]:
    return cases(tmp_path_factory.mktemp("json"))


NAMES = (
    "cirr captions", "cirr images", "captions of a conversion", "fashioniq captions", "fashioniq images", "shoes",
    "circo annotations/val.json", f"circo {IMAGES}", "folder split", "folder gallery", "shards index.json",
    "shards triplets-val.json", "index 00000000", "index manifest", "earlier ids", "earlier manifest",
    "concepts", "words", "report results.json",
    "report evaluation.json", "results of a finished run", "run record", "run metrics", "features", "emoji",
    "submission cirr", "submission circo",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_json_of_any_shape_is_read_or_refused_in_one_clear_error(made, name, capsys):
    assert set(made) == set(NAMES)
    file, good, read = made[name]
    before, told = file.read_bytes(), []
    read()
    try:
        for value in changed(good):
            file.write_text(json.dumps(value), encoding="utf-8")
            told.append(refusal(read))
            capsys.readouterr()
        passed_over = name.startswith("run")  # what is no run
        for raw in (b"", b"{", b"\xff\xfe", b"[" * 9999, b"[NaN]", b'{"a": 1e999}', b"[" + b"9" * 5000 + b"]"):
            file.write_bytes(raw)
            told.append(refusal(read))
            assert told[-1] or passed_over, raw
        file.unlink()
        file.mkdir()
        told.append(refusal(read))
    finally:
        shutil.rmtree(file, ignore_errors=True)
        file.unlink(missing_ok=True)
        file.write_bytes(before)
    told = [error for error in told if error]
    assert len(told) > 15 or passed_over
    named = (file.parent.name, "the image list of the split")
    assert [error for error in told if not any(part in error for part in named) or len(error) > 6000] == []
    read()


def refusal(read: Callable[[], Any]) -> str:
    try:
        read()
    except NeucoreError as error:
        return str(error)
    return ""


def test_a_damaged_file_of_concepts_is_made_anew(tmp_path, monkeypatch):
    class Extractor:
        pipeline_version, rules = "1", [["NOUN"]]

        def __call__(self, texts, progress):
            return [(f"größer {text}",) for text in texts]

    texts = ["ein Hund", "\ud83d"]
    whole = cached_concepts(Extractor(), texts, tmp_path)
    assert whole == {text: (f"größer {text}",) for text in texts}
    (file,) = tmp_path.iterdir()
    for content in (b"[]", b'[["a"], [3]]', b"{", b"[1, 2]", b'[["a"], {"b": 1}, []]'):
        file.write_bytes(content)
        assert cached_concepts(Extractor(), texts, tmp_path) == whole
