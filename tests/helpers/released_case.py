"""The released code's numbers against this package: python tests/helpers/released_case.py CASE.npz

A case is made elsewhere by running the released code with random weights: CASE.npz holds w/ weights under the
checkpoint's names, in/ inputs, out/ and out32/ results in float64 and float32, grad/ gradient norms, adamw/ changes of
the weights after three steps; CASE.json the settings. Of a large array 256 drawn entries, the L2 norm and the sum are
kept. The weights take the converter's whole way: a .pth, `neucore convert`, our checkpoint, the model of phase 2.

Prints the largest relative deviation of every recorded quantity; exits with 1 where one is above 1e-5, or is recorded
but not known here.
B batch, N image tokens, L words, K concepts of a query, C vocabulary, D width.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny
import torch
from released_quantities import everything, image_tokens, inputs
from torch import Tensor, nn

from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.models.backbones.resnet_gru import SPECIALS, ResNet
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.released import convert, names

TOLERANCE = 1e-5
ZERO_GRADIENT = 1e-12  # relative to the largest: exactly 0 in theory (a bias under a softmax), rounding in the record
UNKNOWN = "not known here"
Found = dict[str, tuple[float, str]]  # {quantity: (deviation, remark)}
GIVEN = ("w/", "in/", "shape/")  # sections of a case that hold no result


class AnySizeResNet(ResNet):
    """The released code's CNN takes pictures of any size; ours refuses what is not the square it was built for."""

    forward = ResNet.encode


class Case:
    """A case, its model, and the deviations found so far: {quantity: (deviation, remark)}."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.values = {key: arrays[key] for key in arrays.files}
        self.settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.opt = self.settings["opt"]
        self.state = self._state()
        self.names, _ = names.name_map(self.state)
        count = self.state["txt_enc.embed.weight"].shape[0]
        letters = str.maketrans("0123456789", "abcdefghij")  # words that a caption can spell
        self.words = [*SPECIALS, *(f"word{row}".translate(letters) for row in range(len(SPECIALS), count))]
        self.model = self._converted()
        self.found: Found = {}
        self.skipped: dict[str, str] = {}
        self.used: set[str] = set()  # arrays that were compared row by row, under other names

    def _state(self) -> dict[str, Tensor]:
        """The state dict as the released code would save it; only the used rows of the positions were kept."""
        state, rows = {}, {}
        for key, value in self.values.items():
            if key.startswith("w/"):
                name, tensor = key.removeprefix("w/"), torch.from_numpy(value)
                if "[" in name:
                    rows[int(name.split(",")[1].rstrip("]"))] = tensor
                else:
                    state[name] = tensor.double() if tensor.is_floating_point() else tensor
        if rows:
            name = "concept_net.encoder.pos_embed"
            state[name] = torch.zeros(self.settings["state_shapes"][name]).double()
            for row, tensor in rows.items():
                state[name][0, row] = tensor
        return state

    def _converted(self) -> NeucoreModel:
        concepts = ConceptVocabulary(dict.fromkeys(self.words[row] for row in self.values["in/all_nouns_token"]))
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = Path(folder, "theirs.pth"), Path(folder, "ours.pth")
            torch.save({"epoch": 1, "opt": self.opt, "state_dict": self.state}, theirs)
            done = convert.convert_state(*convert.load_released(theirs), self.words, concepts)
            self.unused = done.unused
            tiny.save(done.model, ours)
            wanted = copy.deepcopy(done.model.config)
            wanted["backbone"]["text"]["freeze_words"] = not self.opt.get("txt_finetune", True)
            if wanted["backbone"]["image"]["name"] == "resnet":
                wanted["backbone"]["image"]["freeze"] = not self.opt.get("img_finetune", True)
            model = NeucoreModel.from_checkpoint(ours, wanted=wanted).double()
        model.load_state_dict(done.model.state_dict())  # the float64 of the file, where float32 has rounded
        sides = self.values["in/main/img_src"].shape[2:]
        image = model.backbone.image
        if hasattr(image, "network"):
            image.__class__ = AnySizeResNet
        else:
            image.grid = tuple(sides)
        return model.eval()

    def compare(self, name: str, actual: Tensor, section: str = "out", remark: str = "") -> None:
        """Note the deviation, relative to the array's largest entry (norm and sum: relative to the norm)."""
        self.found[f"{section}/{name}"] = (self.deviation(name, actual, section), remark)

    def deviation(self, name: str, actual: Tensor, section: str = "out") -> float:
        expected = np.asarray(self.values[f"{section}/{name}"], dtype=np.float64)
        actual = actual.detach().double().numpy()
        shape = self.values.get(f"shape/{name}")
        if shape is None:
            if actual.size != expected.size:
                return float("inf")
            difference, scale = np.abs(actual.reshape(expected.shape) - expected), np.abs(expected).max(initial=0)
        else:
            if actual.size != np.prod(shape):
                return float("inf")
            flat = actual.reshape(-1)
            drawn, norm = flat[np.random.RandomState(9).randint(0, flat.size, 256)], np.linalg.norm(flat)
            difference = np.abs(np.concatenate([drawn, [norm, flat.sum()]]) - expected)
            scale = np.concatenate([np.full(256, np.abs(expected[:256]).max()), [norm, norm]])
        worst = float((difference / np.maximum(scale, 1e-12)).max(initial=0))
        return worst if np.isfinite(worst) else float("inf")


def set_batch_norm(model: NeucoreModel, by_batch: bool) -> NeucoreModel:
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.train(by_batch)
    return model


def recorded(case: Case, section: str) -> list[str]:
    return [key.removeprefix(section) for key in case.values if key.startswith(section)]


def closest(case: Case, compare: Callable[[NeucoreModel, str], Found]) -> None:
    """Note what `compare(a copy of the model, remark)` finds, in the mode of batch norm that deviates least."""
    has_norms = any(isinstance(part, nn.BatchNorm2d) for part in case.model.modules())
    found = [
        compare(set_batch_norm(copy.deepcopy(case.model), by_batch), "batch norm by the batch" if by_batch else "")
        for by_batch in ((False, True) if has_norms else (False,))
    ]
    case.found |= min(found, key=lambda one: max((deviation for deviation, _ in one.values()), default=0.0))


@torch.no_grad()
def check_forward(case: Case, batch: str) -> None:
    """Every intermediate quantity; layer inputs beyond the first may be recorded under the first's name."""

    def compare(model: NeucoreModel, remark: str) -> Found:
        out, found = everything(model, case, batch), {}
        for name in recorded(case, f"out/{batch}/"):
            if name not in out:
                case.skipped[f"out/{batch}/{name}"] = UNKNOWN
                continue
            options = [out[name]]
            if name == "executor_in":
                options += [value for key, value in out.items() if key.startswith("executor_in_l")]
            found[f"out/{batch}/{name}"] = (min(case.deviation(f"{batch}/{name}", value) for value in options), remark)
        return found

    closest(case, compare)


def check_gradients(case: Case) -> None:
    """Norm and four drawn entries of the gradient of `loss`, for every weight of the checkpoint."""
    case.used |= {"grad/keys", "grad/norm", "grad/sample4"}
    rows = list(zip(*(case.values[f"grad/{key}"] for key in ("keys", "norm", "sample4")), strict=True))
    largest = max(float(norm) for _, norm, _ in rows if np.isfinite(norm))

    def compare(model: NeucoreModel, remark: str) -> Found:
        everything(model, case, "main")["loss"].backward()
        parameters, found = dict(model.named_parameters()), {}
        for name, norm, sample in rows:
            parameter = parameters.get(case.names.get(str(name)) or "")
            gradient, key = None if parameter is None else parameter.grad, f"grad/{name}"
            if not np.isfinite(norm) or gradient is None:
                differs = np.isfinite(norm) != (gradient is not None)
                found[key] = (float("inf") if differs else 0.0, "takes no part")
                continue
            flat = gradient.reshape(-1).numpy()
            drawn = flat[np.random.RandomState(5).randint(0, flat.size, 4)]
            difference = max(abs(np.linalg.norm(flat) - norm), np.abs(drawn - sample).max())
            if norm <= ZERO_GRADIENT * largest:
                negligible = np.linalg.norm(flat) <= ZERO_GRADIENT * largest
                found[key] = (0.0 if negligible else float("inf"), "zero but for rounding")
            else:
                found[key] = (float(difference / norm), remark)
        return found

    closest(case, compare)


@torch.no_grad()
def check_search(case: Case) -> None:
    """Search as released: each query with its own concepts, unpadded; "batch" attends the padding of its texts."""
    model, values = case.model, case.values
    alignment, text = model.alignment, model.backbone.text
    given = inputs(case, "main", model)
    images = torch.cat([given["img_src"], given["img_trg"]])
    if "in/extra_gallery" in values:
        images = torch.cat([images, torch.from_numpy(values["in/extra_gallery"]).double()])
    encoded = alignment.encode(image_tokens(model, images))
    for name, key in (("token", "tokens"), ("fg", "fg"), ("bg", "bg")):
        if f"out/infer/gallery_{name}" in values:
            case.compare(f"infer/gallery_{name}", encoded[key])
    gallery = model.matching.gallery(encoded["fg"], encoded["bg"])
    padded = text.encode_ids(given["txt"], given["txt_len"])
    scores: dict[str, list[Tensor]] = {"single": [], "batch": []}
    for i, (length, count) in enumerate(zip(given["txt_len"].tolist(), given["nouns_len"].tolist(), strict=True)):
        one = slice(i, i + 1)
        alone = text.encode_ids(given["txt"][one, :length], given["txt_len"][one])
        concepts = alignment.classifier.project(text.embedding(given["nouns"][one, :count]))
        for form, words, sentence in (
            ("single", alone["words"], alone["sentence"]),
            ("batch", padded["words"][one], padded["sentence"][one]),
        ):
            fused = model.fusion(
                reference_tokens=encoded["tokens"][one],
                reference_fg=encoded["fg"][one],
                concepts=concepts,
                concept_mask=torch.ones(concepts.shape[:2], dtype=torch.bool),
                words=words,
                word_mask=torch.ones(words.shape[:2], dtype=torch.bool),
                sentence=sentence,
            )["fused"]
            query = model.matching.query(fused, sentence, encoded["bg"][one])
            scores[form].append(model.matching.score(query, gallery))
    for form, rows in scores.items():
        if f"out/infer/infer_scores_{form}" in values:
            case.compare(f"infer/infer_scores_{form}", torch.cat(rows))
    check_ranking(case, torch.cat(scores["batch"]))
    check_interface(case, images)


@torch.no_grad()
def check_interface(case: Case, images: Tensor) -> None:
    """The model as a user calls it, with texts and concept words, in one batch: the same scores, the same loss."""
    model, given = case.model, inputs(case, "main", case.model)
    ids, lengths = given["txt"].tolist(), given["txt_len"].tolist()
    texts = [" ".join(case.words[row] for row in ids[i][1 : n - 1]) for i, n in enumerate(lengths)]
    if any(
        model.backbone.text.rows(text) != ids[i][:n] for i, (text, n) in enumerate(zip(texts, lengths, strict=True))
    ):
        return  # texts that no caption can spell
    concepts = [
        tuple(case.words[row] for row in rows[:n])
        for rows, n in zip(given["nouns"].tolist(), given["nouns_len"].tolist(), strict=True)
    ]
    query = model.encode_query(given["img_src"], texts, concept_words=concepts)
    scores = model.score(query, model.encode_image(images))
    if "out/infer/infer_scores_single" in case.values:
        case.found["encode_query, encode_image, score"] = (case.deviation("infer/infer_scores_single", scores), "")
    if torch.equal(model.concept_labels(concepts).double(), given["mil_labels"].double()):
        samples = {
            "reference_image": given["img_src"],
            "target_image": given["img_trg"],
            "text_input": texts,
            "concept_words": concepts,
            "target_key": torch.arange(len(texts)),
        }
        case.found["forward"] = (case.deviation("main/loss", model(samples)["loss"]), "")


@torch.no_grad()
def check_noise(case: Case) -> None:
    """Runs with Gumbel noise from a seed, in float64 and float32."""
    for section, kind in (("out", torch.float64), ("out32", torch.float32)):
        for seed in sorted({key.split("/")[1] for key in case.values if key.startswith(f"{section}/gumbel")}):

            def compare(model: NeucoreModel, remark: str, section=section, kind=kind, seed=seed) -> Found:
                model.to(kind).fusion.instructions.gumbel = True
                model.fusion.instructions.train()
                torch.manual_seed(int(seed.removeprefix("gumbel")))
                out = everything(model, case, "main")
                names = [name for name in recorded(case, f"{section}/{seed}/") if name in out]
                return {
                    f"{section}/{seed}/{name}": (case.deviation(f"{seed}/{name}", out[name], section), remark)
                    for name in names
                }

            closest(case, compare)


def check_training(case: Case) -> None:
    """Three steps of AdamW on the main batch: losses before each and after the last, change of every weight."""
    if "out/adamw/losses" not in case.values:
        return

    def compare(model: NeucoreModel, remark: str) -> Found:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=case.opt["lr"], weight_decay=0.01)
        losses, temperatures = [], []
        for step in range(len(case.values["out/adamw/losses"])):
            out = everything(model, case, "main")
            losses.append(torch.stack([out["matching_loss"], out["mil_loss"]]).detach())
            if step + 1 < len(case.values["out/adamw/losses"]):
                optimizer.zero_grad()
                out["loss"].backward()
                optimizer.step()
                temperatures.append(model.matching.temperature.detach().clone())
        results = {"adamw/losses": torch.stack(losses), "adamw/temperature": torch.cat(temperatures)}
        results["adamw/scores_after3"] = out["scores"]
        found = {
            f"out/{name}": (case.deviation(name, value), remark)
            for name, value in results.items()
            if f"out/{name}" in case.values
        }
        return found | weight_changes(case, before, model.state_dict(), remark)

    closest(case, compare)


def weight_changes(case: Case, before: dict, after: dict, remark: str) -> Found:
    norms = dict(zip(map(str, case.values["grad/keys"]), case.values["grad/norm"], strict=True))
    largest, found = max(norm for norm in norms.values() if np.isfinite(norm)), {}
    case.used |= {"adamw/delta_keys", "adamw/delta_norm"}
    for name, delta in zip(map(str, case.values["adamw/delta_keys"]), case.values["adamw/delta_norm"], strict=True):
        key, target = f"adamw/{name}", case.names.get(name)
        if 0 <= norms.get(name, np.nan) <= ZERO_GRADIENT * largest:
            case.skipped[key] = "Adam divides a gradient that is rounding by its own size"
        elif name.endswith("num_batches_tracked"):
            case.skipped[key] = "a counter"
        elif f"w/{name}" not in case.values and target is not None:
            case.skipped[key] = "weight decay on rows that the case does not hold"
        elif target is None:
            found[key] = (float(delta), "takes no part")
        else:
            change = float((after[target].double() - before[target].double()).norm())
            found[key] = (abs(change - delta) / max(delta, 1e-12), remark)
    return found


def check_ranking(case: Case, scores: Tensor) -> None:
    """The gallery of each query, best first, its reference (the image of the same number) last."""
    expected = case.values.get("out/infer/official_rankings")
    if expected is None:
        return
    scores = scores.clone()
    scores.fill_diagonal_(-torch.inf)
    differing = (scores.argsort(dim=1, descending=True).numpy() != expected).sum()
    case.found["out/infer/official_rankings"] = (float(differing), "places that differ")
    case.skipped["out/infer/official_ranks"] = "the case does not hold the right answers"
    case.skipped["out/infer/infer_lengths_after"] = "what the released code makes of its input; nothing is computed"


def run(path: Path) -> Case:
    """Load a case and compare everything."""
    case = Case(path)
    for batch in sorted({key.split("/")[1] for key in case.values if key.startswith("in/") and key.count("/") == 2}):
        check_forward(case, batch)
    if "grad/keys" in case.values:
        check_gradients(case)
    if recorded(case, "out/infer/"):
        check_search(case)
    check_noise(case)
    check_training(case)
    for key in case.values:
        if not key.startswith(GIVEN) and key not in case.found and key not in case.used:
            case.skipped.setdefault(key, UNKNOWN)
    return case


def failures(case: Case) -> list[str]:
    """Quantities that deviate, and those that nothing here can be compared with."""
    wrong = [name for name, (deviation, _) in case.found.items() if not deviation <= TOLERANCE]
    return wrong + [name for name, reason in case.skipped.items() if reason == UNKNOWN]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_file() or not Path(arguments[0]).with_suffix(".json").is_file():
        print(f"{__doc__.splitlines()[0]}\nCASE.npz and CASE.json must lie side by side", file=sys.stderr)
        return 2
    case = run(Path(arguments[0]))
    print(f"weights that nothing uses: {', '.join(names.grouped(case.unused)) or 'none'}")
    wide = max((len(name) for name in case.found), default=0)
    for name, (deviation, remark) in case.found.items():
        mark = "" if deviation <= TOLERANCE else "   <- above"
        print(f"{name:<{wide}}  {deviation:9.2e}{f'  ({remark})' if remark else ''}{mark}")
    for name, reason in case.skipped.items():
        print(f"not compared: {name} ({reason})")
    if not case.found:
        print("nothing was compared")
        return 1
    wrong, unknown = failures(case), sum(reason == UNKNOWN for reason in case.skipped.values())
    worst = max(case.found.items(), key=lambda item: item[1][0])
    print(f"{len(case.found)} quantities, largest relative deviation {worst[1][0]:.2e} ({worst[0]})")
    above = len(wrong) - unknown
    print(f"{above} above {TOLERANCE:g}" if above else f"all within {TOLERANCE:g}")
    if unknown:
        print(f"{unknown} {UNKNOWN}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
