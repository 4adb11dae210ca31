"""What one process makes of a folder whose names and texts are not ASCII, for `test_locales.py` to compare.

python locale_case.py FOLDER      with data/ (a folder data set) in it
"""

import json
import os
import sys
from pathlib import Path

from colour_model import ColourModel

from neucore_plugin import cli
from neucore_plugin.common.files import expanded
from neucore_plugin.common.names import path_of
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.loading import read_yaml
from neucore_plugin.datasets import folder
from neucore_plugin.datasets.shards import reader, writer
from neucore_plugin.datasets.triplets import ImageStore, TripletDataset
from neucore_plugin.report import search_page
from neucore_plugin.retrieval import GalleryIndex


def main(base: Path) -> dict:
    root = base / "data"
    known = folder.images(root)
    triplets, gallery = folder.load_split(root, "val", known)
    data = TripletDataset("folder", "val", triplets, gallery, ImageStore(known, ColourModel().image_processor))
    references = [data[place]["reference_image"].mean().item() for place in range(len(data))]
    writer.write_shards(base / "shards", "folder", known, {"val": (triplets, gallery)}, progress=False)
    images, splits, _ = reader.read_shards(base / "shards")
    GalleryIndex.build(ColourModel(), root / "images", progress=False).save(base / "index")
    index = GalleryIndex.load(base / "index", model=ColourModel())
    hits = index.search(triplets[0].reference, "red", k=len(index) - 1)
    for given in sys.argv[2:]:  # the reference as a user of this locale writes it
        assert index.search(given, "red", k=2) == hits[:2], given
    search_page(base / "page.html", index.reference(triplets[0].reference)[0], triplets[0].caption, hits)
    ConceptVocabulary.from_captions([triplet.caption.split() for triplet in triplets], 1).to_json(base / "words.json")
    code = cli.main(["vocab", "folder", "--root", os.fspath(root), "--split", "val", "--min-count", "1", "--json"])
    parsed = cli.build_parser().parse_args(["search", "--checkpoint", "c", "--folder", "f", "--text", sys.argv[2]])
    (base / path_of("ein Häuschen")).mkdir()
    return {
        "text": parsed.text,
        "path of a config": expanded("ein Häuschen").is_dir(),
        "images": list(known),
        "triplets": [(t.reference, t.caption, t.targets) for t in triplets],
        "gallery": gallery.ids,
        "data": data.fingerprint,
        "references": references,
        "shards": [image.name for image in images.values()],
        "from shards": splits["val"][0] == triplets,
        "read": sum(len(image.read()) for image in images.values()),
        "index": index.names,
        "hits": [(hit.name, round(hit.score, 6)) for hit in hits],
        "shown": search_page(base / "page.html", None, "x", hits),
        "words": ConceptVocabulary.from_json(base / "words.json").words,
        "yaml": read_yaml(base / "mine.yaml"),
        "code": code,
    }


if __name__ == "__main__":
    found = main(Path(sys.argv[1]))
    with open(Path(sys.argv[1]) / "found.json", "w", encoding="ascii") as stream:
        json.dump(found, stream)
