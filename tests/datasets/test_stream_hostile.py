"""Samples that are bad, and shards that lie or are hostile: told at once, nothing in them run or written."""

import io
import os
import pickle
import tarfile

import pytest
import stream_case as case

from neucore_plugin.common.errors import DataError
from neucore_plugin.datasets.shards import stream
from neucore_plugin.training.loaders import StreamLoader


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_the_bomb_explodes_where_it_is_unpickled(tmp_path, monkeypatch):
    """Else the tests below would prove nothing; webdataset's own decoder does unpickle it."""
    import webdataset

    monkeypatch.chdir(tmp_path)
    decode = webdataset.autodecode.Decoder([])
    decode({"__key__": "0", "pyd": pickle.dumps(Bomb())})
    assert (tmp_path / "exploded").is_dir()


def rewrite(path, change, out=None) -> None:
    """change: (member, bytes) -> a list of (member or TarInfo, bytes) in its place; size and sum are set right."""
    with tarfile.open(path) as archive:
        members = [(info.name, archive.extractfile(info).read()) for info in archive]
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            for new, data in change(name, content):
                info = new if isinstance(new, tarfile.TarInfo) else tarfile.TarInfo(new)
                if info.isreg():
                    info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    case.edit_manifest(path.parent, lambda plain: plain["files"][path.name].update(bytes=path.stat().st_size))


def first_key(path) -> str:
    with tarfile.open(path) as archive:
        return archive.getnames()[0].split(".")[0]


BAD = {
    "picture cut": (lambda name, data: [(name, data[:60] if ".target." in name else data)], "a picture of it: "),
    "picture empty": (lambda name, data: [(name, b"" if ".reference." in name else data)], "a picture of it: "),
    "no target": (lambda name, data: [] if ".target." in name else [(name, data)], "has no target"),
    "no query": (lambda name, data: [] if name.endswith(".json") else [(name, data)], "has no json"),
    "no JSON": (lambda name, data: [(name, b"{" if name.endswith(".json") else data)], "its JSON is no query"),
    "a pickle": (
        lambda name, data: [(name, pickle.dumps(Bomb()) if name.endswith(".json") else data)],
        "its JSON is no query",
    ),
    "deep JSON": (
        lambda name, data: [(name, b"[" * 60_000 if name.endswith(".json") else data)],
        "its JSON is no query",
    ),
    "another query": (
        lambda name, data: [(name, data.replace(b"make it", b"make  it").replace(b"now a", b"now  a"))],
        "its JSON is another query",
    ),
}


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD), ("picture cut", 1), ("no query", 1)])
def test_a_bad_sample_is_told_by_shard_and_key_or_left_out_and_counted(samples, kind, workers, caplog, monkeypatch):
    change, message = BAD[kind]
    monkeypatch.chdir(samples.parent)
    path = samples / "train-00003.tar"
    key = first_key(path)
    rewrite(path, lambda name, data: change(name, data) if name.startswith(key) else [(name, data)])
    with pytest.raises(DataError) as caught:
        list(StreamLoader(case.streamed(samples), 6, num_workers=workers))
    assert str(caught.value).startswith(f"{path}: sample {key}: {message}")
    loader = StreamLoader(case.streamed(samples, skip=True), 149, num_workers=workers)
    (batch,) = loader
    assert sorted({*range(149)} - {*batch["index"].tolist()}) == [int(key)]
    assert f"left out: {path}: sample {key}" in caplog.text
    assert "1 bad samples were left out" in caplog.text
    assert os.listdir(".") == ["out"]  # nothing exploded


def test_a_batch_of_bad_samples_alone_is_an_error(samples):
    for path in samples.glob("train-*.tar"):
        rewrite(path, lambda name, data: [(name, b"x" if ".target." in name else data)])
    with pytest.raises(DataError, match="all samples of a batch are bad, such as"):
        list(StreamLoader(case.streamed(samples, skip=True), 4))


def special(name: str, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    return info


HOSTILE = {
    **{
        f"type {kind!r}": (
            lambda name, data, kind=kind: [(special(name, kind), b"")] if ".target." in name else [(name, data)],
            "which is no member of ours",
        )
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    },
    **{
        f"name {new!r}": (
            lambda name, data, new=new: [(name, data), (new, pickle.dumps(Bomb()))],
            "which is no member of ours",
        )
        for new in ("00000000.pyd", "x.pickle", "../00000000.json", "/tmp/00000000.json", "00000000.target.jpg/../x")
    },
    "a member twice": (lambda name, data: [(name, data), (name, data)], "is not where the manifest says"),
    "two targets": (
        lambda name, data: [(name, data), *([(name.replace("png", "jpg"), data)] if ".target." in name else [])],
        "is not where the manifest says",
    ),
    "another number": (lambda name, data: [("99999999" + name[8:], data)], "is not where the manifest says"),
    "a huge query": (
        lambda name, data: [(name, b" " * (stream.MAX_PICTURE // 256 + 1) if name.endswith("json") else data)],
        "bytes, which no sample has",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("skip", [False, True])
def test_a_hostile_shard_is_refused_before_anything_in_it_is_read(samples, tmp_path, monkeypatch, kind, skip):
    """Also where bad samples are left out: this is no damage."""
    monkeypatch.chdir(tmp_path)
    change, message = HOSTILE[kind]
    path = samples / "train-00000.tar"
    key = first_key(path)
    rewrite(path, lambda name, data: change(name, data) if name.startswith(key) else [(name, data)])
    with pytest.raises(DataError, match=message) as caught:
        list(StreamLoader(case.streamed(samples, skip=skip), 6))
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["out"]


def test_a_sparse_member_that_claims_gigabytes_is_not_read(samples):
    """GNU's sparse members are of kilobytes and read as zeros without end."""
    path = samples / "train-00000.tar"
    raw = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(raw[:512]), "utf-8", "strict")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"77777777777\x00"  # the size when read
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    path.write_bytes(bytes(block) + bytes(raw[512:]))
    with pytest.raises(DataError, match=r"no member of ours|no whole tar file|not where the manifest says"):
        list(StreamLoader(case.streamed(samples), 6))


def test_a_shard_that_is_replaced_meanwhile_is_looked_through_again(samples):
    """Between epochs, and between the look at it and its reading."""
    loader = StreamLoader(case.streamed(samples), 6)
    assert len(list(loader)) == len(loader)
    one, other = samples / "train-00000.tar", samples / "train-00001.tar"
    other.replace(one)
    loader.set_position(1)
    with pytest.raises(DataError, match="is not where the manifest says|cannot be read to its end"):
        list(loader)


def test_what_was_looked_through_is_what_is_read(samples, monkeypatch):
    look = stream.check_members

    def replaced(file, shard):
        look(file, shard)
        strange = samples / "strange"
        with tarfile.open(strange, "w") as archive:
            archive.addfile(tarfile.TarInfo("x.pyd"))
        strange.replace(shard.path)

    monkeypatch.setattr(stream, "check_members", replaced)
    loader = StreamLoader(case.streamed(samples), 6)
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize("zeros", [512, 3000])
def test_a_stream_is_never_silently_short(samples, zeros):
    """A shard of the right size whose end is zeros is a whole tar file for tarfile: it only holds fewer members."""
    path = samples / "train-00001.tar"
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    raw = bytearray(path.read_bytes())
    begin = last.offset if zeros == 512 else last.offset - 3000 + 512
    raw[begin : begin + zeros] = bytes(zeros)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"ends after \d of \d+ samples|no whole tar file|has no target"):
        list(StreamLoader(case.streamed(samples), 149))
    with pytest.raises(DataError, match="its content has changed"):
        stream.verify(samples, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(format="neucore-shards-1"), "has the format 'neucore-shards-1'"),
        (lambda p: p.pop("files"), "lacks its splits, or the size and sum of a file"),
        (lambda p: p.update(splits=[]), "lacks its splits"),
        (lambda p: p["files"].update({"../../x": p["files"]["train-00000.tar"]}), "lacks its splits, or the size"),
        (lambda p: p["files"].update({"/etc/passwd": p["files"]["train-00000.tar"]}), "lacks its splits, or the size"),
        (lambda p: p["files"]["train-00000.tar"].update(bytes=True), "lacks its splits, or the size"),
        (lambda p: p["files"]["train-00000.tar"].update(sha256="../x"), "lacks its splits, or the size"),
        (
            lambda p: p["splits"]["train"]["shards"][0].update(file="pipe:touch x"),
            "'pipe:touch x' of train, which is no",
        ),
        (lambda p: p["splits"]["train"]["shards"][0].update(file="train-00099.tar"), "which is no shard"),
        (lambda p: p["splits"]["train"]["shards"][0].update(queries=[]), "which is no shard"),
        (lambda p: p["splits"]["train"]["shards"][0].update(queries=[-1]), "which is no shard"),
        (lambda p: p["splits"]["train"]["shards"][0].update(queries=["0"]), "which is no shard"),
        (lambda p: p["splits"]["train"]["shards"][0]["queries"].append(10**9), "a triplet that train lacks"),
        (lambda p: p["splits"]["train"]["shards"].append(p["splits"]["train"]["shards"][0]), "which is no shard"),
        (
            lambda p: p["splits"]["train"]["shards"][0].update(queries=p["splits"]["train"]["shards"][1]["queries"]),
            "lists a triplet of train twice",
        ),
        (lambda p: p["splits"]["train"].update(sha256="0"), "triplets-train.json: was altered"),
        (lambda p: p["splits"].update({"train/../x": p["splits"]["train"]}), "lacks its splits"),
        (lambda p: p.update(name="cirr"), "holds samples of 'cirr', not of 'folder'"),
    ],
)
def test_a_manifest_that_lies_is_refused(samples, change, message):
    case.edit_manifest(samples, change)
    with pytest.raises(DataError) as caught:
        stream.open_stream(str(samples), "folder")
    assert message in str(caught.value)
