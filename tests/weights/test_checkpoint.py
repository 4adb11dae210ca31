import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.weights import checkpoint


class Net(nn.Module):
    def __init__(self, frozen: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head, self.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(()))
        self.mixed = nn.Linear(2, 2)
        self.mixed.bias.requires_grad_(False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        if frozen:
            self.encoder.requires_grad_(False)


TRAINED = {"head.weight", "head.bias", "scale", "mixed.weight", "mixed.bias", "steps"}


def stored(tmp_path, model=None, **more) -> Path:
    state, frozen = checkpoint.model_state(model or Net())
    checkpoint.save({"model": state, "frozen": frozen, **more}, tmp_path / "c.pth")
    return tmp_path / "c.pth"


def test_frozen_modules_and_their_buffers_are_left_out():
    state, frozen = checkpoint.model_state(Net())
    assert set(state) == TRAINED  # the batch norm's running statistics are frozen with it; `mixed` is trained in part
    assert set(frozen) == {"encoder.0", "encoder.1"}
    state, frozen = checkpoint.model_state(Net(frozen=False))
    assert set(state) == set(Net().state_dict())
    assert frozen == {}


def test_save_load_restore_is_exact(tmp_path):
    model = Net()
    model.head.weight.data.normal_()
    path = stored(tmp_path, model, progress={"epoch": 3, "metric": -0.25})
    loaded = checkpoint.load(path)
    other = Net()
    checkpoint.restore_model(other, loaded["model"], loaded["frozen"], path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert loaded["progress"] == {"epoch": 3, "metric": -0.25}
    assert loaded["format"] == checkpoint.FORMAT


def test_other_frozen_weights_are_refused_and_nothing_is_changed(tmp_path):
    path = stored(tmp_path)
    loaded = checkpoint.load(path)
    for change in ("weight", "running_mean"):
        model = Net()
        before = model.head.weight.clone()
        getattr(model.encoder[1], change).data[0] += 1e-3
        with pytest.raises(
            CheckpointError, match=r"frozen weights that are not those of the training: encoder\.1"
        ) as error:
            checkpoint.restore_model(model, {**loaded["model"], "head.weight": before + 1}, loaded["frozen"], path)
        assert str(path) in str(error.value)
        assert torch.equal(model.head.weight, before)


def test_a_part_unfrozen_later_takes_the_verified_weights(tmp_path):
    loaded = checkpoint.load(stored(tmp_path))
    checkpoint.restore_model(Net(frozen=False), loaded["model"], loaded["frozen"], "c.pth")
    with pytest.raises(CheckpointError, match=r"missing in the file: encoder\.0"):
        checkpoint.restore_model(Net(frozen=False, seed=1), loaded["model"], loaded["frozen"], "c.pth")
    everything, none = checkpoint.model_state(Net(frozen=False, seed=1))
    frozen_model = Net()
    checkpoint.restore_model(frozen_model, everything, none, "c.pth")
    assert torch.equal(frozen_model.encoder[0].weight, Net(seed=1).encoder[0].weight)


def test_mismatches_are_listed_together():
    state, frozen = checkpoint.model_state(Net())
    state["head.weight"] = torch.zeros(5, 4)
    state["extra.weight"] = torch.zeros(1)
    del state["scale"]
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore_model(Net(), state, {**frozen, "gone": "0"}, "some/file.pth")
    text = str(error.value)
    assert "some/file.pth" in text
    assert "missing in the file: scale" in text
    assert "unknown to the model: extra.weight" in text
    assert "head.weight [5, 4] in the file, [2, 4] in the model" in text
    assert "gone (absent in the model)" in text
    assert "config" in text


def test_fingerprint_depends_on_names_types_shapes_and_bytes():
    base = {"a": torch.arange(4.0), "b": torch.ones(2)}
    variants = [
        {"a": torch.arange(4.0), "c": torch.ones(2)},
        {"a": torch.arange(4.0).reshape(2, 2), "b": torch.ones(2)},
        {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.float64)},
        {"a": torch.tensor([0.0, 1.0, 2.0, np.nextafter(np.float32(3), np.float32(4))]), "b": torch.ones(2)},
    ]
    prints = {checkpoint.fingerprint(state) for state in [base, *variants]}
    assert len(prints) == 5
    assert checkpoint.fingerprint(dict(reversed(base.items()))) == checkpoint.fingerprint(base)
    assert checkpoint.fingerprint({"a": torch.arange(8.0)[::2]}) == checkpoint.fingerprint(
        {"a": torch.arange(8.0)[::2].clone()}
    )
    assert checkpoint.fingerprint(base, extra={"encoder": "x"}) not in prints
    checkpoint.fingerprint({"h": torch.ones(2, dtype=torch.bfloat16), "s": torch.tensor(1.0), "e": torch.empty(0)})


def test_plain_converts_or_refuses(tmp_path):
    node = OmegaConf.create({"run": {"lr": 0.1, "splits": ["val"], "double": "${run.lr}"}})
    given = {"n": np.float32(0.5), "i": np.int64(3), "p": Path("a/b"), "c": node, "t": (1, [True, None])}
    value = checkpoint.plain({**given, "a": np.arange(3)})
    assert value.pop("a").tolist() == [0, 1, 2]
    run = {"lr": 0.1, "splits": ["val"], "double": 0.1}
    assert value == {"n": 0.5, "i": 3, "p": "a/b", "c": {"run": run}, "t": (1, [True, None])}
    assert type(value["n"]) is float
    assert type(value["i"]) is int
    with pytest.raises(CheckpointError, match=r"checkpoint\.config\.bad\[1\] is a .*object"):
        checkpoint.save({"config": {"bad": [1, object()]}}, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
    with pytest.raises(CheckpointError, match="keys must be texts"):
        checkpoint.plain({(1, 2): 3})
    value = checkpoint.jsonable({"x": float("nan"), "y": np.float64(2), 3: torch.tensor([1, 2])})
    assert value == {"x": None, "y": 2.0, "3": [1, 2]}


def test_a_view_does_not_drag_its_storage_into_the_file(tmp_path):
    checkpoint.save({"model": {"row": torch.zeros(1000, 1000)[0]}, "frozen": {}}, tmp_path / "c.pth")
    assert (tmp_path / "c.pth").stat().st_size < 20_000


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = stored(tmp_path, progress={"epoch": 1})

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        stored(tmp_path, progress={"epoch": 2})
    assert checkpoint.load(path)["progress"]["epoch"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pth"]


def test_what_a_drive_refuses_is_no_damage(tmp_path, monkeypatch):
    path = stored(tmp_path)
    for number, remedy in ((5, "check the path, and the drive"), (13, "check the permissions"), (116, "the drive")):

        def refuse(*_, number=number, **__):
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(torch, "load", refuse)
        with pytest.raises(CheckpointError, match=f"^{path}: {os.strerror(number)}; .*{remedy}"):
            checkpoint.load(path)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def torch_bytes(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole, path: whole[: len(whole) // 2], "truncated, damaged, or no file of weights"),
        (lambda whole, path: whole[:-30], "truncated, damaged, or no file of weights"),
        (lambda whole, path: b"", "0 bytes"),
        (lambda whole, path: b"not a checkpoint at all\n" * 9, "truncated, damaged, or no file of weights"),
        (lambda whole, path: whole.replace(b"\x00\x00\x80\x3f", b"\x00\x00\x81\x3f", 1), "checksum"),
        (lambda whole, path: torch_bytes({"model": Hostile(path)}), r"refused: it contains code.*system"),
        (lambda whole, path: pickle.dumps(Hostile(path)), r"refused: it contains code.*system"),
        (lambda whole, path: torch_bytes({"metric": np.float32(1)}), r"refused: it contains code.*numpy"),
        (lambda whole, path: torch_bytes({"state_dict": {}, "epoch": 1}), "keys state_dict, epoch. Ours look like"),
        (lambda whole, path: torch_bytes([1, 2]), "holds a list"),
        (lambda whole, path: torch_bytes({"format": "neucore-checkpoint-9"}), "format neucore-checkpoint-9"),
    ],
    ids=[
        "half",
        "end cut",
        "empty",
        "text",
        "flipped bit",
        "hostile",
        "hostile pickle",
        "numpy",
        "foreign",
        "list",
        "newer",
    ],
)
def test_bad_files_are_named_and_never_run(tmp_path, content, message, recwarn):
    path, touched = stored(tmp_path), tmp_path / "touched"
    changed = content(path.read_bytes(), touched)
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(path)
    assert not recwarn.list  # our error is all that is said
    assert str(path) in str(error.value)
    assert not touched.exists()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint file .*gone\.pth"):
        checkpoint.load(tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match=r"is a folder.*holds no checkpoint_best\.pth"):
        checkpoint.load(tmp_path)
    (tmp_path / "checkpoint_best.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is a folder.*give the file"):
        checkpoint.load(tmp_path)


def test_non_finite_entries_are_named():
    state = {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")]), "whole": torch.tensor([1])}
    assert checkpoint.non_finite(state) == ["bad"]
