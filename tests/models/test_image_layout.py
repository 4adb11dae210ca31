"""What a pooled vector is told of the places of an image: against loops and numpy; in a model; bad settings."""

import numpy as np
import pytest
import tiny
import torch
from batch_case import Images, beyond, beyond_pairs

from neucore_plugin import launch
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.loading import model_defaults
from neucore_plugin.models.inputs import kept_channels
from neucore_plugin.models.layout import Layout
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.weights import checkpoint

WIDTH, COUNT = 12, 5


def layout(grid: tuple[int, int] = (2, 2), components: int = 3) -> Layout:
    torch.manual_seed(1)
    made = Layout(width=WIDTH, grid=grid, components=components, dim=4).double()
    torch.nn.init.normal_(made.linear.weight)
    return made


def cells_by_hand(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """tokens [G,N,Di] -> [G,P,Di]: the mean of each part of the map, as torch parts it, then without mean and size."""
    rows, columns = grid
    found = []
    for image in tokens[:, -rows * columns :].reshape(len(tokens), rows, columns, -1):
        high, wide = min(rows, 4), min(columns, 4)
        for r in range(high):
            for c in range(wide):
                part = image[
                    r * rows // high : -(-(r + 1) * rows // high), c * columns // wide : -(-(c + 1) * columns // wide)
                ]
                mean = part.reshape(-1, part.shape[-1]).mean(0)
                found.append((mean - mean.mean()) / np.sqrt(mean.var() + 1e-5))
    return np.stack(found).reshape(len(tokens), -1, tokens.shape[-1])


@pytest.mark.parametrize(("grid", "extra"), [((2, 2), 0), ((2, 3), 1), ((6, 5), 1), ((7, 3), 0)])
def test_components_are_the_leading_ones_of_the_cells(grid, extra):
    """By numpy's singular values of centred cells; tokens beyond the map have no place."""
    made, tokens = layout(grid), tiny.rand(COUNT, grid[0] * grid[1] + extra, WIDTH)
    made.fit(made.cells_of(tokens))
    cells = cells_by_hand(tokens.numpy(), grid)
    flat = cells.reshape(-1, WIDTH)
    _, _, vectors = np.linalg.svd(flat - flat.mean(0))
    expected = (cells - flat.mean(0)) @ vectors[:3].T
    expected /= np.sqrt((expected**2).mean())
    found = made.reduced(tokens).detach().numpy().reshape(expected.shape)
    signs = np.sign((found * expected).sum((0, 1)))
    np.testing.assert_allclose(found, expected * signs, atol=1e-9)
    assert bool(made.settled)
    torch.testing.assert_close(
        made(made.reduced(tokens)), torch.from_numpy(found.reshape(COUNT, -1)) @ made.linear.weight.T
    )


def test_the_same_directions_whatever_the_sign():
    first, second, tokens = layout(), layout(), tiny.rand(COUNT, 4, WIDTH)
    first.fit(first.cells_of(tokens))
    second.fit(second.cells_of(tokens).flip(0))
    torch.testing.assert_close(first.components, second.components)
    assert bool((first.components.gather(1, first.components.abs().argmax(1, keepdim=True)) > 0).all())


def test_a_component_is_lost_in_all_places():
    made, tokens = layout(), tiny.rand(COUNT, 4, WIDTH)
    kept = kept_channels(3, 0.5, torch.arange(COUNT), slot=2).double()
    assert 0 < (kept == 0).sum() < kept.numel()
    z = made.reduced(tokens).view(COUNT, 4, 3)
    by_hand = torch.stack([torch.cat([place * kept[row] for place in image]) for row, image in enumerate(z)])
    torch.testing.assert_close(made(made.reduced(tokens), kept), by_hand @ made.linear.weight.T)
    for one in kept:  # the same for all images
        by_hand = torch.stack([torch.cat([place * one for place in image]) for image in z])
        torch.testing.assert_close(made(made.reduced(tokens), one[None]), by_hand @ made.linear.weight.T)


def test_at_first_it_changes_nothing():
    """W is zero: a model begins as the one without."""
    torch.manual_seed(0)
    made = Layout(width=WIDTH, grid=(2, 2), components=3, dim=4)
    assert not made.linear.weight.any() and not made(made.reduced(torch.randn(2, 4, WIDTH))).any()


@pytest.mark.parametrize("first", ["cached", "not cached", "a stream"])
def test_directions_are_settled_once_for_all(first, caplog):
    """What is trained relies on them, also in a later training that begins from its checkpoint."""
    model, images = tiny.build("clauses").double(), Images()
    images.cached, before = first == "cached", model.layout.components.clone()
    model.fit_layout(None if first == "a stream" else images)
    settled = model.layout.components.clone()
    assert torch.equal(settled, before) == (first != "cached")
    assert ("random directions are taken" in caplog.text) == (first != "cached")
    images.cached, images._tokens = True, images._tokens.flip(2)
    model.fit_layout(images)
    assert torch.equal(model.layout.components, settled)


def test_checkpoints_keep_the_directions(tmp_path):
    model = tiny.build("clauses")
    model.layout.fit(torch.randn(6, 4, 1280))
    again = type(model).from_checkpoint(tiny.save(model, tmp_path / "model.pth"))
    for name in ("components", "offset", "settled"):
        assert torch.equal(getattr(again.layout, name), getattr(model.layout, name))


def test_negatives_are_as_any_gallery_image():
    """From features that are reduced once, or read anew; with the step's dropout, and without."""
    model, images = beyond("clauses"), Images()
    model.layout_dropout = 0.4
    model.fit_layout(images)
    torch.nn.init.normal_(model.layout.linear.weight, std=0.1)
    rows, noise = torch.tensor([3, 11, 4]), torch.tensor([5])
    features = {name: images.features(rows, name) for name in ("tokens", "pooled")}
    encode = model.batch_loss.negatives.encode
    for training in (True, False):
        model.train(training)
        read = model.image_features(["pooled"], None, **features, noise=noise)["pooled"]
        torch.testing.assert_close(encode(rows, noise)["fg"], model.represent(read)["fg"])
    torch.testing.assert_close(encode(rows, noise)["fg"], model.encode_image(**features)["fg"])
    model.layout.linear.weight.data.zero_()
    assert not torch.allclose(encode(rows, noise)["fg"], model.represent(read)["fg"])


def consistent(images: Images, count: int = 8) -> dict:
    """A batch whose features are those of its keys."""
    found = beyond_pairs(count)
    for side in ("reference", "target"):
        for name in ("tokens", "pooled"):
            found[f"{side}_{name}"] = images.features(found[f"{side}_key"], name)
    return found


@pytest.mark.parametrize("stranger", [False, True])
def test_what_is_kept_of_an_image_is_what_would_be_read(stranger):
    """Of a batch with an image that is none of the training all are read."""
    model, images = beyond("clauses").train(), Images()
    model.layout_dropout = 0.4
    model.fit_layout(images)
    torch.nn.init.normal_(model.layout.linear.weight, std=0.1)
    batch = consistent(images)
    if stranger:
        batch["reference_key"] = batch["reference_key"] + 100
    reduced, read = model.layout.reduced, []
    model.layout.reduced = lambda tokens: read.append(len(tokens)) or reduced(tokens)
    kept = model.read_pairs(batch, negatives=True)
    assert read == ([8, 8] if stranger else [14])  # all images of the training, once
    model._layouts = None
    anew = model.read_pairs(batch, negatives=True)
    for one, other in ((kept.reference, anew.reference), (kept.target, anew.target)):
        torch.testing.assert_close(one["pooled"], other["pooled"])
    torch.testing.assert_close(kept.negative, anew.negative)


@pytest.mark.parametrize("cached", [True, False])
def test_a_training_settles_them(tiny_config, cached):
    def change(config: dict) -> None:
        config["model"]["layout"] = {"components": 3, "dropout": 0.2}
        config["run"] |= {"max_epoch": 1, "cache_features": cached, "valid_splits": [], "test_splits": ["val"]}

    path = tiny_config(change)
    launch.run(path)
    (last,) = path.parent.glob("output/*/checkpoint_last.pth")
    stored = checkpoint.load(last)["model"]
    signs = stored["layout.components"].abs()
    assert bool(stored["layout.settled"]) and (signs.std() < 1e-6) == (not cached)
    assert stored["layout.linear.weight"].abs().sum() > 0


def test_training_reaches_it():
    model = beyond("clauses").train()
    model.fit_layout(Images())
    model(beyond_pairs(8))["loss"].backward()
    assert model.layout.linear.weight.grad.abs().sum() > 0


def test_cached_features_must_be_whole():
    model = tiny.build("clauses")
    with pytest.raises(ValueError, match="as pixels, or its cached pooled and tokens"):
        model.encode_image(pooled=torch.randn(2, 1280))


def test_baselines_have_none_unless_asked():
    plain, asked = tiny.build("tirg"), tiny.build("tirg", layout={"components": 2})
    assert plain.layout is None and plain.image_reads == ("pooled",)
    assert asked.layout.count == 2 and set(asked.image_reads) == {"tokens", "pooled"}
    assert tiny.build("clauses").layout is not None and tiny.build("clauses", layout={"components": 0}).layout is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"model_type": "embedded_paper", "layout": {"components": 4}},
            r"layout\.components: got 4; model\.form default",
        ),
        ({"layout": {"components": -1}}, r"layout\.components: got -1"),
        ({"layout": {"dropout": 1.0}}, r"layout\.dropout: got 1\.0"),
        ({"layout": {"channels": 4}}, r"layout\.channels"),
        ({"layout": 4}, r"model\.layout: got 4"),
        ({"arch": "cir_baseline", "method": "average", "layout": {"components": 4}}, r"average trains nothing"),
    ],
)
def test_bad_settings(section, message):
    with pytest.raises(ConfigError, match=message):
        model_defaults({"arch": "neucore", **section})


def test_encoders_that_do_not_fit():
    """Of narrow tokens as many as there can be, of tokens without a place none."""
    with pytest.raises(ValueError, match=f"13 components of tokens that are {WIDTH} wide"):
        Layout(width=WIDTH, grid=(2, 2), components=13, dim=4)
    assert tiny.build("clauses", layout={"components": 5000}).layout.count == 1280
    backbone = tiny.build("clauses").backbone
    backbone.image.grid = None
    section = model_defaults({**tiny.CLAUSES, "layout": {"components": 3}})
    assert NeucoreModel.from_section(backbone, ConceptVocabulary(tiny.WORDS), section).layout is None
