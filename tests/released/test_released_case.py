"""The released code's numbers: every quantity of a golden case, made elsewhere with random weights in float64.

The case is no part of the project: NEUCORE_RELEASED_CASE names its .npz file, otherwise it is looked up at
`../shared/data/official/cirr_small.npz` beside the checkout. `released_case.py` does the comparing.
A case of other settings (S 5, depth 3, T 2, pictures through a ResNet) is made here by plain loops.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import released_case
import released_reference as slow
import released_weights
import torch
from places import REAL
from reference import contrastive_loss, focal_loss
from torchvision import models as zoo

DEFAULT = REAL / "official" / "cirr_small.npz"


@pytest.fixture(scope="module")
def path() -> Path:
    path = Path(os.environ.get("NEUCORE_RELEASED_CASE") or DEFAULT)
    if not path.is_file():
        pytest.skip(f"the released code's golden case is not here: {path} (NEUCORE_RELEASED_CASE names another place)")
    return path


@pytest.fixture(scope="module")
def case(path: Path) -> released_case.Case:
    return released_case.run(path)


@pytest.mark.parametrize("part", ["out/main/", "out/edge/", "out/infer/", "out/gumbel", "out32/", "grad/", "adamw/"])
def test_every_recorded_quantity(case: released_case.Case, part: str) -> None:
    recorded = {key for key in case.values if key.startswith(part)} if part.startswith("out") else set()
    found = {key for key in case.found if key.startswith(part)}
    assert found and recorded <= found | set(case.skipped)
    assert not [f"{key}: {case.found[key]}" for key in found if not case.found[key][0] <= released_case.TOLERANCE]


def test_what_is_not_compared_has_a_reason(case: released_case.Case) -> None:
    assert not [name for name, reason in case.skipped.items() if reason == "not known here"]


def test_the_model_as_users_call_it(case: released_case.Case) -> None:
    for name in ("encode_query, encode_image, score", "forward"):
        assert case.found[name][0] <= released_case.TOLERANCE


@pytest.mark.parametrize(
    ("name", "spoiled"),
    [
        ("w/noun_encoder.bias", ("out/main/cls_logits", "grad/noun_encoder.weight")),
        ("out/main/scores", ("out/main/scores",)),
        ("grad/norm", ("grad/Transform_m.0.bias",)),
        ("out/infer/infer_scores_single", ("out/infer/infer_scores_single", "encode_query, encode_image, score")),
    ],
)
def test_a_difference_is_found(path: Path, tmp_path: Path, name: str, spoiled: tuple[str, ...], capsys) -> None:
    """One array changed by a thousandth of its size: the comparison fails, and says where."""
    with np.load(path) as arrays:
        values = {key: arrays[key] for key in arrays.files}
    values[name] = values[name] * 1.001 if name != "w/noun_encoder.bias" else values[name] + np.float16(0.01)
    np.savez(tmp_path / "case.npz", **values)
    shutil.copy(path.with_suffix(".json"), tmp_path / "case.json")
    assert released_case.main([str(tmp_path / "case.npz")]) == 1
    lines = capsys.readouterr().out.splitlines()
    for key in spoiled:
        assert any(line.startswith(key) and line.endswith("<- above") for line in lines), key


def test_a_case_needs_both_files(tmp_path: Path, capsys) -> None:
    assert released_case.main([str(tmp_path / "none.npz")]) == 2
    assert "CASE.json must lie side by side" in capsys.readouterr().err


OPT = {**released_weights.OPT, "data_name": "fashionIQ", "concept_depth": 1, "temperature": 1.3, "lr": 5e-4}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("case"))


def make(folder: Path, height: int = 64, width: int = 64, extra: int = 1) -> Path:
    """A case of two queries with pictures, its numbers by loops; the CNN's maps are torchvision's.

    extra: images of the gallery that are neither reference nor target.
    """
    random = np.random.default_rng(2)
    w = released_weights.weights(seed=3, width=512, depth=1)
    w["img_enc.proj.weight"] /= 20
    torch.manual_seed(5)
    net = zoo.resnet18(weights=None).double().eval()
    places = {name: place for place, (name, _) in enumerate(net.named_children())}
    for name, value in net.state_dict().items():
        head, rest = name.split(".", 1)
        if head != "fc":
            w[f"img_enc.cnn.module.{places[head]}.{rest}"] = value.numpy()
    pictures = random.normal(size=(4 + extra, 3, height, width))
    with torch.no_grad():
        maps = torch.nn.Sequential(*list(net.children())[:-2])(torch.from_numpy(pictures)).numpy()
    txt, lengths = np.array([[1, 5, 9, 6, 3], [1, 7, 3, 0, 0]]), np.array([5, 3])
    nouns, counts, classes = np.array([[5, 4, 6], [8, 0, 0]]), np.array([3, 1]), np.array([5, 8, 10])
    labels = np.array([[1, 0, 0], [0, 1, 0]])
    encoded, out, matrix, single = slow.images(w, maps, OPT), {}, [], []
    for row in range(2):
        sentence, words = slow.text(w, txt[row, : lengths[row]])
        _, tokens, fg, bg = encoded[row]
        ids = nouns[row, : counts[row]]
        fused, alone = (slow.fuse(w, sentence, words, tokens, fg, ids, k, OPT) for k in (3, counts[row]))
        matrix.append([slow.score(w, sentence, fused, bg, t[2], t[3]) for t in encoded[2:4]])
        single.append([slow.score(w, sentence, alone, bg, t[2], t[3]) for t in encoded])
        out.setdefault("hat_t", []).append(fused)
        out.setdefault("m", []).append(sentence)
        out.setdefault("cls_logits", []).append(slow.concept_logits(w, encoded[row], encoded[row + 2], classes, OPT))
    out["r_token"], out["t_fg"] = [e[1] for e in encoded[:2]], [e[2] for e in encoded[2:4]]
    out["scores"], out["matching_loss"] = matrix, contrastive_loss(matrix, 1.3)
    out["mil_loss"] = 200 * focal_loss(out["cls_logits"], labels, 0.5, 1.0)
    out["loss"] = out["matching_loss"] + out["mil_loss"]
    values = {f"out/main/{name}": np.array(value) for name, value in out.items()}
    values |= {f"w/{name}": value for name, value in w.items()} | {"out/infer/infer_scores_single": np.array(single)}
    given = {"txt": txt, "txt_len": lengths, "nouns": nouns, "nouns_len": counts, "mil_labels": labels.astype("f4")}
    given |= {"img_src": pictures[:2], "img_trg": pictures[2:4]}
    values |= {f"in/main/{name}": value for name, value in given.items()}
    values |= {"in/all_nouns_token": classes} | ({"in/extra_gallery": pictures[4:]} if extra else {})
    np.savez(folder / "made.npz", **values)
    (folder / "made.json").write_text(json.dumps({"opt": OPT}))
    return folder / "made.npz"


def test_a_case_of_other_settings(made: Path, capsys) -> None:
    assert released_case.main([str(made)]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    for name in ("out/main/loss", "out/main/hat_t", "out/infer/infer_scores_single", "encode_query", "forward"):
        assert f"\n{name}" in printed
    assert "not compared" not in printed


def test_pictures_that_are_not_square_and_no_further_gallery(tmp_path: Path, capsys) -> None:
    assert released_case.main([str(make(tmp_path, 64, 96, extra=0))]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    for name in ("out/main/loss", "out/main/r_token", "out/infer/infer_scores_single", "encode_query", "forward"):
        assert f"\n{name}" in printed


@pytest.mark.parametrize("name", ["out/main/novel", "out/novel", "out32/gumbel3/novel", "grad/novel", "novel/x"])
def test_a_quantity_that_is_not_known_here_is_no_success(made: Path, tmp_path: Path, capsys, name: str) -> None:
    with np.load(made) as arrays:
        values = {key: arrays[key] for key in arrays.files}
    np.savez(tmp_path / "case.npz", **values, **{name: np.ones(3)})
    shutil.copy(made.with_suffix(".json"), tmp_path / "case.json")
    assert released_case.main([str(tmp_path / "case.npz")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"not compared: {name} (not known here)" in lines and lines[-1] == "1 not known here"


def test_batch_statistics_of_the_cnn_are_recognised(made: Path) -> None:
    """A case recorded with batch norm by the batch is met as such, with its gradients."""
    case = released_case.Case(made)
    by_batch = released_case.set_batch_norm(case.model, True)
    tokens = released_case.image_tokens(by_batch, released_case.inputs(case, "main", by_batch)["img_src"])
    out = released_case.everything(by_batch, case, "main")
    out["loss"].backward()
    name = "img_enc.cnn.module.0.weight"
    gradient = by_batch.backbone.image.network.conv1.weight.grad.reshape(-1).numpy()
    drawn = gradient[np.random.RandomState(5).randint(0, gradient.size, 4)]
    for key in recorded_here(case):
        case.values[f"out/main/{key}"] = out[key].detach().numpy()
    case.values["out/main/img_tokens_r"] = tokens.detach().numpy()
    case.values |= {
        "grad/keys": np.array([name]),
        "grad/norm": np.array([np.linalg.norm(gradient)]),
        "grad/sample4": drawn[None],
    }
    released_case.set_batch_norm(case.model.requires_grad_(True), False).zero_grad()
    released_case.check_forward(case, "main")
    released_case.check_gradients(case)
    assert not released_case.failures(case)
    assert case.found["out/main/loss"][1] == case.found[f"grad/{name}"][1] == "batch norm by the batch"


def recorded_here(case: released_case.Case) -> list[str]:
    return released_case.recorded(case, "out/main/")
