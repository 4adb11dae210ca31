"""Small shards of whole samples for the tests, and the data sets over them and over the same pictures in a folder."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from neucore_plugin.datasets.shards import reader, stream, writer
from neucore_plugin.datasets.triplets import Gallery, ImageStore, TripletDataset

# Numbers of images, which a stream and a folder give out in another order.
NUMBERED = {"reference_key", "target_key", "right_keys", "reference_keys", "text_keys"}


def noisy(image: Image.Image) -> torch.Tensor:
    """Augmented by torch's and by python's generator."""
    return pil_to_tensor(image).float() + torch.rand(1) + random.random()


def write(data, out: Path, **options: Any) -> Path:
    """The folder of whole samples of the shapes: 16 shards, of 9 or 10 of the 149 queries each."""
    paths, splits = data
    settings = {"max_bytes": 100_000, "workers": 2, "progress": False} | options
    return writer.write_stream(out, "folder", paths, splits, **settings).parent


def edit_manifest(out: Path, change) -> None:
    path = out / reader.MANIFEST
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def streamed(root: str | Path, split: str = "train", processor=noisy, **options: Any) -> stream.TripletStream:
    found = stream.open_stream(str(root), allow_remote=True)
    triplets, files = found.train[split]
    numbers = {triplet.query_id: number for number, triplet in enumerate(triplets)}
    names = dict.fromkeys(name for triplet in triplets for name in (triplet.reference, *triplet.targets))
    store = ImageStore(names, processor)
    settings = {"written": triplets, "numbers": numbers, "shards": files, "buffer": 16} | options
    return stream.TripletStream("folder", split, triplets, Gallery((), ()), store, train=True, **settings)


def in_folder(data, split: str = "train", processor=noisy) -> TripletDataset:
    paths, splits = data
    triplets, gallery = splits[split]
    return TripletDataset("folder", split, triplets, gallery, ImageStore(paths, processor), train=True)


def indices(batches: Iterable[dict]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]
