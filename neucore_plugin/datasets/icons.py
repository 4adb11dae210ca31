"""Composed retrieval on interface icons: Tabler Icons (MIT), whose names are compositional.

`camera-plus` is a camera with a plus sign, `camera-off` one that is crossed out, and many icons are also there filled.
So an icon is a base, a sign and a style, and two icons that differ in one of them make a query. The 83 bases with three
signs or more serve; the others, some 5,000 icons, are distractors. All is decided by hashes of names.

The package is fetched by the user (`FETCH`) and its SVG files are rendered once into the cache. The gallery is the
whole set. Splits:

train      one change: sign, style or base; reference and targets are seen images
val        the same; pairs that training uses in neither order
test_combo reference a seen image, target of a held-out combination of base and sign
test_base  target of a held-out base; reference of the same base (sign, style) or a seen image (base)
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import cache_dir, expanded, file_errors, read_json, sha256_text
from neucore_plugin.config.published import SPLITS
from neucore_plugin.datasets.emoji.drawings import INSTALL, Source, read_manifest, render_into
from neucore_plugin.datasets.sampling import cap, choose, sample, unit_hash
from neucore_plugin.datasets.triplets import Gallery, Triplet

CREDIT = "Icons: Tabler Icons (tabler.io/icons), MIT"
TESTED = "3.52.0"  # another version has other icons, so its numbers are not comparable
FETCH = f"npm pack @tabler/icons@{TESTED} && tar xzf tabler-icons-{TESTED}.tgz"
STYLES = ("outline", "filled")
SIGNS = {  # last part of a name -> how it is called; "off" is a stroke through all of it
    "off": "",
    "plus": "a plus sign",
    "minus": "a minus sign",
    "x": "a cross",
    "check": "a check mark",
    "down": "an arrow down",
    "up": "an arrow up",
    "search": "a magnifying glass",
    "exclamation": "an exclamation mark",
    "dollar": "a dollar sign",
    "bolt": "a lightning bolt",
    "share": "a sharing arrow",
    "cancel": "a forbidden sign",
    "star": "a star",
    "cog": "a gear",
    "heart": "a heart",
    "pause": "a pause sign",
    "question": "a question mark",
    "code": "angle brackets",
    "pin": "a map pin",
    "spark": "a sparkle",
    "key": "a key",
    "flame": "a flame",
}
LEAST_SIGNS = 3  # of a base: below that a last part is mostly a part of the name, as in circle-arrow-up
KEPT = 12  # sign changes, and base changes, kept a reference in training; 90,000 otherwise
_LIMITS = {"val": 1000, "test_combo": 1500, "test_base": 1500}
_CAPS = {"val": 1, "test_combo": 3, "test_base": 5}
_VAL_SHARE = 0.08


@dataclass(frozen=True)
class Icon:
    """base: as the package names it. sign: of SIGNS, "" for none. style: outline or filled."""

    base: str
    sign: str
    style: str

    @property
    def words(self) -> str:
        """What the base is called."""
        return self.base.replace("-", " ")


def package_files(root: str | Path) -> dict[str, Path]:
    """The SVG files of an unpacked package by id (`outline/camera-plus`'s is `camera-plus`, of filled ones
    `camera-plus.filled`), sorted. Raises DataError, which says how to fetch it."""
    root = expanded(root)
    hint = f"Fetch it where you like: {FETCH}; then datasets.icons.build_info.root=package"
    with file_errors(root, hint):
        files = {
            f"{path.stem}{'' if style == 'outline' else '.filled'}": path
            for style in STYLES
            for path in (root / "icons" / style).glob("*.svg")
        }
    if not files:
        raise DataError(f"{root}: holds no icons/outline/*.svg, so it is no unpacked package @tabler/icons. {hint}")
    return dict(sorted(files.items()))


def prepare(root: str | Path, cache: str | Path | None = None, image_size: int = 224, progress: bool = True) -> Path:
    """Render the icons on white, once, and return their folder. Raises DataError."""
    files = package_files(root)
    root = expanded(root)
    package = read_json(root / "package.json", dict, f"unpack it anew: {FETCH}")
    version = str(package.get("version"))[:40]
    if package.get("name") != "@tabler/icons":
        raise DataError(
            f"{root}: is the package {str(package.get('name'))[:80]!r}, not @tabler/icons. Fetch it: {FETCH}"
        )
    sizes = sha256_text("\n".join(f"{name} {path.stat().st_size}" for name, path in files.items()))[:12]
    folder = cache_dir(cache) / "icons" / f"tabler-{sizes}-{image_size}px"
    source = Source({"@tabler/icons": version}, CREDIT, f"{FETCH}; the renderer: {INSTALL}")
    render_into(folder, files, set(files), image_size, progress, source)
    return folder


def load(
    root: str | Path, cache: str | Path | None = None, image_size: int = 224, progress: bool = True
) -> dict[str, tuple[list[Triplet], Gallery]]:
    """Triplets and gallery by split; the icons are rendered where needed."""
    folder = prepare(root, cache, image_size, progress)
    manifest = read_manifest(folder)
    names = sorted(manifest["files"])
    splits = build_splits(names, manifest["near_duplicates"])
    gallery = Gallery.of({name: folder / f"{name}.png" for name in names})
    return {split: (triplets, gallery) for split, triplets in splits.items()}


def names(ids: Iterable[str]) -> dict[str, str]:
    """What a page calls icons: `camera plus, filled`."""
    return {
        name: name.removesuffix(".filled").replace("-", " ") + ", filled" * name.endswith(".filled") for name in ids
    }


def parse(ids: Iterable[str]) -> dict[str, Icon]:
    """Those ids that serve in queries, as icons: the bases that have `LEAST_SIGNS` signs or more, and what is made of
    them."""
    known = set(ids)
    signs: dict[str, set[str]] = defaultdict(set)
    for name in known:
        base, _, sign = name.rpartition("-")
        if sign in SIGNS and base in known:
            signs[base].add(sign)
    found = {}
    for base, own in signs.items():
        if len(own) >= LEAST_SIGNS:
            for sign in ("", *own):
                name = f"{base}-{sign}" if sign else base
                for style, full in (("outline", name), ("filled", f"{name}.filled")):
                    if full in known:
                        found[full] = Icon(base, sign, style)
    return dict(sorted(found.items()))


def build_splits(ids: Iterable[str], near: Mapping[str, Iterable[str]]) -> dict[str, list[Triplet]]:
    """All splits. `near`: id -> ids whose drawing nearly coincides; they become equally right targets."""
    icons = parse(ids)
    bases = sorted({icon.base for icon in icons.values()}, key=lambda base: unit_hash("base", base))
    held_bases = set(bases[: round(len(bases) / 10)])
    held = {
        name for name, a in icons.items() if a.base not in held_bases and a.sign and unit_hash(a.base, a.sign) < 1 / 6
    }
    unseen = {name for name, a in icons.items() if a.base in held_bases}
    hidden = held | unseen
    hidden |= {name for name in icons if not hidden.isdisjoint(near.get(name, ()))}
    found: dict[str, list[Triplet]] = {split: [] for split in SPLITS["icons"]}
    for reference, target, change in _pairs(icons):
        twins = set(near.get(target, ()))
        if reference in twins:
            continue
        if target in unseen and change != "base":
            split = "test_base"
        elif reference in hidden:
            continue
        elif target in unseen:
            split = "test_base"
        elif target in held:
            split = "test_combo"
        elif target in hidden:
            continue
        else:
            split = "val" if unit_hash("val", *sorted((reference, target))) < _VAL_SHARE else "train"
        found[split].append(Triplet(f"{reference}>{target}", reference, "", (target, *sorted(twins)), change))
    result = {}
    for split, triplets in found.items():
        kept = cap(triplets, "base", _CAPS.get(split, KEPT), by_target=split.startswith("test"))
        kept = cap(kept, "sign", _CAPS.get(split, KEPT), by_target=split.startswith("test"))
        chosen = sample(kept, _LIMITS.get(split))
        result[split] = [_worded(triplet, icons, split == "train") for triplet in chosen]
    return result


def _pairs(icons: Mapping[str, Icon]) -> Iterator[tuple[str, str, str]]:
    """Ordered pairs that differ in one thing; a base changes only where a sign or a filling stays, or all is left."""
    for change in ("sign", "style", "base"):
        groups: dict[Icon, list[str]] = defaultdict(list)
        for name, icon in icons.items():
            groups[replace(icon, **{change: ""})].append(name)
        for alike, members in groups.items():
            if change == "base" and not alike.sign:
                continue  # nothing of the reference would stay: the text alone names the target
            yield from ((one, other, change) for one in members for other in members if one != other)


def _worded(triplet: Triplet, icons: Mapping[str, Icon], train: bool) -> Triplet:
    own, target = icons[triplet.reference], icons[triplet.targets[0]]
    asked, further = wordings(triplet.change, own, target)
    caption = choose(asked, triplet.change, triplet.query_id)
    if train:
        return replace(triplet, caption=caption)
    # Of the reference's base, differing from it in one thing, and without what is asked for.
    twins = tuple(
        name
        for name, a in icons.items()
        if a.base == own.base
        and (a.sign == own.sign) != (a.style == own.style)
        and getattr(a, triplet.change) != getattr(target, triplet.change)
        and name != triplet.reference
        and name not in triplet.targets
    )
    in_place = triplet.change == "sign"
    return replace(triplet, caption=caption, wordings=tuple(further), near_twins=twins, in_place=in_place)


def wordings(change: str, reference: Icon, target: Icon) -> tuple[list[str], list[str]]:
    """The captions for a change, which training takes one of; then three further ones. What stays is never named."""
    if change == "base":
        what = target.words
        return (
            [f"{what} instead", f"change it to {what}", f"now {what}"],
            [f"should be {what}", f"as before, only {what}", f"{what} this time"],
        )
    if change == "style":
        if target.style == "filled":
            return (
                ["the same but filled", "make it solid", "filled in"],
                ["should be solid", "as before, only filled", "a solid shape this time"],
            )
        return (
            ["the same but only the outline", "make it an outline", "not filled"],
            ["should be an outline", "as before, only in outline", "no longer filled"],
        )
    if target.sign == "off":
        return (
            ["crossed out", "the same but crossed out", "with a stroke through it"],
            ["should be crossed out", "as before, only struck through", "crossed out this time"],
        )
    if target.sign:
        sign = SIGNS[target.sign]
        return (
            [f"with {sign}", f"give it {sign}", f"the same but with {sign}"],
            [f"should have {sign}", f"as before, only with {sign}", f"{sign} on it this time"],
        )
    if reference.sign == "off":
        return (
            ["not crossed out", "without the stroke through it", "the same but not crossed out"],
            ["should not be crossed out", "as before, only without the stroke", "no longer crossed out"],
        )
    sign = SIGNS[reference.sign].removeprefix("an ").removeprefix("a ")
    return (
        [f"without the {sign}", f"take the {sign} off", f"the same but without the {sign}"],
        [f"should have no {sign}", f"as before, only with no {sign}", f"no {sign} this time"],
    )
