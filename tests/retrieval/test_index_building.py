"""An index built on disk: by units, continued, shared between processes, from folders, lists and tar shards."""

import io
import json
import logging
import tarfile

import pytest
import torch
from colour_model import COLOURS, NAMES, ColourModel, draw, names
from PIL import Image

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.shard_image import ShardImage
from neucore_plugin.datasets.shards import writer
from neucore_plugin.datasets.triplets import Gallery
from neucore_plugin.retrieval import building, units
from neucore_plugin.retrieval.index import GalleryIndex


def build(source, out, model=None, **options):
    return GalleryIndex.build(
        model or ColourModel(), source, out=out, progress=False, **{"unit_size": 2, "workers": 1, **options}
    )


def test_built_on_disk_equals_built_in_memory(built, folder, tmp_path):
    found = build(folder, tmp_path / "index", checkpoint="best.pth", dtype=torch.float32)
    assert found.names == NAMES and found.paths == built.paths and found.folder == tmp_path / "index"
    assert len(list((tmp_path / "index" / "units").glob("*.json"))) == 3
    for key, value in built.encodings.items():
        assert torch.equal(found.encodings[key], value)
    assert found.search("red.png", "green", k=3) == built.search("red.png", "green", k=3)
    hit = found.search(text="red", k=1)[0]
    assert (found.name(hit.position), found.path(hit.position)) == (hit.name, hit.path)
    assert found.info()["checkpoint"] == "best.pth" and found.info()["planned_units_done"] == 3
    half = build(folder, tmp_path / "half")
    assert half.dtype == torch.float16
    assert half.info()["bytes"] < found.info()["bytes"]


def test_an_interrupted_build_encodes_only_what_is_missing(folder, tmp_path, monkeypatch):
    class Killed(ColourModel):
        def encode_image(self, pixels):
            if len(self.encoded) == 2:  # the white picture that is asked for the shapes, and the first unit
                raise KeyboardInterrupt
            return super().encode_image(pixels)

    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "index", Killed())
    assert GalleryIndex.open(tmp_path / "index").names == NAMES[:2]
    assert GalleryIndex.open(tmp_path / "index").info()["planned_units_done"] == 1
    model = ColourModel()
    assert build(folder, tmp_path / "index", model).names == NAMES
    assert model.encoded == [2, 1]
    again = ColourModel()
    assert build(folder, tmp_path / "index", again).names == NAMES
    assert again.encoded == []


def test_processes_share_the_units(folder, tmp_path):
    models = [ColourModel() for _ in range(2)]
    for number, model in enumerate(models):
        build(folder, tmp_path / "index", model, share=(number, 2))
    assert [model.encoded for model in models] == [[1, 2, 1], [2]]  # the first asks for the shapes
    alone = build(folder, tmp_path / "alone")
    together = GalleryIndex.open(tmp_path / "index", ColourModel())
    assert together.names == alone.names
    assert all(torch.equal(together.encodings[key], alone.encodings[key]) for key in ("fg", "bg"))


def test_a_share_of_nothing_but_damage_ends_no_other(folder, tmp_path):
    (folder / "blue.png").write_text("no image")
    many = {"out": tmp_path / "index", "unit_size": 1, "progress": False}
    alone = GalleryIndex.build(ColourModel(), folder, share=(0, 5), **many)
    assert len(alone) == 0 and [failure.name for failure in alone.failures] == ["blue.png"]
    for number in range(1, 5):
        GalleryIndex.build(ColourModel(), folder, share=(number, 5), **many)
    assert len(GalleryIndex.open(tmp_path / "index")) == 4
    again = GalleryIndex.build(ColourModel(), folder, share=(0, 5), **many)
    assert len(again) == 4


def test_where_no_share_could_read_anything_the_last_says_so(folder, tmp_path):
    for path in map(folder.joinpath, NAMES):
        path.write_text("no image")
    many = {"out": tmp_path / "index", "unit_size": 3, "progress": False}
    GalleryIndex.build(ColourModel(), folder, share=(0, 2), **many)
    with pytest.raises(DataError, match="could be read"):
        GalleryIndex.build(ColourModel(), folder, share=(1, 2), **many)


def test_a_share_that_is_started_twice_is_written_once(folder, tmp_path, monkeypatch):
    """The other has put its unit in force while this one encoded."""
    real, done = building.encode, []

    def encode(*arguments, **options):
        made = real(*arguments, **options)
        if not done:
            done.append(True)
            build(folder, tmp_path / "index")
        return made

    monkeypatch.setattr(building, "encode", encode)
    assert build(folder, tmp_path / "index").names == NAMES


def test_what_does_not_belong_together_is_refused(folder, tmp_path):
    build(folder, tmp_path / "index", share=(0, 2))
    with pytest.raises(DataError, match="built by model colours-1, but the model given is colours-2"):
        build(folder, tmp_path / "index", ColourModel("colours-2"))
    with pytest.raises(DataError, match="stores float16, not float32"):
        build(folder, tmp_path / "index", dtype=torch.float32)
    with pytest.raises(DataError, match="another unit_size"):
        build(folder, tmp_path / "index", unit_size=3)
    draw(folder / "new.png", "red")
    with pytest.raises(DataError, match=r"begun with other pictures.*index sync"):
        build(folder, tmp_path / "index")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(DataError, match="format None"):
        build(folder, tmp_path / "web")
    assert len(list((tmp_path / "web").iterdir())) == 1


def test_a_unit_of_another_model_is_refused(folder, tmp_path):
    build(folder, tmp_path / "index")
    file = units_of(tmp_path / "index")[1]
    file.write_text(file.read_text().replace("colours-1", "colours-2"))
    with pytest.raises(DataError, match=r"was encoded by model 'colours-2', the index by 'colours-1'"):
        GalleryIndex.open(tmp_path / "index")


def units_of(index):
    return sorted((index / "units").glob("*.json"))


def test_bad_pictures_are_in_the_report(folder, tmp_path, caplog):
    (folder / "aa.jpg").write_text("no image")
    (folder / "ab.jpg").write_bytes((folder / "red.png").read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        found = build(folder, tmp_path / "index")  # the first unit holds nothing else
    assert found.names == NAMES
    assert [failure.name for failure in found.failures] == ["aa.jpg", "ab.jpg"]
    assert "2 of 7 images could not be read" in caplog.text
    assert [f.reason for f in GalleryIndex.open(tmp_path / "index").failures] == [f.reason for f in found.failures]
    with pytest.raises(DataError, match="none of the 2 images could be read"):
        build([folder / "aa.jpg", folder / "ab.jpg"], tmp_path / "none")


class Diverged(ColourModel):
    def encode_image(self, pixels):
        return {key: value * 1e6 for key, value in super().encode_image(pixels).items()}


def test_numbers_beyond_float16_are_one_error_and_never_stored(folder, tmp_path):
    with pytest.raises(DataError, match=r"NaN or infinite numbers; store float32 instead .*'blue\.png'"):
        build(folder, tmp_path / "index", Diverged())
    assert units_of(tmp_path / "index") == []
    assert build(folder, tmp_path / "whole", Diverged(), dtype=torch.float32).names == NAMES


def test_the_time_to_open_does_not_depend_on_the_number_of_images(tmp_path, monkeypatch):
    """Neither rows nor encodings are read: the files are mapped, and sizes are compared."""
    for count in (10, 20_000):
        labels = [f"{number}.png" for number in range(count)]
        GalleryIndex(labels, labels, {"fg": torch.rand(count, 3)}).save(tmp_path / str(count))
    read, touched, real = [], [], units.read_json
    monkeypatch.setattr(units, "read_json", lambda path, *rest: read.append(path.name) or real(path, *rest))
    monkeypatch.setattr("neucore_plugin.retrieval.rows.Rows.select", lambda *given: touched.append(given))
    monkeypatch.setattr(units, "sha256_file", touched.append)
    opened = []
    for count in (10, 20_000):
        read.clear()
        assert len(GalleryIndex.open(tmp_path / str(count))) == count
        opened.append(len(read))
    assert touched == []
    assert opened[0] == opened[1] <= 4  # manifests, and the JSON of one unit


@pytest.mark.parametrize("name", ["half \ud83d letter.png", "latin-\udce4.png", "nai\u0308ve.png", "a\nb.png", "0"])
def test_any_name_is_kept(name, tmp_path):
    index = GalleryIndex([name, "other.png"], [name, "other.png"], {"fg": torch.zeros(2, 3)})
    index.save(tmp_path / "index")
    opened = GalleryIndex.open(tmp_path / "index")
    assert opened.names == [name, "other.png"] and opened.position(name) == 0 and name in opened
    opened.remove("other")
    assert GalleryIndex.open(tmp_path / "index").names == [name]


# ---- lists ----------------------------------------------------------------------------------------------------------

LISTS = {
    "a.csv": "name,path,price,tag,new,code\nfirst,red.png,12.5,warm,true,007\nsecond,more/Grey.JPG,,,false,8\n",
    "a.jsonl": '{"name": "first", "file": "red.png", "price": 12.5, "tag": "warm", "new": true, "code": "007"}\n\n'
    '{"name": "second", "file": "more/Grey.JPG", "new": false, "code": 8, "tag": null}\n',
    "a.json": json.dumps(
        [
            {"name": "first", "image": "red.png", "price": 12.5, "tag": "warm", "new": True, "code": "007"},
            {"name": "second", "image": "more/Grey.JPG", "new": False, "code": 8},
        ]
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_gives_names_and_attributes(folder, tmp_path, name):
    (folder / name).write_text(LISTS[name])
    found = build(folder / name, tmp_path / "index")
    assert found.names == ["first", "second"]
    assert found.attributes(0) == {"price": 12.5, "tag": "warm", "new": True, "code": "007"}
    assert found.attributes(1) == {"new": False, "code": 8}
    hit = found.search(folder / "red.png", k=1, exclude_reference=False)[0]
    assert hit.attributes == found.attributes(0) and hit.path == (folder / "red.png").resolve()
    assert found.search(folder / "red.png", k=1)[0].name == "second"  # the file is known by its place


def test_a_list_of_paths(folder, tmp_path):
    (folder / "all.json").write_text('["more/Grey.JPG", "gone.png"]')
    found = build(folder / "all.json", tmp_path / "index")
    assert found.names == ["more/Grey.JPG"]
    assert [(f.name, "does not exist" in f.reason) for f in found.failures] == [("gone.png", True)]


BAD_LISTS = [
    ("a.csv", "", "lists no images"),
    ("a.csv", "price\n3\n", "entry 1: names no file; it has 'price'. Name the file, a text, by one of path, file"),
    ("a.csv", "path;price\nred.png;3\n", "entry 1: names no file; it has 'path;price'"),
    ("a.csv", "path,price,price\nred.png,3,4\n", "the header names 'price' twice"),
    ("a.csv", f"path,text\nred.png,{'x' * 10**6}\n", "no valid CSV .*field larger"),
    ("a.csv", "path,price\nred.png\n", "line 2: has not as many cells"),
    ("a.csv", "path,price\nred.png,1,2\n", "line 2: has not as many cells"),
    ("a.csv", 'path\n"red.png\n', "no valid CSV"),
    ("a.csv", "path\nred.png\n./red.png\n", "given twice: 'red.png'"),
    ("a.json", "{}", "expected a JSON list"),
    ("a.json", "[3]", "entry 1: is int"),
    ("a.json", '[{"path": 3}]', "entry 1: names no file"),
    ("a.json", '[{"path": "a\\u0000b"}]', "entry 1: names no file"),
    ("a.json", '[{"path": "red.png", "name": 3}]', "entry 1: its name is 3"),
    ("a.json", '[{"path": "red.png", "price": NaN}]', "NaN is no number"),
    ("a.jsonl", '{"path": "red.png"}\n{', "line 2: no valid JSON"),
    ("a.txt", "red.png", "is a file; give a list of files"),
    ("a.tar", "red.png", "none of the 1 images could be read.*is no whole tar file"),
]


def test_blanks_after_commas_are_no_part_of_a_csv(folder, tmp_path):
    (folder / "a.csv").write_text('\ufeffpath, price, shop\r\nred.png, 3, "a, b"\r\n', encoding="utf-8")
    assert build(folder / "a.csv", tmp_path / "index").attributes(0) == {"price": 3, "shop": "a, b"}


@pytest.mark.parametrize(("name", "text", "message"), BAD_LISTS)
def test_bad_lists(folder, tmp_path, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        build(folder / name, tmp_path / "index")


# ---- tar shards -----------------------------------------------------------------------------------------------------


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[colour]).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def shards(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    first = {
        "0001.png": png("red"), "0001.json": b'{"price": 3}', "0001.txt": b"a red one", "link.png": link,
        "../../up.png": png("pink"), "0002.cls": b"7", "0003.json": b"not json", "0003.png": b"broken",
        ".hid.png": b"x",
    }  # fmt: skip
    pack(tmp_path / "shards" / "a.tar", first)
    pack(tmp_path / "shards" / "deep" / "b.tar", {"0001.png": png("blue"), "sub/x.seg.png": png("green")})
    return tmp_path / "shards"


def test_tar_shards_are_read_by_place(shards, tmp_path):
    found = build(shards, tmp_path / "index")
    assert found.names == ["a/0001.png", "a/../../up.png", "deep/b/0001.png", "deep/b/sub/x.seg.png"]
    assert found.attributes(0) == {"price": 3, "text": "a red one"} and found.attributes(2) == {}
    assert [failure.name for failure in found.failures] == ["a/0003.png"]
    assert len(units_of(tmp_path / "index")) == 2  # one a shard
    hits = found.search("a/0001.png", "blue", k=3)
    assert "a/0001.png" not in names(hits)
    hit = found.search(text="blue", k=1)[0]
    assert hit.name == "deep/b/0001.png" and isinstance(hit.path, ShardImage) and hit.path.read() == png("blue")
    memory = GalleryIndex.build(ColourModel(), shards, progress=False)
    assert memory.names == found.names and names(memory.search(text="blue", k=4)) == names(
        found.search(text="blue", k=4)
    )
    again = ColourModel()
    build(shards, tmp_path / "index", again)
    assert again.encoded == []


def test_a_bad_shard_is_reported_and_the_others_are_built(shards, tmp_path):
    file = shards / "deep" / "b.tar"
    file.write_bytes(file.read_bytes()[:700])
    found = build(shards, tmp_path / "index")
    assert found.names == ["a/0001.png", "a/../../up.png"]
    (failure,) = [failure for failure in found.failures if failure.name == "deep/b.tar"]
    assert "is no whole tar file" in failure.reason


def test_our_own_shards_keep_their_names(folder, tmp_path):
    known = {name: folder / name for name in NAMES}
    writer.write_shards(
        tmp_path / "shards",
        "folder",
        known,
        {"val": ([], Gallery(tuple(NAMES), tuple(known.values())))},
        progress=False,
    )
    found = build(tmp_path / "shards", tmp_path / "index")
    assert found.names == NAMES
    index = tmp_path / "shards" / "index.json"
    good = index.read_text()
    for change, message in (
        (lambda d: d["shards"][0].update(file="../x.tar"), "is no shard of this folder"),
        (lambda d: d["shards"][0]["images"][0].update(offset=1 << 40), "has no place of its own"),
        (lambda d: d["shards"][0]["images"][1].update(d["shards"][0]["images"][0]), "has no place of its own"),
        (lambda d: d.pop("shards"), "'shards'"),
    ):
        plain = json.loads(good)
        change(plain)
        index.write_text(json.dumps(plain))
        with pytest.raises(DataError, match=message):
            build(tmp_path / "shards", tmp_path / "other")


def header(kind=b"0", size=-512):
    """Of a tar member; the size is of GNU's binary sort."""
    member = bytearray(tarfile.TarInfo("x.png").tobuf())
    member[156:157], member[124:136] = kind, b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    if size > 0:
        member[124:128] = b"\x80" + bytes(3)
    member[148:156] = b" " * 8
    member[148:156] = b"%06o\0 " % sum(member)
    return bytes(member)


LYING_TARS = {
    "round for ever": (True, header()),
    "back to the first": (False, header(size=-1024)),
    "negative pax": (False, header(b"x")),
    "negative name": (False, header(b"L")),
    "huge pax": (False, header(b"x", 1 << 50)),
    "huge name": (False, header(b"L", 1 << 50)),
    "huge picture": (True, header(size=1 << 50)),
}


@pytest.mark.parametrize("name", LYING_TARS)
def test_a_tar_that_lies_is_one_failure(tmp_path, name):
    behind, lie = LYING_TARS[name]
    good = pack(tmp_path / "shards" / "a.tar", {"1.png": png("red")}).read_bytes()
    (tmp_path / "shards" / "b.tar").write_bytes(good[:1024] * behind + lie + good)
    found = build(tmp_path / "shards", tmp_path / "index")
    assert found.names == ["a/1.png"]
    assert [failure.name for failure in found.failures] == ["b.tar"]
    assert "is no whole tar file (" in found.failures[0].reason and "()" not in found.failures[0].reason


def test_a_build_of_no_pictures_at_all_is_an_error_each_time(folder, tmp_path):
    (folder / "a.json").write_text('["one.png", "two.png"]')
    for _ in range(2):
        with pytest.raises(DataError, match="none of the 2 images could be read: one.png"):
            build(folder / "a.json", tmp_path / "index")
    draw(folder / "two.png", "pink")  # such as a drive that is back
    assert build(folder / "a.json", tmp_path / "index").names == ["two.png"]
    pack(tmp_path / "shards" / "a.tar", {"a.txt": b"no picture"})
    for _ in range(2):
        with pytest.raises(DataError, match="no images in .*a.tar"):
            build(tmp_path / "shards" / "a.tar", tmp_path / "other")
