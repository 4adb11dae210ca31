"""The host's wheel, written again without its list of packages."""

import base64
import csv
import hashlib
import importlib.metadata
import io
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from neucore_plugin import cli
from neucore_plugin.host import importing, wheel

INIT = '"""Two\nlines."""\n\nimport os\n\nfrom json import *\n\nif True:\n    VALUE = 1\n'
METADATA = (
    "Metadata-Version: 2.1\nName: salesforce-lavis\nVersion: 1.0.2\nRequires-Python: >=3.7.0\n"
    "Requires-Dist: timm (==0.4.12)\nRequires-Dist: transformers (<4.27,>=4.25.0)\n\nVersion: of the text\n"
)
INFO = "salesforce_lavis-1.0.2.dist-info"


@pytest.fixture
def released(tmp_path, monkeypatch) -> Path:
    """A wheel with the released one's top-level folders, taken for it."""
    path = tmp_path / "salesforce_lavis-1.0.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {
            "app/main.py": "",
            "docs/conf.py": "",
            "lavis/__init__.py": INIT,
            "lavis/models/med.py": "MED = 1\n",
            "lavis/configs/default.yaml": "env: {}\n",
            "projects/run.sh": "",
            "tests/test_x.py": "",
            f"{INFO}/METADATA": METADATA,
            f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{INFO}/LICENSE.txt": "BSD",
            f"{INFO}/top_level.txt": "app\ndocs\nlavis\nprojects\ntests\n",
            f"{INFO}/RECORD": "",
        }.items():
            archive.writestr(name, text)
    monkeypatch.setattr(wheel, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_written_again(released, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    target = wheel.rewrite(released, folder)
    assert target.name == "salesforce_lavis-1.0.2+neucore.1-py3-none-any.whl"
    archive, info = zipfile.ZipFile(target), "salesforce_lavis-1.0.2+neucore.1.dist-info"
    assert archive.testzip() is None
    names = archive.namelist()
    assert {name for name in names if not name.startswith("lavis/")} == {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "LICENSE.txt", "RECORD")
    }
    assert archive.read("lavis/models/med.py") == b"MED = 1\n"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "Requires-Dist" not in metadata
    assert "\nVersion: 1.0.2+neucore.1\n" in metadata
    assert metadata.endswith("\n\nVersion: of the text\n")
    rows = list(csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())))
    assert {row[0] for row in rows} == set(names)
    for path, digest, size in rows[:-1]:
        content = archive.read(path)
        kind, _, value = digest.partition("=")
        assert (kind, int(size)) == ("sha256", len(content))
        assert base64.urlsafe_b64decode(value + "=") == hashlib.sha256(content).digest()
    again = tmp_path / "again"
    again.mkdir()
    assert wheel.rewrite(released, again).read_bytes() == target.read_bytes()


def test_its_init_runs_the_released_lines_within_the_hosts_import(released, tmp_path, monkeypatch):
    from neucore_plugin.host import hook

    events = []

    class Around:
        def __enter__(self):
            events.append("before")

        def __exit__(self, *exception):
            events.append("after")

    monkeypatch.setattr(hook, "host_import", Around)
    (tmp_path / "out").mkdir()
    source = zipfile.ZipFile(wheel.rewrite(released, tmp_path / "out")).read("lavis/__init__.py")
    scope = {"__name__": "lavis", "events": events}
    exec(compile(source, "lavis/__init__.py", "exec"), scope)
    assert events == ["before", "after"]
    assert scope["VALUE"] == 1
    assert "dumps" in scope


def test_another_file_is_refused(released, tmp_path):
    damaged = tmp_path / "damaged.whl"
    damaged.write_bytes(released.read_bytes() + b"x")
    with pytest.raises(
        importing.HostError, match=r"damaged\.whl is not the released salesforce-lavis 1\.0\.2: its sha"
    ):
        wheel.rewrite(damaged, tmp_path)


@pytest.mark.parametrize(
    ("found", "today", "said", "commands"),
    [
        (None, True, "1.0.2+neucore.1 is installed", ["download", "install"]),
        (None, False, "1.0.2+neucore.1 is installed", ["download", "install"]),
        ("1.0.2", True, "1.0.2+neucore.1 is installed in the place of 1.0.2", ["download", "install"]),
        ("1.0.1", False, "1.0.2+neucore.1 is installed in the place of 1.0.1", ["download", "install"]),
        ("1.0.2", False, "1.0.2 is installed already, beside the packages that it asks for", []),
        ("1.0.2+neucore.1", True, "1.0.2+neucore.1 is installed already", []),
    ],
)
def test_setup_host(released, monkeypatch, capsys, found, today, said, commands):
    ran = []

    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    def pip(command, *arguments):
        ran.append(command)
        if command == "download":
            target = Path(arguments[arguments.index("--dest") + 1], released.name)
            target.write_bytes(released.read_bytes())
        else:
            assert Path(arguments[-1]).name == "salesforce_lavis-1.0.2+neucore.1-py3-none-any.whl"
            assert zipfile.is_zipfile(arguments[-1])

    monkeypatch.setattr(wheel.metadata, "version", version)
    monkeypatch.setattr(wheel, "beside_todays_packages", lambda: today)
    monkeypatch.setattr(wheel, "_pip", pip)
    assert cli.main(["setup-host"]) == 0
    assert capsys.readouterr().out == f"salesforce-lavis {said}\n"
    assert ran == commands


def test_no_index_and_no_installer_are_one_error_each(monkeypatch, capfd):
    monkeypatch.setattr(wheel.metadata, "version", lambda name: "1.0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert cli.main(["setup-host"]) == 2
    assert "error: salesforce-lavis 1.0.2 could not be set up: `" in capfd.readouterr().err
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    assert cli.main(["setup-host"]) == 2
    assert "error: neither pip nor uv is here to fetch the host with" in capfd.readouterr().err


def test_an_environment_without_pip_is_served_by_uv(monkeypatch):
    ran = []
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(wheel.subprocess, "run", lambda command: ran.append(command) or SimpleNamespace(returncode=0))
    wheel._pip("download", "x")
    assert ran[0][:6] == ["/bin/uv", "tool", "run", "pip", "--python", wheel.sys.executable]
    assert ran[0][-2:] == ["download", "x"]
