"""Where the checkout and the real data lie.

NEUCORE_TEST_DATA names a folder of real annotation files and recorded cases (cirr/, fashioniq/, shoes/, circo/,
official/); without it `../shared/data` beside the checkout is looked at. Tests of files that are not there are skipped.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent  # of the checkout
PROJECTS = ROOT / "projects" / "neucore"
REAL = Path(os.environ.get("NEUCORE_TEST_DATA") or ROOT.parent / "shared" / "data")


def needs_real(*parts: str) -> pytest.MarkDecorator:
    """Skip where a file or folder of the real data is absent, and say which and how to name the folder."""
    path = REAL.joinpath(*parts)
    return pytest.mark.skipif(
        not path.exists(), reason=f"{path} is absent; NEUCORE_TEST_DATA names the folder of real data"
    )
