"""Negatives beyond the batch, and queries without a part: against loops; gradients; masks; memory; what is kept."""

import copy
import math
from functools import lru_cache

import pytest
import tiny
import torch
import torch.nn.functional as F

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models import negatives as module
from neucore_plugin.models.inputs import Projection, kept_channels, partial_rows
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.matching_loss import partial_loss, right_columns
from neucore_plugin.models.negatives import Negatives, log_sums

COUNT, IMAGES = 5, 11


class Images:
    """A training gallery of random features; its keys have gaps."""

    def __init__(self, count: int = IMAGES, cached: bool = True, width: int = 1280) -> None:
        generator = torch.Generator().manual_seed(2)
        self.keys, self.cached = 2 * torch.arange(count) + 1, cached
        self._features = {
            "pooled": torch.randn(count, width, generator=generator, dtype=torch.float64),
            "tokens": torch.randn(count, 4, width, generator=generator, dtype=torch.float64),
        }

    def features(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        return self._features[name][rows]


@lru_cache
def _built(kind: str, negatives: str | int, mode: str, masked: bool, references: bool):
    dropout = {"image": 0.4, "text": 0.4, "mode": mode, "weight": 0.3}
    rules = {"negatives": negatives, "mask_duplicates": masked, "reference_negatives": references}
    return tiny.build(kind, query_dropout=dropout, matching=rules).double().train()


def build(kind: str, negatives: str | int = "gallery", mode: str = "extra", masked=True, references=True, images=None):
    model = copy.deepcopy(_built(kind, negatives, mode, masked, references))
    if mode == "replace":
        model.query_dropout = {"image": 0.0, "text": 0.0}
    if negatives != "batch":
        model.use_gallery(images or Images(), 7)
    return model


def pairs(images: Images, count: int = COUNT) -> dict:
    """Of the gallery's images; one target comes twice, one query has a second right answer, in the gallery alone."""
    reference, target = torch.arange(count), torch.tensor([5, 6, 6, 7, 8][:count])
    keys = images.keys.tolist()
    sides = {"reference": reference, "target": target}
    kinds = ("pooled", "tokens")
    found = {f"{side}_{kind}": images.features(rows, kind) for side, rows in sides.items() for kind in kinds}
    right = [(keys[row],) for row in target.tolist()]
    right[0] += (keys[10],)
    return {
        **found,
        "text_input": ["make it blue", "square", "square", "long and red", "blue"][:count],
        "concept_words": [("blue",), ("square",), ("square",), ("long", "red"), ("blue",)][:count],
        "reference_key": images.keys[reference],
        "target_key": images.keys[target],
        "right_keys": right,
        "text_keys": [(*answers, keys[9]) for answers in right],
        "reference_keys": [(*answers, keys[4], keys[10]) for answers in right],
        # rows 0 and 3 lose their image, 1 and 4 their text
        "noise": torch.tensor([int(draw * 2**23) << 38 for draw in (0.1, 0.5, 0.95, 0.2, 0.7)][:count]),
        "epoch": 2,
        "num_iters_per_epoch": 4,
        "iters": 1,
    }


def looped(model, samples: dict, images: Images, chosen: list[int], masked: bool, references: bool) -> dict[str, float]:
    """The losses in plain loops over scores; every image as a negative once, those of the batch as often as shown."""
    keys, factor = images.keys.tolist(), float(model.matching.factor())
    shown = samples["target_key"].tolist() + (samples["reference_key"].tolist() if references else [])
    columns = shown + [keys[row] for row in chosen if keys[row] not in shown]
    rows = torch.tensor([keys.index(key) for key in columns])
    encoded = model.encode_image(tokens=images.features(rows, "tokens"), pooled=images.features(rows, "pooled"))

    def logits(place: int, image: bool = True, text: bool = True) -> list[float]:
        given = {"tokens": samples["reference_tokens"][place : place + 1]} if image else {}
        given |= {"pooled": samples["reference_pooled"][place : place + 1]} if image else {}
        words = {"concept_words": samples["concept_words"][place : place + 1]} if text else {}
        query = model.encode_query(texts=samples["text_input"][place : place + 1] if text else None, **given, **words)
        return [factor * value for value in model.score(query, encoded)[0].tolist()]

    total = partial = 0.0
    rows, no_image = (part.tolist() for part in partial_rows(model.query_dropout, samples["noise"]))
    for place in range(COUNT):
        found, right = logits(place), samples["right_keys"][place]
        counted = [v for c, v in enumerate(found) if c == place or not masked or columns[c] not in right]
        total += (math.log(sum(map(math.exp, counted))) - found[place]) / COUNT
        if place in rows:
            lost = no_image[rows.index(place)]
            found, right = logits(place, not lost, lost), samples["text_keys" if lost else "reference_keys"][place]
            hits = sum(math.exp(v) for c, v in enumerate(found) if columns[c] in right)
            partial += 0.3 * (math.log(sum(map(math.exp, found))) - math.log(hits)) / COUNT
    return {"loss_matching": total, "loss_partial": partial}


@pytest.mark.parametrize(("kind", "block"), [("artemis", module.BLOCK), ("artemis", 3), ("clauses", 3)])
@pytest.mark.parametrize(
    ("masked", "references", "wanted"), [(True, True, "gallery"), (False, False, "gallery"), (True, False, 4)]
)
def test_equals_loops(monkeypatch, masked, references, wanted, kind, block):
    """Cheap gallery vectors, with queries that lack a part; in one block and in several."""
    monkeypatch.setattr(module, "BLOCK", block)
    images = Images()
    model, samples = build(kind, wanted, masked=masked, references=references, images=images), pairs(images)
    found = model(samples)
    chosen = model.batch_loss.negatives._rows.tolist()
    assert len(chosen) == (IMAGES if wanted == "gallery" else 4)
    expected = looped(model, samples, images, chosen, masked, references)
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)
    whole = sum(expected.values()) + (found["loss_concept"].item() if kind == "clauses" else 0.0)
    assert found["loss"].item() == pytest.approx(whole, rel=1e-6)


def test_the_whole_queries_do_not_feel_the_others():
    """Their loss is to the bit that without; gallery and temperature learn from whole queries alone."""
    images = Images()
    samples, found = pairs(images), {}
    for mode in ("replace", "extra"):
        model = build("artemis", mode=mode, images=images)
        out = model(samples)
        out["loss_matching" if mode == "replace" else "loss"].backward()
        found[mode] = out["loss_matching"].item(), model.matching.temperature.grad
    assert found["extra"][0] == found["replace"][0]
    assert torch.equal(found["extra"][1], found["replace"][1])


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind not in ("neucore", "artemis")])
def test_every_method_takes_part(kind):
    """Those that read one half of a query as well, for which one of the further queries is a whole one."""
    images = Images()
    found = build(kind, images=images)(pairs(images))
    assert found["loss"].item() == pytest.approx(sum(v.item() for name, v in found.items() if name != "loss"))
    assert found["loss_partial"].item() > 0


def test_stand_ins_learn_from_the_partial_queries_alone():
    images = Images()
    for mode, learns in (("extra", True), ("replace", False)):
        model = build("artemis", mode=mode, images=images)
        model(pairs(images))["loss"].backward()
        for value in (model.absent_image, model.absent_sentence):
            assert (value.grad is not None and bool(value.grad.abs().max() > 0)) == learns


@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients(blocks):
    """Through encodings made anew, over one block and over several, which are computed twice."""
    matching = Matching(dim=4, terms=["fused"], temperature=0.5, learn_temperature=True, released=False).double()
    shapes = (3, 4), (2, 4), (2, 4)
    weight, query, partial = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    features, keys = torch.randn(6, 3, dtype=torch.float64), torch.arange(6)

    def sums(weight, query, partial, temperature):
        def block(rows):
            return keys[rows], lambda: {"fg": features[rows] @ weight}

        parts = (block(rows) for rows in torch.arange(6).chunk(blocks))
        asked = ({"fused": query}, [(1,), ()]), ({"fused": partial}, [(0, 2, 4), (1, 3, 5)])
        return log_sums(matching.score, temperature.exp(), parts, *asked)

    temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: sums(*x)[0], (weight, query, partial, temperature))
    wrong, every, right = sums(weight, query, partial, temperature)
    assert wrong.shape == (2, blocks) and every.shape == right.shape == (2, blocks)
    (every.sum() - right.sum()).backward()
    assert partial.grad.abs().max() > 0 and weight.grad is None and temperature.grad is None  # the gallery is spared


def held_bytes(images: int) -> int:
    """Bytes that autograd holds between the two passes of a step against so many images, weights left out."""
    gallery, held = Images(images), {}
    model, samples = build("sum", images=gallery), pairs(Images())
    owned = {value.untyped_storage().data_ptr() for value in model.parameters()}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(samples)
    return sum(size for place, size in held.items() if place not in owned)


def test_memory_does_not_grow_with_the_gallery(monkeypatch):
    """Of each further block the log-sum-exps alone are held, a few bytes; 20 images are 20 times 10 KB of features."""
    monkeypatch.setattr(module, "BLOCK", 20)
    few, many = held_bytes(60), held_bytes(200)
    assert many - few < 7 * 20 * COUNT * 8  # seven blocks more, less than their scores alone


def test_right_columns_are_those_of_a_loop():
    keys, right = torch.tensor([7, 3, 7, 9, 1]), [(7,), (), (1, 9, 100), (3, 3)]
    wanted = [[key in answers for key in keys.tolist()] for answers in right]
    assert right_columns(keys, right).tolist() == wanted
    assert right_columns(keys[:0], right).shape == (4, 0)


def test_partial_loss_in_closed_form():
    """All scores equal: the share of right answers; also where some of them stand beyond the columns."""
    scores, right = torch.zeros(1, 4), torch.tensor([[True, False, True, False]])
    assert partial_loss(scores, torch.tensor(3.0), right).item() == pytest.approx(math.log(2))
    beyond = torch.log(torch.tensor([[6.0]])), torch.log(torch.tensor([[3.0]]))
    assert partial_loss(scores, torch.tensor(3.0), right, *beyond).item() == pytest.approx(math.log(10 / 5))


# ---- encodings that are kept ----------------------------------------------------------------------------------------


def kept(count: int, wanted: int | None = None, cached: bool = True) -> Negatives:
    images = Images(count, cached)
    return Negatives(images, wanted, 3, lambda rows, noise: {"fg": images.features(rows, "pooled")[:, :2]}, cheap=False)


def alone(rows: dict) -> dict:
    return rows


def test_kept_encodings_are_those_of_the_last_time():
    negatives = kept(10)
    assert not list(negatives.blocks(torch.tensor([]), 0))  # nothing was seen yet
    negatives.keep(torch.tensor([3, 7, 4, 3]), {"fg": torch.tensor([[1.0], [2], [9], [3]])}, torch.tensor([5, 0, 0, 4]))
    ((keys, encode),) = negatives.blocks(torch.tensor([7]), 0)
    assert keys.tolist() == [3] and encode()["fg"].tolist() == [[1.0]]  # 4 is none of them, 7 is in the batch
    shuffled = kept(10)
    shuffled.keep(torch.tensor([3, 3, 7]), {"fg": torch.tensor([[3.0], [1], [2]])}, torch.tensor([4, 5, 0]))
    ((_, again),) = shuffled.blocks(torch.tensor([7]), 0)
    assert again()["fg"].tolist() == [[1.0]]  # whatever the order of the rows


def test_a_part_is_renewed_each_step_one_after_the_other():
    negatives, seen = kept(10), []
    for iteration in range(4):
        negatives.refresh(iteration, 3, alone)
        seen.append(int(negatives._filled.sum()))
    assert seen == [3, 6, 9, 10]
    ((keys, encode),) = negatives.blocks(torch.tensor([]), 4)
    assert keys.tolist() == negatives.gallery.keys.tolist()
    torch.testing.assert_close(
        encode()["fg"].double(), negatives.gallery.features(torch.arange(10), "pooled")[:, :2], rtol=1e-6, atol=1e-6
    )
    uncached = kept(10, cached=False)
    uncached.refresh(0, 3, alone)
    assert not uncached._filled.any()  # pictures are not read a second time


def test_so_many_images_are_drawn_anew_each_epoch():
    negatives, other, drawn = kept(10, 4), kept(10, 4), []
    for epoch in (0, 1, 2):
        negatives.begin(epoch, 10 * epoch)
        negatives.refresh(0, 4, alone)
        drawn.append(negatives._rows.tolist())
    assert all(rows == sorted(set(rows)) and len(rows) == 4 for rows in drawn) and drawn[0] != drawn[1]
    other.begin(2, 3)
    assert other._rows.tolist() == drawn[2]  # of the seed and the epoch alone
    stay = sorted(set(drawn[1]) & set(drawn[2]))
    fresh = kept(10, 4)
    fresh.begin(1, 0)
    fresh.refresh(0, 4, alone)
    fresh.begin(2, 0)
    assert fresh._rows[fresh._filled].tolist() == stay  # what was known stays, with its encoding
    blocks = [(keys, encode()["fg"]) for keys, encode in fresh.blocks(torch.tensor([]), 0)]
    for keys, values in blocks:
        rows = (keys - 1) // 2
        torch.testing.assert_close(values.double(), fresh.gallery.features(rows, "pooled")[:, :2], rtol=1e-6, atol=1e-6)
    assert kept(3, 9).wanted is None  # more than there are: all


def test_where_nothing_is_kept_they_are_drawn_each_step():
    images = Images()
    model, samples, drawn = build("sum", 4, images=images), pairs(images), []
    for number in (0, 1, 1):
        model({**samples, "iters": number})
        drawn.append(model.batch_loss.negatives._rows.tolist())
    assert drawn[0] != drawn[1] == drawn[2] and model.training_state() is None


def test_state_goes_into_a_checkpoint_and_back():
    one, other = kept(10, 6), kept(10, 6)
    one.begin(1, 0)
    one.refresh(2, 3, alone)
    state = copy.deepcopy(one.state_dict())
    other.load_state_dict(state, torch.device("cpu"))
    for negatives in (one, other):
        negatives.begin(1, 3)
        negatives.refresh(3, 3, alone)
    (keys, encode), (again, same) = next(one.blocks(keys_of := torch.tensor([]), 4)), next(other.blocks(keys_of, 4))
    assert torch.equal(keys, again) and torch.equal(encode()["fg"], same()["fg"])
    assert build("artemis").training_state() is None  # computed anew each step: nothing is to be kept


def test_neucore_keeps_what_it_saw():
    """The batch, and without gradient what was renewed and seen: here the two images that the batch does not show."""
    images = Images()
    model, samples = build("neucore", images=images, mode="replace"), pairs(images)
    batch = build("neucore", "batch", mode="replace")(samples)["loss_matching"].item()
    none, first, second = (model({**samples, "iters": number})["loss_matching"] for number in (1, 0, 1))
    assert batch == pytest.approx(none.item()) and batch < first.item() == pytest.approx(second.item())
    second.backward()
    state = model.training_state()
    assert set(state["kept"]) == {"fg", "bg"} and not any(value.requires_grad for value in state["kept"].values())


# ---- dropout of features --------------------------------------------------------------------------------------------


def test_dropout_of_features_follows_from_each_samples_noise():
    noise = torch.tensor([5, 6, 2**61 + 7])
    whole = kept_channels(500, 0.25, noise, 0)
    assert whole.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert whole.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(kept_channels(500, 0.25, noise[1:2], 0), whole[1:2])  # whatever the batch-mates
    assert torch.equal(kept_channels(300, 0.25, noise, 0), whole[:, :300])


def test_dropout_of_features_is_independent_in_rows_slots_and_channels():
    """Shares, and how often two of them lose the same: of 0.3 each 0.09, within five standard deviations."""
    noise = torch.cat([torch.arange(64), torch.randint(2**62, (64,)), 2**61 + torch.arange(64)])
    lost = torch.stack([kept_channels(512, 0.3, noise, slot).eq(0) for slot in range(8)]).float()  # [8,192,512]
    assert lost.mean().item() == pytest.approx(0.3, abs=5 * (0.21 / lost.numel()) ** 0.5)
    for axis in range(3):
        assert lost.mean(axis).sub(0.3).abs().max() < 6 * (0.21 / lost.shape[axis]) ** 0.5
        for shift in (1, 2, 3):
            both = (lost * lost.roll(shift, axis)).mean().item()
            assert both == pytest.approx(0.09, abs=5 * (0.09 * 0.91 / lost.numel()) ** 0.5), (axis, shift)
    assert kept_channels(7, 0.0, noise, 3).eq(1).all() and kept_channels(0, 0.5, noise, 0).shape == (192, 0)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_projection_is_its_parts_one_after_the_other(rows):
    """LayerNorm, dropout of channels, linear; a row of what is kept each, or one for all; with gradient in all."""
    made = Projection(torch.nn.LayerNorm(6), torch.nn.Linear(6, 4)).double()
    for part in made.parameters():
        torch.nn.init.normal_(part)
    for shape in ((3, 6), (3, 5, 6)):
        x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        kept = kept_channels(6, 0.5, torch.arange(rows), 1)
        found, wanted = made(x, kept.double()), []
        for row in range(3):
            scale = kept[row if rows == 3 else 0].double()
            wanted.append(made[1](made[0](x[row]) * scale))
        torch.testing.assert_close(found, torch.stack(wanted))
        weights, given = torch.randn_like(found), (x, *made.parameters())
        mine, true = (torch.autograd.grad((y * weights).sum(), given) for y in (found, torch.stack(wanted)))
        for one, other in zip(mine, true, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(made(x), made[1](made[0](x)))


def test_channels_are_lost_in_all_tokens_of_an_image():
    model = build("clauses", "batch", mode="replace").float()
    model.feature_dropout = 0.5
    tokens, noise = torch.randn(2, 4, 1280), torch.tensor([3, 4])
    model.image_projection[1].register_forward_pre_hook(lambda *_: pytest.fail("the product is one with the dropout"))
    with torch.no_grad():
        found = model.image_features(["tokens"], None, tokens=tokens, noise=noise)["tokens"]
        norm, linear = model.image_projection
        kept = kept_channels(1280, 0.5, noise, 0)[:, None]
        wanted = F.linear(norm(tokens) * kept, linear.weight, linear.bias)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_dropout_of_features_acts_in_training_alone_cached_or_not():
    model = build("sum", "batch", mode="replace").float()
    model.feature_dropout = 0.5
    pixels, noise = torch.rand(2, 3, 64, 64), torch.tensor([3, 4])
    with torch.no_grad():
        features = model.backbone.image(pixels)
        live = model.image_features(["pooled"], pixels, noise=noise)["pooled"]
        cached = model.image_features(["pooled"], None, pooled=features["pooled"], noise=noise)["pooled"]
        whole = model.image_features(["pooled"], pixels)["pooled"]
        model.eval()
        still = model.image_features(["pooled"], pixels, noise=noise)["pooled"]
    torch.testing.assert_close(live, cached)
    assert torch.equal(whole, still) and not torch.allclose(live, whole)


def test_without_a_training_gallery_a_step_is_refused():
    model = build("sum")
    model.batch_loss.negatives = None
    with pytest.raises(ConfigError, match="negatives is gallery, but the model knows no training images.*use_gallery"):
        model(pairs(Images()))


def test_the_loss_of_a_gallery_is_that_of_all_columns_at_once():
    """A block's log-sum-exp in the place of its columns."""
    scores, beyond = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    model = build("sum", "batch", mode="replace")
    further = beyond.logsumexp(1, keepdim=True)
    found = model.matching_loss(scores, torch.tensor(1.0), torch.arange(3), [(0,), (1,), (2,)], further)
    assert found.item() == pytest.approx(F.cross_entropy(torch.cat([scores, beyond], 1), torch.arange(3)).item())
