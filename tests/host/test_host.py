"""The plug-in inside the host: registration, defaults mended in place, processes, the main flow's own errors."""

import importlib
import inspect
import os
import socket
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

import lavis.models
import lavis.processors
import lavis.tasks
import pytest
import torch
from lavis.common.registry import registry
from lavis.datasets.builders import dataset_zoo
from lavis.models import load_model, load_model_and_preprocess  # before the plug-in, as a user's script may
from omegaconf import OmegaConf

import neucore_plugin
from neucore_plugin import launch
from neucore_plugin.common import distributed, files
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


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "own"))
    assert files.cache_dir() == tmp_path / "own"
    assert not (tmp_path / "own").exists()
    assert files.cache_dir(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("NEUCORE_CACHE")
    assert files.cache_dir() == Path.home() / ".cache" / "neucore"
    monkeypatch.chdir(tmp_path)
    assert files.cache_dir("relative") == tmp_path / "relative"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import neucore_plugin", "import lavis"),
        ("import lavis", "import neucore_plugin"),
        ("import neucore_plugin.task", ""),
        pytest.param("from neucore_plugin.processors import ImageProcessor", "", marks=pytest.mark.slow),
        pytest.param("import neucore_plugin; neucore_plugin.register()", "import lavis", marks=pytest.mark.slow),
    ],
)
def test_import_order_does_not_matter(tmp_path, first, second):
    code = f"""
    {first}
    {second or "pass"}
    from lavis.common.registry import registry
    import lavis.models
    kinds = ("model", "task", "runner", "builder", "processor")
    held = ("neucore", "composed_image_retrieval", "runner_cir", "emoji", "cir_image")
    found = [registry.mapping[kind + "_name_mapping"][name] for kind, name in zip(kinds, held)]
    import sys
    assert all(getattr(sys.modules[c.__module__], c.__name__) is c for c in found), found
    assert "neucore" in lavis.models.model_zoo.model_zoo
    print(registry.get_path("cache_root"))
    """
    assert python(code, NEUCORE_CACHE=str(tmp_path)) == str(tmp_path)


def test_importing_the_package_is_light():
    code = "import neucore_plugin, sys; print(sorted({'torch', 'lavis', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert python(code) == "[]"


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


def run_config(**values):
    return OmegaConf.create({"device": "auto", "dist_url": "env://", "dist_backend": "auto", **values})


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_one_process(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_cfg = run_config(distributed=True)
    distributed.init_distributed(run_cfg)
    assert (run_cfg.distributed, run_cfg.rank, run_cfg.world_size, run_cfg.gpu) == (False, 0, 1, 0)
    assert run_cfg.device == "cpu"
    assert not torch.distributed.is_initialized()


def test_cuda_that_is_not_there(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="got cuda:1, but torch sees no CUDA device here; use auto or cpu"):
        distributed.init_distributed(run_config(device="cuda:1"))
    with pytest.raises(ConfigError, match="got 'gpu'; allowed: auto, cpu, cuda or cuda:N"):
        distributed.pick_device("gpu")


def test_two_processes_with_gloo(tmp_path):
    """Ranks, device and job id agree; the host's meters sum over processes on a CPU."""
    code = """
    import sys
    import neucore_plugin
    import torch.distributed as dist
    from omegaconf import OmegaConf
    from neucore_plugin import launch
    from neucore_plugin.common import distributed
    neucore_plugin.register()
    from lavis.common.logger import SmoothedValue
    run = OmegaConf.create({"device": "cpu", "dist_url": "file://" + sys.argv[1], "dist_backend": "auto"})
    distributed.init_distributed(run)
    meter = SmoothedValue()
    meter.update(1.0 + run.rank)
    meter.synchronize_between_processes()
    print(run.rank, run.world_size, run.distributed, run.dist_backend, meter.count, meter.total, launch.new_job_id())
    dist.destroy_process_group()
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(tmp_path / "meet")]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    words = [process.communicate(timeout=300)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [line[:6] for line in words] == [[rank, "2", "True", "gloo", "2", "3.0"] for rank in "01"]
    assert words[0][6] == words[1][6]


def free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE not set"),
        ({"WORLD_SIZE": "2"}, r"RANK not set, WORLD_SIZE '2'.*torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "Ranks are whole numbers below the number of processes"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK 'one'"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE '-2'"),
        ({"SLURM_PROCID": "3", "MASTER_ADDR": "localhost"}, "SLURM_PROCID '3', SLURM_NTASKS '1'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "process 0 of 2 .* lacks MASTER_ADDR and MASTER_PORT.*torchrun"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "process 1 of 2 .* lacks MASTER_PORT"),
    ],
)
def test_half_an_announcement_of_processes(alone, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NeucoreError, match=message):
        distributed.init_distributed(run_config(device="cpu"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("url", ["env://", "tcp://127.0.0.1:{port}", "file://{folder}/meet"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_others_never_come(alone, monkeypatch, tmp_path, rank, url):
    """The first waits in vain for a second process; the second finds nobody at the address."""
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
    port = free_port()
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    place = f"{tmp_path}/meet" if url.startswith("file") else f"127.0.0.1:{port}"
    with pytest.raises(NeucoreError, match=rf"process {rank} of 2 could not meet the others at .*{place} \(.+\)"):
        distributed.init_distributed(run_config(device="cpu", dist_url=url.format(port=port, folder=tmp_path)))
    assert not torch.distributed.is_initialized()


def test_places_that_cannot_be_met_at(alone, monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for url in ("nowhere", "http://a:1", f"file://{tmp_path}/no/such/folder/meet"):
        with pytest.raises(NeucoreError, match=f"could not meet the others at {url}"):
            distributed.init_distributed(run_config(device="cpu", dist_url=url))
    with pytest.raises(ConfigError, match="run.dist_backend is nccl, which joins GPUs, but the device is cpu"):
        distributed.init_distributed(run_config(device="cpu", dist_backend="nccl"))


def test_job_ids_differ():
    assert len({launch.new_job_id() for _ in range(20)}) == 20


def test_registry_tables_know_both_sides():
    tables = launch.registry_tables()
    assert Path(tables.models["neucore"]["embedded"]).is_file()
    assert Path(tables.models["blip_caption"]["base_coco"]).is_file()
    assert {"runner_cir", "runner_base"} <= set(tables.runners)
    assert "test_combo" in tables.splits["emoji"]


def test_main_flow_of_the_host_itself(tmp_path, alone):
    """Arch, task, data set and runner that are none of ours go the stock way, with their keys unchecked."""
    seen = []

    class Task(lavis.tasks.BaseTask):
        def build_datasets(self, cfg):
            return {"stub": {"train": [1, 2]}}

        def build_model(self, cfg):
            return ("model", cfg.model_cfg.own_key)

    class Runner:
        def __init__(self, cfg, job_id, task, model, datasets):
            seen.append((model, datasets, cfg.run_cfg.own_key, cfg.run_cfg.rank))

        def train(self):
            return "trained"

        def evaluate(self, skip_reload=False):
            return f"evaluated {skip_reload}"

    mappings = registry.mapping
    mappings["task_name_mapping"]["stub_task"], mappings["runner_name_mapping"]["stub_runner"] = Task, Runner
    path = tmp_path / "stock.yaml"
    path.write_text(
        "model: {arch: blip_caption, model_type: base_coco, own_key: 1}\n"
        "datasets: {coco_caption: {own_key: 2}}\n"
        "run: {task: stub_task, runner: stub_runner, own_key: 3, device: cpu, seed: 1}\n"
    )
    try:
        assert launch.run(path) == "trained"
        assert launch.run(path, evaluate=True) == "evaluated True"
    finally:
        del mappings["task_name_mapping"]["stub_task"], mappings["runner_name_mapping"]["stub_runner"]
    assert seen[0] == (("model", 1), {"stub": {"train": [1, 2]}}, 3, 0)
    assert registry.get("configuration").run_cfg.own_key == 3


def test_a_bad_config_is_told_before_data_are_touched(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("data were touched")

    monkeypatch.setattr(registry.get_task_class("composed_image_retrieval"), "build_datasets", never)
    path = tmp_path / "bad.yaml"
    path.write_text("model: {arch: neucore}\ndatasets: {emojy: {}}\nrun: {max_epoch: 1, sead: 1}\n")
    with pytest.raises(ConfigError) as caught:
        launch.run(path)
    assert "'emojy' is no known data set. Did you mean 'emoji'?" in str(caught.value)
    assert "run.sead: unknown key (given 1). Did you mean 'seed'?" in str(caught.value)


def test_face_refuses_what_cannot_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        neucore_plugin.load_model(tmp_path / "gone.pth")
    with pytest.raises(ConfigError, match="leave out model_type='embedded'"):
        neucore_plugin.load_model(tmp_path / "gone.pth", model_type="embedded")
    with pytest.raises(ConfigError, match="Did you mean 'embedded'"):
        neucore_plugin.load_model(model_type="embeded")
