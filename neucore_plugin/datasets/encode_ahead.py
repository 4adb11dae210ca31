"""Features of frozen encoders, computed once before training, into caches on disk."""

from collections.abc import Sequence
from pathlib import Path

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import write_json


def _bad_images(failures: Sequence[tuple[Path, str]], folder: str | Path) -> DataError:
    listing = Path(folder) / "bad_images.json"
    write_json(listing, [{"path": str(path), "reason": reason} for path, reason in failures])
    shown = "\n  ".join(reason for _, reason in failures[:10])  # each names its file
    more = f"\n  ... and {len(failures) - 10} more" if len(failures) > 10 else ""
    return DataError(
        f"{len(failures)} images cannot be read (all of them: {listing}). Replace them, or "
        f"delete the files and every mention of them\n  {shown}{more}"
    )
