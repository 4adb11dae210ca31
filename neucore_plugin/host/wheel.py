"""The host, salesforce-lavis 1.0.2, made installable beside today's packages.

Its metadata asks for packages of 2022 (transformers < 4.27, timm 0.4.12, opencv for numpy 1) that have no wheel for
Python 3.12 and later, so pip refuses it there. The released wheel is fetched, its sum checked, and written again as
version 1.0.2+neucore.1: the same folder `lavis`, whose `__init__` runs within `host.hook.host_import` whoever imports
it; without the four further top-level folders (app, docs, projects, tests); asking for nothing, since setup.py names
what is used. Standard library, and pip or uv.
"""

import base64
import csv
import hashlib
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

from neucore_plugin.host.importing import HostError, beside_todays_packages

NAME, VERSION = "salesforce-lavis", "1.0.2"
SHA256 = "489782efc2d98d8e878112b2758f82ac2e6c10dfcfa087db6656465c7784d49f"
LOCAL = f"{VERSION}+neucore.1"
_INIT = f"""\
# {NAME} {VERSION}, written again by `neucore setup-host`: the released lines below run within what they need.
from neucore_plugin.host.hook import host_import

with host_import():
"""
_WHEN = (2023, 3, 6, 0, 0, 0)  # of the release; the same wheel twice is the same file


def set_up() -> str:
    """Fetch, write again and install for this interpreter; one line that says what was done.

    Raises HostError where the host cannot be fetched or installed; what was installed before is then still there.
    """
    try:
        found = metadata.version(NAME)
    except metadata.PackageNotFoundError:
        found = None
    if found == LOCAL:
        return f"{NAME} {LOCAL} is installed already"
    if found == VERSION and not beside_todays_packages():
        return f"{NAME} {VERSION} is installed already, beside the packages that it asks for"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _pip("download", "--no-deps", "--only-binary=:all:", "--dest", name, f"{NAME}=={VERSION}")
        _pip("install", "--no-deps", "--force-reinstall", str(rewrite(next(folder.glob("*.whl")), folder)))
    return f"{NAME} {LOCAL} is installed" + (f" in the place of {found}" if found else "")


def rewrite(wheel: Path, folder: Path) -> Path:
    """Write the released wheel again, into `folder`. Raises HostError for any other file than the released one."""
    data = wheel.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise HostError(
            f"{wheel.name} is not the released {NAME} {VERSION}: its sha256 is {found}, wanted {SHA256}. Check the "
            "package index that pip is set up with"
        )
    target = folder / f"{NAME.replace('-', '_')}-{LOCAL}-py3-none-any.whl"
    info = f"{NAME.replace('-', '_')}-{LOCAL}.dist-info"
    rows = []
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:

        def put(path: str, content: bytes) -> None:
            new.writestr(zipfile.ZipInfo(path, _WHEN), content, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append((path, f"sha256={digest}", len(content)))

        for path in old.namelist():
            top, _, rest = path.partition("/")
            content = old.read(path)
            if path == "lavis/__init__.py":
                put(path, _around(content))
            elif top == "lavis":
                put(path, content)
            elif top.endswith(".dist-info") and rest == "METADATA":
                content = re.sub(rb"(?m)^(Requires-Dist|Provides-Extra): .*\n", b"", content)
                put(f"{info}/{rest}", re.sub(rb"(?m)^Version: .*$", f"Version: {LOCAL}".encode(), content, count=1))
            elif top.endswith(".dist-info") and rest not in ("RECORD", "top_level.txt"):
                put(f"{info}/{rest}", content)
        record = io.StringIO()
        csv.writer(record, lineterminator="\n").writerows([*rows, (f"{info}/RECORD", "", "")])
        new.writestr(zipfile.ZipInfo(f"{info}/RECORD", _WHEN), record.getvalue(), zipfile.ZIP_DEFLATED)
    return target


def _around(init: bytes) -> bytes:
    """The lines of the host's `__init__` within `host_import`."""
    return _INIT.encode() + textwrap.indent(init.decode(), "    ").encode()


def _pip(*arguments: str) -> None:
    """Run pip for this interpreter; an environment that uv made has none of its own. Raises HostError."""
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        command = [uv, "tool", "run", "pip", "--python", sys.executable]
    else:
        raise HostError("neither pip nor uv is here to fetch the host with; run: python -m ensurepip")
    command += ["--disable-pip-version-check", "--quiet", *arguments]
    if subprocess.run(command).returncode:
        raise HostError(
            f"{NAME} {VERSION} could not be set up: `{' '.join(command)}` failed, see above. It needs a package index "
            "(PIP_INDEX_URL), or a folder that holds the released wheel (PIP_FIND_LINKS)"
        )
