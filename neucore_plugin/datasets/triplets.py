"""Triplets, galleries and the map-style data sets over them. Knows no host and no model."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from neucore_plugin.clauses import TEXT_KEYS, joined, padded
from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import sha256_text
from neucore_plugin.common.images import load_for
from neucore_plugin.config.published import STANDARD, Protocol
from neucore_plugin.datasets.feature_cache import FeatureCache
from neucore_plugin.datasets.feature_maps import is_map, read_map


@dataclass(frozen=True)
class Triplet:
    """One query: reference image + relative caption, and its right answers.

    `targets[0]` is the target; further ones are equally right; () in a published test split, whose answers are kept
    back. `change` names the kind of change, for the report. `members`: the group of similar images that the query was
    written for (CIRR), reference included; where all queries of a split have one, evaluation also ranks the group
    alone. `soft`: graded answers, (image, weight). `captions`: the captions of a pair that has several (FashionIQ).
    `aspects`: further kinds that the query belongs to (CIRCO's semantic aspects).
    `wordings`: other captions that ask for the same. `near_twins`: images close to the reference that lack what is
    asked for. `in_place`: reference and target are one picture but for the change, so that it can be seen where it is.
    """

    query_id: str
    reference: str
    caption: str
    targets: tuple[str, ...]
    change: str = ""
    members: tuple[str, ...] = ()
    soft: tuple[tuple[str, float], ...] = ()
    captions: tuple[str, ...] = ()
    aspects: tuple[str, ...] = ()
    wordings: tuple[str, ...] = ()
    near_twins: tuple[str, ...] = ()
    in_place: bool = False


def no_names(ids: Iterable[str]) -> dict[str, str]:
    """Of a data set that has no other names for its images than their ids."""
    return {}


LEFT_OUT = ("missing_images", "unreadable_images", "skipped_queries")  # counts of what bad images cost a split


def left_out_text(counts: Mapping[str, Any]) -> str:
    """The counts of LEFT_OUT as a sentence."""
    missing, unreadable, queries = (counts.get(key, 0) for key in LEFT_OUT)
    parts = [f"{missing:,} images have no file"] * bool(missing) + [f"{unreadable:,} cannot be read"] * bool(unreadable)
    return f"{', '.join(parts)}; {queries:,} queries are left out"


@dataclass(frozen=True)
class Gallery:
    """The images that are ranked: unique names and their files, in the order of the split's own list."""

    ids: tuple[str, ...]
    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.paths) or len(set(self.ids)) != len(self.ids):
            raise DataError(
                f"a gallery needs unique names with one path each; given {len(self.ids)} names "
                f"({len(set(self.ids))} different) and {len(self.paths)} paths"
            )

    @classmethod
    def of(cls, files: Mapping[str, Path]) -> "Gallery":
        """The gallery of image files by name, in their order."""
        return cls(tuple(files), tuple(files.values()))

    @property
    def files(self) -> dict[str, Path]:
        """The image files by name."""
        return dict(zip(self.ids, self.paths, strict=True))

    @property
    def fingerprint(self) -> str:
        """Changes with any name or its place."""
        return sha256_text("\n".join(self.ids))


class ImageStore:
    """Images by name, as processed pixels or, where a frozen encoder was run ahead, as cached token features."""

    def __init__(self, paths: Mapping[str, Path], processor: Callable[[Any], torch.Tensor]) -> None:
        self.paths, self.processor = dict(paths), processor
        self.checked = False  # whether every image was read already, so that none is bad
        self.cache: FeatureCache | None = None
        self.reads = ("tokens", "pooled")  # what of it has a use

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Of {"tokens": [N,Di], "pooled": [Di]} what is read, from the cache, else {"image": [3,H,W]}. ImageError."""
        if self.cache is not None:
            return {kind: getattr(self.cache, kind)(name) for kind in self.reads}
        return {"image": self.pixels(name)}

    def pixels(self, name: str) -> torch.Tensor:
        """[3,H,W], or the map of a file of feature maps [W,h,w]. Raises ImageError."""
        path = self.paths[name]
        return torch.from_numpy(read_map(path)) if is_map(path) else self.processor(load_for(self.processor, path))

    @property
    def holds_maps(self) -> bool:
        """Whether its files are feature maps in place of pictures."""
        return any(map(is_map, self.paths.values()))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch dict: tensors stacked, words padded to [B,L,Dt] with word_mask [B,L], the rest as lists."""
    batch: dict[str, Any] = {}
    for key, first in samples[0].items() if samples else ():
        values = [sample[key] for sample in samples]
        if key == "words":
            batch |= padded([{name: sample[name] for name in TEXT_KEYS if name in sample} for sample in samples])
        elif key in batch:
            continue
        elif isinstance(first, torch.Tensor):
            shapes = {tuple(value.shape) for value in values}
            if len(shapes) > 1:
                raise DataError(f"samples of one batch differ in the shape of {key}: {sorted(shapes)}")
            batch[key] = torch.stack(values)
        elif key in ("index", "reference_key", "target_key"):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


class GalleryDataset(Dataset):
    """The images of a gallery, in order: samples {"image_id", "image"} or {"image_id", "tokens", "pooled"}."""

    def __init__(self, gallery: Gallery, images: ImageStore) -> None:
        self.gallery, self.images = gallery, images

    def __len__(self) -> int:
        return len(self.gallery.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.gallery.ids[index]
        return {"image_id": name, **self.images.load(name)}

    collater = staticmethod(collate)


class TripletDataset(Dataset):
    """Queries of one split.

    A sample: query_id, reference_id, target_id, text_input, concept_words (tuple), change, index, reference_key and
    target_key (a number an image), right_keys (those of all right answers) and the images: reference_image /
    target_image [3,H,W], or with a feature cache reference_tokens / target_tokens [N,Di] and reference_pooled /
    target_pooled [Di]; with cached texts also words [L,Dt] and sentence [Dt]. In training alone: the target image;
    reference_keys and text_keys, what answers the reference without a text and the text without a reference (the right
    answers of all triplets that have it); noise, a number from which what is random of the sample follows.

    A triplet whose reference is the target teaches nothing: training leaves it out. Where the protocol removes the
    reference from the ranking, evaluation counts it as a miss. `notices` tells how many there are.

    Args:
        concepts: one tuple of lemmas a triplet.
        train: load target images as well.
        protocol: how evaluation counts.
        answers: False for a published test split, which can be ranked but not evaluated.
    Raises: DataError for an empty split, or a triplet whose image or target is unknown.
    """

    streamed = False  # whether samples come in an order of their own: see `shards/stream.py`

    def __init__(
        self,
        name: str,
        split: str,
        triplets: Sequence[Triplet],
        gallery: Gallery,
        images: ImageStore,
        captions: Callable[[str], str] = str,
        concepts: Sequence[tuple[str, ...]] | None = None,
        train: bool = False,
        protocol: Protocol = STANDARD,
        answers: bool = True,
    ) -> None:
        if not triplets:
            raise DataError(
                f"{name}: split {split!r} holds no queries. Check the annotation file, or leave the split out"
            )
        self.name, self.split, self.train = name, split, train
        self.protocol, self.answers = protocol, answers
        self.notices: list[str] = []  # what a user should know of the split, a line each
        if train:
            triplets, concepts = self._to_learn(triplets, concepts)
        self.family: str | None = None  # splits of one family, such as FashionIQ's categories, are averaged
        self.one_process = False  # whether the authors' code would read both orders of a pair in one process
        self.left_out: dict[str, Any] = {}  # what bad images cost: counts and the file that lists them
        self.triplets, self.gallery, self.images = list(triplets), gallery, images
        self.texts = [captions(triplet.caption) for triplet in self.triplets]
        self.concepts = list(concepts) if concepts is not None else [()] * len(self.triplets)
        self.wordings = [tuple(map(captions, triplet.wordings)) for triplet in self.triplets]
        self.wording_concepts: list[tuple[tuple[str, ...], ...]] = []  # one tuple of lemmas a wording
        self.text_cache: FeatureCache | None = None
        self.clauses: Callable[[str], Sequence[str]] | None = None  # of a caption, where the model reads each by itself
        self.credit: str | None = None  # whom a page that shows these images has to name
        self.names: Callable[[Iterable[str]], dict[str, str]] = no_names  # what a page calls images, by id
        self.first_key = 0  # several data sets of one training number their images one behind the other
        self._key = {image: index for index, image in enumerate(images.paths)}
        self._answers: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]] | None = None
        self._position = {image: index for index, image in enumerate(gallery.ids)}
        self._check()

    def _to_learn(self, triplets: Sequence[Triplet], concepts: Any) -> tuple[list[Triplet], Any]:
        """Triplets, and their concepts where given, without those whose reference is the target: they teach nothing."""
        kept = [place for place, t in enumerate(triplets) if t.targets[:1] != (t.reference,)]
        if count := len(triplets) - len(kept):
            text = f"{count:,} of {len(triplets):,} pairs have their reference as target; training leaves them out"
            if not kept:
                raise DataError(f"{self.name}: split {self.split!r}: {text}, so nothing is left to learn from")
            self.notices.append(text)
        return [triplets[place] for place in kept], None if concepts is None else [concepts[place] for place in kept]

    def _check(self) -> None:
        named = {t.reference for t in self.triplets} | {x for t in self.triplets for x in t.targets if self.train}
        self._refuse(
            sorted(named - self.images.paths.keys()), "names {count} images that have no file, such as {example}"
        )
        counts = Counter(t.query_id for t in self.triplets)
        self._refuse([name for name, count in counts.items() if count > 1], "has query ids that occur more than once")
        if not self.answers:
            return
        self._refuse(
            [t.query_id for t in self.triplets if not t.targets],
            "has {count} queries without a target, such as {example}; it can neither be trained on nor evaluated, only "
            "`neucore submit` takes it",
        )
        if self.train:
            return
        self._refuse(
            [t.targets[0] for t in self.triplets if t.targets[0] not in self._position],
            "has {count} targets outside its gallery (as {example}); the gallery must come from the split's own image "
            "list",
        )
        missed = self._without_answer(
            [t.targets[:1] if self.protocol.precision_at else t.targets for t in self.triplets]
        )
        if missed:
            self.notices.append(
                f"{len(missed):,} of {len(self.triplets):,} queries have their reference as target, which the protocol "
                "removes from the ranking; they count as misses"
            )
        if all(t.members for t in self.triplets):
            alone = self._without_answer([set(t.targets) & set(t.members) for t in self.triplets])
            self._refuse(
                [self.triplets[place].query_id for place in alone if place not in missed],
                "has {count} queries without a right answer in their group, such as {example}",
            )
        ranked = self.candidates()
        self._refuse(
            ["it"] if len(self._position if ranked is None else ranked) < 2 else [],
            "has a gallery of fewer than two images, in which nothing can be ranked",
        )

    def _without_answer(self, answers: Iterable[Iterable[str]]) -> set[int]:
        """Places of the queries of whose `answers` the protocol ranks none."""
        own = self.protocol.remove_reference
        return {
            place
            for place, (t, named) in enumerate(zip(self.triplets, answers, strict=True))
            if not (set(named) & self._position.keys()) - ({t.reference} if own else set())
        }

    def _refuse(self, wrong: Sequence[str], problem: str) -> None:
        if wrong:
            text = problem.format(count=len(wrong), example=wrong[0])
            raise DataError(f"{self.name}: split {self.split!r} {text}")

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._sample(index, lambda _, name: self.images.load(name))

    def _sample(self, index: int, load: Callable[[str, str], dict[str, torch.Tensor]]) -> dict[str, Any]:
        """load: role (reference, target) and name of an image -> what `ImageStore.load` gives."""
        triplet = self.triplets[index]
        sample: dict[str, Any] = {
            "index": index,
            "query_id": triplet.query_id,
            "reference_id": triplet.reference,
            "target_id": triplet.targets[0] if triplet.targets else None,
            "reference_key": self.key(triplet.reference),
            "target_key": -1,
            "right_keys": self._keys(triplet.targets),
            "text_input": self.texts[index],
            "concept_words": self.concepts[index],
            "change": triplet.change,
        }
        if triplet.targets and (key := self.key(triplet.targets[0])) is not None:
            sample["target_key"] = key
        roles = {"reference": triplet.reference}
        if self.train:
            roles["target"] = triplet.targets[0]
            by_reference, by_text = self._all_answers()
            sample["reference_keys"], sample["text_keys"] = by_reference[triplet.reference], by_text[self.texts[index]]
        for role, name in roles.items():
            sample.update({f"{role}_{key}": value for key, value in load(role, name).items()})
        sample.update(self._words(self.texts[index]))
        if self.train:
            sample["noise"] = torch.randint(2**62, ())  # last: what the pictures draw is as without it
        return sample

    def key(self, image: str) -> int | None:
        """The number of an image in samples; None where it has no file."""
        place = self._key.get(image)
        return None if place is None else self.first_key + place

    def _keys(self, images: Iterable[str]) -> tuple[int, ...]:
        return tuple(key for image in images if (key := self.key(image)) is not None)

    def _all_answers(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """Keys of the right answers of all triplets of a reference, and of a text."""
        if self._answers is None:
            found: tuple[dict[str, dict], dict[str, dict]] = ({}, {})
            for triplet, text in zip(self.triplets, self.texts, strict=True):
                for answers, asked in zip(found, (triplet.reference, text), strict=True):
                    answers.setdefault(asked, {}).update(dict.fromkeys(self._keys(triplet.targets)))
            self._answers = tuple({asked: tuple(keys) for asked, keys in answers.items()} for answers in found)
        return self._answers

    collater = staticmethod(collate)

    @property
    def all_texts(self) -> Iterable[str]:
        """The texts of all queries, further wordings included."""
        return chain(self.texts, *self.wordings)

    @property
    def read_texts(self) -> Iterable[str]:
        """What a text encoder reads of them: each text, or each of its clauses."""
        return self.all_texts if self.clauses is None else chain.from_iterable(map(self.clauses, self.all_texts))

    @property
    def rewordings(self) -> int:
        """How many further wordings every query has."""
        return min(map(len, self.wordings))

    def reworded(self, samples: Mapping[str, Any], place: int) -> dict[str, Any]:
        """A batch, asked in the further wording of that place."""
        indices = samples["index"].tolist()
        texts = [self.wordings[index][place] for index in indices]
        concepts = [self.wording_concepts[index][place] if self.wording_concepts else () for index in indices]
        return {**samples, "text_input": texts, "concept_words": concepts, **collate(list(map(self._words, texts)))}

    def _words(self, text: str) -> dict[str, torch.Tensor]:
        """Cached features of a text: words [L,Dt] and sentence [Dt], or as `joined` gives them of its clauses; nothing
        where none are kept."""
        cache = self.text_cache
        if cache is None:
            return {}
        if self.clauses is None:
            return {"words": cache.tokens(text), "sentence": cache.pooled(text)}
        return joined([(cache.tokens(part), cache.pooled(part)) for part in self.clauses(text)])

    @property
    def repeats(self) -> list[int]:
        """How often the released form's concepts other than nouns stand in each query: twice, in training once more."""
        second = [self.one_process and triplet.query_id.endswith("/b") for triplet in self.triplets]
        return [2 + (self.train or again) for again in second]

    def target_positions(self, index: int) -> tuple[int, ...]:
        """Gallery positions of a query's right answers."""
        return tuple(self._position[x] for x in self.triplets[index].targets if x in self._position)

    def near_twin_positions(self, index: int) -> tuple[int, ...]:
        """Gallery positions of the images close to a query's reference that lack what is asked for."""
        return tuple(self._position[x] for x in self.triplets[index].near_twins if x in self._position)

    def member_positions(self, index: int) -> tuple[int, ...]:
        """Gallery positions of a query's group, reference included; empty where it has none."""
        return tuple(self._position[x] for x in self.triplets[index].members if x in self._position)

    def soft_positions(self, index: int) -> tuple[tuple[int, float], ...]:
        """(gallery position, weight) of a query's graded answers of positive weight, the reference left out."""
        triplet = self.triplets[index]
        return tuple(
            (self._position[image], weight)
            for image, weight in triplet.soft
            if weight > 0 and image in self._position and image != triplet.reference
        )

    def candidates(self) -> list[int] | None:
        """Gallery positions that the protocol ranks, in order; None = all."""
        if self.protocol.gallery == "full":
            return None
        named = {x for t in self.triplets for x in (t.reference, *t.targets)}
        return [place for name, place in self._position.items() if name in named]

    def reference_position(self, index: int) -> int | None:
        """Gallery position of a query's reference; None where it is not in the gallery."""
        return self._position.get(self.triplets[index].reference)

    @property
    def fingerprint(self) -> str:
        """Changes with any query, text, right answer, group, or the gallery."""
        lines = [
            repr((t.query_id, t.reference, x, t.targets, *t.members, *([t.soft] if t.soft else [])))
            for t, x in zip(self.triplets, self.texts, strict=True)
        ]
        return sha256_text("\n".join([self.gallery.fingerprint, *lines]))
