"""Frozen encoders run ahead of the training, once, into caches on disk; or else a look at every image.

Knows no model: a backbone is any object with `image`, `text`, `freeze_image` and `freeze_text`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neucore_plugin.common.errors import DataError, ImageError, first_few
from neucore_plugin.common.files import write_json
from neucore_plugin.common.images import check_images, load_for
from neucore_plugin.datasets.feature_cache import FeatureCache, build_cache, content_fingerprints
from neucore_plugin.datasets.feature_maps import check_files
from neucore_plugin.datasets.triplets import ImageStore, TripletDataset

Features = Iterator[tuple[np.ndarray, np.ndarray]]  # of each item: tokens [n,D], pooled [P]
OnMain = Callable[[Callable[[], FeatureCache]], FeatureCache]


def encode_ahead(
    datasets: Sequence[TripletDataset],
    backbone: Any,
    device: torch.device,
    root: Path,
    on_main: OnMain,
    cache_features: bool,
    output_dir: str | Path,
) -> None:
    """Give the data sets the features of frozen encoders, where these may be kept; read all other images once.

    on_main: runs a function in the main process, which builds a cache below `root` while the others wait and then open
    the same files. Raises DataError listing all images that cannot be read, also in bad_images.json.
    """
    # The pictures of a stream are read as they come, and only then.
    stores = {id(dataset.images): dataset.images for dataset in datasets if not dataset.streamed}.values()
    for store in stores:
        kept = cache_features and backbone.freeze_image and store.processor.deterministic
        if kept and not store.holds_maps:  # those are features already, in full precision
            store.cache = on_main(lambda store=store: _image_features(backbone.image, store, device, root))
        elif not store.checked and (failures := check_files(list(store.paths.values()), store.processor)):
            raise _bad_images(failures, output_dir)
    if cache_features and backbone.freeze_text:
        texts = sorted({text for dataset in datasets for text in dataset.read_texts})
        features = on_main(lambda: _text_features(backbone.text, texts, root))
        for dataset in datasets:
            dataset.text_cache = features


def _image_features(encoder: Any, store: ImageStore, device: torch.device, root: Path) -> FeatureCache:
    files = list(store.paths.values())

    @torch.inference_mode()
    def encode(names: Sequence[str]) -> Features:
        try:
            pixels = torch.stack([store.processor(load_for(store.processor, store.paths[name])) for name in names])
        except ImageError:
            # One is bad: look at all of them now, so that the user mends them in one go.
            raise _bad_images(check_images(files, store.processor), root) from None
        out = encoder(pixels.to(device))
        yield from zip(out["tokens"].cpu().numpy(), out["pooled"].cpu().numpy(), strict=True)

    key = f"{encoder.fingerprint}|{store.processor.fingerprint}"
    # batches of 8 are twice as fast on a CPU as of 32: the activations stay in its cache
    return build_cache(root, "images", key, list(store.paths), content_fingerprints(files), encode, batch_size=8)


def _text_features(encoder: Any, texts: Sequence[str], root: Path) -> FeatureCache:
    @torch.inference_mode()
    def encode(part: Sequence[str]) -> Features:
        out = {key: value.cpu() for key, value in encoder(part).items()}
        for words, mask, sentence in zip(out["words"], out["mask"], out["sentence"], strict=True):
            yield words[mask].numpy(), sentence.numpy()

    return build_cache(root, "texts", encoder.fingerprint, texts, [""] * len(texts), encode, batch_size=64)


def _bad_images(failures: Sequence[tuple[Path, str]], folder: str | Path) -> DataError:
    listing = Path(folder) / "bad_images.json"
    write_json(listing, [{"path": str(path), "reason": reason} for path, reason in failures])
    shown = first_few([reason for _, reason in failures], 10, "\n  ")  # each names its file
    return DataError(
        f"{len(failures)} images cannot be read (all of them: {listing}). Replace them, or "
        f"delete the files and every mention of them\n  {shown}"
    )
