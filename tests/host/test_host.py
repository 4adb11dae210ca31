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
    import cv2, decord, fairscale, pydantic, spacy, timm, torch, torchvision, transformers, webdataset
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


@pytest.mark.parametrize(
    ("error", "installed", "message"),
    [
        (ImportError("numpy.core.multiarray failed"), {"numpy": "2.1.0"}, r"numpy 2\.1\.0.*pip install 'numpy<2'"),
        (ImportError("apply_chunking"), {"transformers": "4.57.1"}, r"pip install 'transformers>=4\.25,<4\.27'"),
        (ImportError("x"), {"pyarrow": "26.0.1"}, r"pip install 'pyarrow<26'"),
        (ModuleNotFoundError("No module named 'lavis'", name="lavis"), {}, "pip install salesforce-lavis==1.0.2"),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), {}, "no module named cv2; run: pip install -e ."),
        (OSError("libGL.so.1"), {}, r"OSError: libGL\.so\.1.*constraints\.txt"),
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


def test_a_missing_host_is_one_clear_error(tmp_path):
    """As in an environment without salesforce-lavis, where only our folder of that name may be in the way."""
    (tmp_path / "lavis").mkdir()
    code = """
    import sys
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "lavis": raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Hide())
    import neucore_plugin
    try:
        neucore_plugin.register()
    except neucore_plugin.host.importing.HostError as error:
        print(error)
    """
    assert python(code) == "`import lavis` failed: no module named lavis; run: pip install salesforce-lavis==1.0.2"


def test_face_refuses_what_cannot_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        neucore_plugin.load_model(tmp_path / "gone.pth")
    with pytest.raises(ConfigError, match="leave out model_type='embedded'"):
        neucore_plugin.load_model(tmp_path / "gone.pth", model_type="embedded")
    with pytest.raises(ConfigError, match="Did you mean 'embedded'"):
        neucore_plugin.load_model(model_type="embeded")
