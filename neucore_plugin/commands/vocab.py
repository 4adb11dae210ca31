"""neucore vocab: the concept vocabulary of a data set, with counts."""

import argparse
from collections import Counter
from pathlib import Path

from neucore_plugin.commands import print_json
from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.common.files import features_dir
from neucore_plugin.config.published import PUBLISHED, SPLITS

HELP = "build the concept vocabulary of a data set and show what it holds"
CIRR_POS = ["NOUN", "ADJ"]  # as the paper has it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME and what counts as a concept."""
    parser.add_argument("name", choices=(*PUBLISHED, "emoji", "icons", "folder"), help="the data set")
    parser.add_argument("--root", type=Path, help="its root folder (default: its variable, such as NEUCORE_CIRR_ROOT)")
    parser.add_argument("--split", default="train", help="whose captions (default train)")
    parser.add_argument(
        "--pos", nargs="+", metavar="TAG", help="parts of speech (default NOUN VERB ADJ ADV; CIRR NOUN ADJ)"
    )
    parser.add_argument("--min-count", type=int, default=2, help="captions that must hold a lemma (default 2)")
    parser.add_argument("--top", type=int, default=30, help="how many of the most frequent to show (default 30)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the vocabulary as JSON")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Read the captions (images are not needed), find concepts, count. Raises ConfigError and DataError."""
    from neucore_plugin.concepts import ConceptExtractor, ConceptVocabulary, cached_concepts
    from neucore_plugin.config.loading import model_defaults

    chosen = arguments.pos or (CIRR_POS if arguments.name == "cirr" else None)
    given = {"min_count": arguments.min_count, **({"pos": chosen} if chosen else {})}
    rules = model_defaults({"concepts": given})["concepts"]
    captions = _captions(arguments)
    extractor = ConceptExtractor(rules["pos"])
    texts = sorted(set(captions))
    found = cached_concepts(extractor, texts, features_dir())
    lemmas = [found[caption] for caption in captions]
    vocabulary = ConceptVocabulary.from_captions(lemmas, arguments.min_count)
    counts = Counter(lemma for caption in lemmas for lemma in caption)
    report = {
        "captions": len(captions),
        "empty_captions": sum(not caption.strip() for caption in captions),
        "captions_without_concept": sum(not caption for caption in lemmas),
        "pos": list(extractor.pos),
        "min_count": arguments.min_count,
        "lemmas": len(counts),
        "concepts": len(vocabulary),
        "most_frequent": {word: counts[word] for word in vocabulary.words[: max(0, arguments.top)]},
        "fingerprint": vocabulary.fingerprint,
    }
    if arguments.out:
        vocabulary.to_json(arguments.out)
        report["written"] = str(arguments.out)
    if arguments.json:
        print_json(report)
        return
    print(f"{report['captions']:,} captions, {report['empty_captions']:,} of them empty; ", end="")
    print(f"{report['captions_without_concept']:,} hold no concept ({', '.join(extractor.pos)})")
    print(f"{report['lemmas']:,} lemmas, {report['concepts']:,} in at least {arguments.min_count} captions:")
    print(", ".join(f"{word} {count:,}" for word, count in report["most_frequent"].items()))
    if arguments.out:
        print(f"written: {arguments.out}")


def _captions(arguments: argparse.Namespace) -> list[str]:
    from neucore_plugin.datasets import folder
    from neucore_plugin.datasets.published import catalogue

    name, split = arguments.name, arguments.split
    if name == "folder":
        if arguments.root is None:
            raise ConfigError("--root is needed: the folder with the images and their annotations")
        return [t.caption for t in folder.load_split(arguments.root, split, folder.images(arguments.root))[0]]
    if name in ("emoji", "icons"):
        from neucore_plugin.datasets import icons
        from neucore_plugin.datasets.emoji import splits as emoji

        if split not in SPLITS[name]:
            raise ConfigError(f"{name} has no split {split!r}.{nearest(split, SPLITS[name])}")
        if name == "icons" and arguments.root is None:
            raise ConfigError(f"--root is needed: the unpacked package of the icons. Fetch it: {icons.FETCH}")
        found = emoji.load() if name == "emoji" else icons.load(arguments.root)
        return [triplet.caption for triplet in found[split][0]]
    _, found, _ = catalogue.load(name, arguments.root, [split], missing="ignore")
    return [triplet.caption for triplet in found[split][0]]
