"""Writes an index of the earlier format, as version 0.9 did."""

import json

import numpy as np

from neucore_plugin.common.files import sha256_file
from neucore_plugin.common.names import name_of
from neucore_plugin.retrieval.sources import relative


def save_earlier(index, folder, number=1):
    """`folder` becomes an index "neucore-index-1" of generation `number`."""
    folder.mkdir(parents=True)
    keys = {key: f"{key}-{number}.npy" for key in index.encodings}
    for key, value in index.encodings.items():
        np.save(folder / keys[key], value.numpy(), allow_pickle=False)
    failures = [{"name": f.name, "path": name_of(f.path), "reason": f.reason} for f in index.failures]
    rows = {"names": index.names, "paths": [relative(p, index.root) for p in index.paths], "failures": failures}
    (folder / f"ids-{number}.json").write_text(json.dumps(rows))
    files = [*keys.values(), f"ids-{number}.json"]
    manifest = {
        "format": "neucore-index-1",
        "generation": number,
        "count": len(index),
        "model": index.model_fingerprint,
        "root": name_of(index.root),
        "encodings": keys,
        "ids": f"ids-{number}.json",
        "files": {n: {"sha256": sha256_file(folder / n), "bytes": (folder / n).stat().st_size} for n in files},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
