"""The plug-in inside the host: registration, defaults mended in place, errors of the import."""

import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lavis.models
import lavis.processors
import pytest
from lavis.common.registry import registry
from lavis.datasets.builders import dataset_zoo
from lavis.models import load_model, load_model_and_preprocess  # before the plug-in, as a user's script may
from places import PROJECTS

import neucore_plugin
from neucore_plugin.common.errors import CheckpointError, ConfigError, NeucoreError
from neucore_plugin.host import importing, registration


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter outside the repository; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(sys.executable).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def names() -> dict[str, dict]:
    return {kind: dict(content) for kind, content in registry.mapping.items() if kind.endswith("name_mapping")}


def test_everything_is_registered():
    assert registry.get_model_class("neucore").__module__ == "neucore_plugin.models.neucore"
    assert registry.get_task_class("composed_image_retrieval") is not None
    assert {"runner_base", "runner_iter", "runner_cir", "runner_cir_iter"} <= set(registry.list_runners())
    assert {"cir_image", "cir_caption"} <= set(registry.list_processors())
    assert "emoji" in registry.list_datasets()
    assert "linear_warmup_cosine_lr" in registry.list_lr_schedulers()


def test_registering_again_changes_nothing():
    before = names()
    for _ in range(3):
        neucore_plugin.register()
    assert names() == before


def test_reload_takes_the_new_class():
    module = importlib.import_module("neucore_plugin.processors")
    mapping = registry.mapping["processor_name_mapping"]
    before = mapping["cir_caption"], mapping["cir_image"]
    try:
        importlib.reload(module)
        assert registry.get_processor_class("cir_caption") is module.CaptionProcessor
        assert module.CaptionProcessor is not before[0]
    finally:
        mapping["cir_caption"], mapping["cir_image"] = before
        module.CaptionProcessor, module.ImageProcessor = before


def test_reload_of_the_package_leaves_one_hook():
    def hooks() -> int:
        return sum(type(finder).__name__ == "_HostFinder" for finder in sys.meta_path)

    assert hooks() == 1
    importlib.reload(neucore_plugin)
    assert hooks() == 1


def test_same_file_under_a_second_name_is_left_out():
    task = registry.get_task_class("composed_image_retrieval")
    path = inspect.getfile(task)
    spec = importlib.util.spec_from_file_location("__second_main__", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["__second_main__"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["__second_main__"]
    assert registry.get_task_class("composed_image_retrieval") is task


def test_a_name_held_by_another_class_is_an_error():
    class Other(lavis.processors.BaseProcessor):
        pass

    with pytest.raises(
        importing.HostError, match=r"processor name 'cir_image' is held by neucore_plugin\.processors\.Image"
    ):
        registration.register_processor("cir_image")(Other)


def test_the_hosts_own_checks_still_hold():
    with pytest.raises(AssertionError, match="must inherit"):
        registration.register_task("never_registered")(dict)
    assert registry.get_task_class("never_registered") is None


def test_load_model_needs_no_type_also_by_older_references():
    for function in (load_model, load_model_and_preprocess, lavis.models.load_model):
        assert inspect.signature(function).parameters["model_type"].default is None
    assert inspect.signature(load_model).parameters["device"].default == "cpu"
    assert inspect.signature(load_model).parameters["checkpoint"].default is None


def test_other_models_keep_their_own_complaint():
    with pytest.raises(AssertionError, match="Unknown model type None"):
        load_model("blip_caption")


def test_zoos_list_ours():
    assert "embedded" in lavis.models.model_zoo.model_zoo["neucore"]
    assert "neucore" in str(lavis.models.model_zoo)
    assert "emoji" in dataset_zoo.get_names()
    assert "blip_caption" in lavis.models.model_zoo.model_zoo


ORDERS = """
import neucore_plugin; import lavis
import lavis; import neucore_plugin
import neucore_plugin.task
from neucore_plugin.processors import ImageProcessor
import neucore_plugin; neucore_plugin.register(); import lavis
"""


def test_import_order_does_not_matter(tmp_path):
    """Each order in a process without lavis, forked from one that has the libraries below it: they take the time."""
    code = f"""
    import os, sys, warnings
    import pydantic, timm, torch, torchvision, transformers.modeling_utils, webdataset
    assert not {{"lavis", "neucore_plugin"}} & set(sys.modules)
    for order in {ORDERS.strip().splitlines()!r}:
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0, order
            continue
        exec(order)
        from lavis.common.registry import registry
        import lavis.models
        kinds = ("model", "task", "runner", "builder", "processor")
        names = ("neucore", "composed_image_retrieval", "runner_cir", "emoji", "cir_image")
        found = [registry.mapping[kind + "_name_mapping"][name] for kind, name in zip(kinds, names)]
        assert all(getattr(sys.modules[c.__module__], c.__name__) is c for c in found), found
        assert "neucore" in lavis.models.model_zoo.model_zoo
        print(registry.get_path("cache_root"), flush=True)
        os._exit(0)
    """
    assert python(code, NEUCORE_CACHE=str(tmp_path)).split() == [str(tmp_path)] * 5


def test_threads_that_register_at_once_wait_for_each_other():
    code = """
    import threading
    import neucore_plugin
    start, done = threading.Barrier(3), []

    def first_use():
        start.wait()
        neucore_plugin.register()
        from lavis.common.registry import registry
        done.append(registry.get_task_class("composed_image_retrieval") is not None)

    threads = [threading.Thread(target=first_use) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(done)
    """
    assert python(code) == "[True, True, True]"


@pytest.mark.slow
def test_a_server_that_forks_workers_has_imported_the_host_for_them():
    code = f"""
    import multiprocessing, sys
    from neucore_plugin import launch
    launch.prepared({str(PROJECTS / "train_emoji.yaml")!r})
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(pool.apply(eval, ("{{'lavis.models', 'neucore_plugin.task'}} <= set(__import__('sys').modules)",)))
    """
    assert python(code).splitlines()[-1] == "True"


def test_a_start_imports_nothing_slow_and_leaves_nothing_behind():
    """After `load_model("neucore")`: no package that nothing here needs, no stand-in, no finder but the hook's."""
    code = """
    import sys
    import neucore_plugin
    from lavis.models import load_model
    load_model("neucore")
    from neucore_plugin.host import deferred
    names = set(deferred.OF_HOST) | set(deferred.SLOW)
    print(sorted(names & set(sys.modules)))
    print([name for name, module in sys.modules.items() if isinstance(module, deferred._Module)])
    waiting = [finder for finder in sys.meta_path if isinstance(finder, deferred._Package)]
    print(all(finder.calls and not finder.put_off for finder in waiting))
    import torch._dynamo
    from torch._dynamo.utils import is_compile_supported
    from torchvision.ops import roi_align
    boxes = torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])
    print(tuple(roi_align(torch.ones(1, 2, 4, 4), boxes, 2).shape))
    """
    assert python(code).splitlines() == ["[]", "[]", "True", "(1, 2, 2, 2)"]


def test_what_the_host_puts_off_is_named_or_works():
    """The host's own lines with each: an error that names the package where it is absent, else the package's work."""
    code = """
    import importlib.util, sys
    import neucore_plugin, lavis
    import numpy as np, torch
    from lavis.common import utils
    from lavis.processors import randaugment
    from lavis.models.timesformer import vit
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    uses = {
        "cv2": lambda: randaugment.rotate_func(image, 0).shape == (4, 4, 3),
        "iopath": lambda: utils.g_pathmgr.exists("/no/such/file") is False,
        "einops": lambda: tuple(vit.rearrange(torch.ones(2, 6), "b (h w) -> b h w", h=2).shape) == (2, 2, 3),
        "fairscale": lambda: isinstance(vit.checkpoint_wrapper(torch.nn.Linear(2, 2)), torch.nn.Module),
        "pandas": lambda: utils.pd.DataFrame({"a": [1]}).shape == (1, 1),
    }
    for name, use in uses.items():
        there = importlib.util.find_spec(name) is not None
        try:
            assert use() and there, name
        except ModuleNotFoundError as error:
            assert not there and "is not installed; run: pip install " in str(error), (name, error)
            print("named", file=sys.stderr)
    print("done")
    """
    assert python(code) == "done"


def test_importing_the_package_is_light():
    code = """
    import neucore_plugin, sys
    assert not {"torch", "lavis", "numpy", "pydantic"} & set(sys.modules)
    from neucore_plugin import report, retrieval
    assert not {"torch", "jinja2"} & set(sys.modules)
    for package in (report, retrieval):
        assert all(getattr(package, name) for name in package.__all__)
    assert not [name for name in sys.modules if name.startswith(("lavis", "neucore_plugin.models"))]
    """
    python(code)


NUMPY = ImportError("numpy.core.multiarray failed")
NO_HOST = ModuleNotFoundError("No module named 'lavis'", name="lavis")


@pytest.mark.parametrize(
    ("error", "installed", "message"),
    [
        (NUMPY, {"numpy": "2.1.0", "transformers": "4.26.1"}, r"numpy 2\.1\.0.*pip install 'numpy<2'"),
        (ImportError("apply_chunking"), {"transformers": "6.0.1"}, r"pip install 'transformers>=4\.25,<6'"),
        (ImportError("apply_chunking"), {"transformers": "4.24.0"}, r"pip install 'transformers>=4\.25,<6'"),
        (ImportError("x"), {"pyarrow": "26.0.1", "transformers": "4.26.1"}, r"pip install 'pyarrow<26'"),
        (ImportError("x"), {"pyarrow": "26.0.1", "transformers": "5.24.0"}, r"ImportError: x.*constraints\*\.txt"),
        (NO_HOST, {"transformers": "4.26.1"}, "pip install salesforce-lavis==1.0.2"),
        (NO_HOST, {"transformers": "4.57.6"}, "run: neucore setup-host"),
        (NO_HOST, {"transformers": "5.24.0"}, "run: neucore setup-host"),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), {}, "no module named cv2; run: pip install -e ."),
        (OSError("libGL.so.1"), {}, r"OSError: libGL\.so\.1.*constraints\*\.txt"),
    ],
)
def test_import_failures_are_explained(monkeypatch, error, installed, message):
    def version(package: str) -> str:
        if package not in installed:
            raise importing.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importing.metadata, "version", version)
    explained = importing.explain_import_failure(error)
    assert isinstance(explained, NeucoreError)
    assert isinstance(explained, ImportError)
    with pytest.raises(importing.HostError, match=message):
        raise explained


IMPORTS = (
    "import neucore_plugin; neucore_plugin.register()",
    "import neucore_plugin; import lavis",
    "import neucore_plugin; from lavis.models import load_model",
    "import neucore_plugin.task",
    "import neucore_plugin; neucore_plugin.load_model('x.pth')",
)


@pytest.mark.parametrize("folder", [True, False], ids=["our folder of that name", "nothing"])
def test_a_missing_host_is_one_clear_error(tmp_path, folder):
    """As in an environment without salesforce-lavis; our two modules of that name may be in the way, and work."""
    if folder:
        (tmp_path / "lavis").mkdir()
        (tmp_path / "lavis" / "train.py").write_text("print('ours')")
    code = f"""
    import sys
    from importlib.machinery import PathFinder
    class InTheWay:
        def __init__(self, finders):
            self.finders = finders
        def find_spec(self, name, path=None, target=None):
            if name == "lavis":
                return PathFinder.find_spec(name, [{str(tmp_path)!r}])
            return next((spec for each in self.finders if (spec := each.find_spec(name, path, target))), None)
    sys.meta_path[:] = [InTheWay(list(sys.meta_path))]
    from neucore_plugin.host.importing import HostError
    for line in {IMPORTS!r}:
        try:
            exec(line)
        except HostError as error:
            print(error)
        for name in [name for name in sys.modules if name.startswith("lavis")]:
            del sys.modules[name]
    if {folder}:
        import lavis.train
    """
    remedy = "neucore setup-host" if importing.beside_todays_packages() else "pip install salesforce-lavis==1.0.2"
    wanted = [f"`import lavis` failed: no module named lavis; run: {remedy}"] * len(IMPORTS)
    wanted = wanted if not folder else [wanted[0], *wanted[2:]]  # a mere folder can be imported, but for its parts
    assert python(code).splitlines() == wanted + ["ours"] * folder


def test_before_any_package_is_there_python_decides_which_host(monkeypatch):
    def version(package: str) -> str:
        raise importing.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importing.metadata, "version", version)
    for python_version, today in (((3, 10), False), ((3, 11), False), ((3, 12), True), ((3, 14), True)):
        monkeypatch.setattr(importing.sys, "version_info", python_version)
        assert importing.beside_todays_packages() == today


def test_face_refuses_what_cannot_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        neucore_plugin.load_model(tmp_path / "gone.pth")
    with pytest.raises(ConfigError, match="leave out model_type='embedded'"):
        neucore_plugin.load_model(tmp_path / "gone.pth", model_type="embedded")
    with pytest.raises(ConfigError, match="Did you mean 'embedded'"):
        neucore_plugin.load_model(model_type="embeded")
