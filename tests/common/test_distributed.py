"""Processes: how they meet, what they exchange, and what is said where they cannot."""

import pickle
import socket
from datetime import timedelta

import pytest
import runner_case
import torch
from lavis.common.logger import SmoothedValue
from omegaconf import OmegaConf

from neucore_plugin import launch
from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, DataError, FileError, NeucoreError


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_main_process_is_one_that_all_share(rank, monkeypatch):
    sent = FileError.of(OSError(28, "No space left on device", "/x"), note="more")

    def broadcast(outcome, src):
        outcome[1] = pickle.loads(pickle.dumps(outcome[1] or sent))

    def refuse():
        raise sent

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    with pytest.raises(FileError, match="^/x: No space left on device; free .* more$") as caught:
        distributed.on_main(refuse)
    assert caught.value.shared
    assert not DataError("of one process").shared


def run_config(**values):
    return OmegaConf.create({"device": "auto", "dist_url": "env://", "dist_backend": "auto", **values})


def test_one_process(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_cfg = run_config(distributed=True)
    distributed.init_distributed(run_cfg)
    assert (run_cfg.distributed, run_cfg.rank, run_cfg.world_size, run_cfg.gpu) == (False, 0, 1, 0)
    assert run_cfg.device == "cpu"
    assert not torch.distributed.is_initialized()


def test_cuda_that_is_not_there(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda:1", "cuda", "mps"):
        message = f"got {device}, but torch sees no such device here; there is cpu; use one of them, or auto"
        with pytest.raises(ConfigError, match=message):
            distributed.init_distributed(run_config(device=device))
    for device in ("gpu", "mps:0", "cuda:-1", "cuda:", "CPU"):
        with pytest.raises(ConfigError, match=f"got '{device}'; allowed: auto, cpu, cuda, cuda:N or mps"):
            distributed.pick_device(device)


def test_devices_that_are_there(alone, monkeypatch):
    """Which they are is torch's word: this machine need not have them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    picked = [distributed.pick_device(name) for name in ("auto", "cuda", "cuda:1", "mps", "cpu")]
    assert picked == ["cuda", "cuda", "cuda:1", "mps", "cpu"]
    with pytest.raises(ConfigError, match="got cuda:2, .*; there is cpu, cuda:0, cuda:1, mps; use one of them"):
        distributed.pick_device("cuda:2")
    run_cfg = run_config(device="mps")
    distributed.init_distributed(run_cfg)
    assert (run_cfg.device, run_cfg.distributed) == ("mps", False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="run.device is mps, on which one process trains, but 2 were started"):
        distributed.init_distributed(run_config(device="mps"))


def what_is_agreed() -> tuple:
    """In a process of a group: what depends on the rank, what all have, a meter of the host summed on a CPU."""
    rank = distributed.rank()
    meter = SmoothedValue()
    meter.update(1.0 + rank)
    meter.synchronize_between_processes()
    backend = torch.distributed.get_backend()
    return (
        rank,
        distributed.world_size(),
        backend,
        meter.count,
        meter.total,
        distributed.gather(rank),
        launch.new_job_id(),
    )


def test_two_processes_with_gloo(tmp_path):
    first, second = runner_case.in_group(tmp_path, what_is_agreed)
    assert first[:6] == (0, 2, "gloo", 2, 3.0, [0, 1])
    assert second == (1, *first[1:])


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
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=0.2))
    port = free_port()
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    place = f"{tmp_path}/meet" if url.startswith("file") else f"127.0.0.1:{port}"
    with pytest.raises(NeucoreError, match=rf"process {rank} of 2 could not meet the others at .*{place} \(.+\)"):
        distributed.init_distributed(run_config(device="cpu", dist_url=url.format(port=port, folder=tmp_path)))
    assert not torch.distributed.is_initialized()


def test_places_that_cannot_be_met_at(alone, monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for url in ("nowhere", "http://a:1", f"file://{tmp_path}/no/such/folder/meet"):
        with pytest.raises(NeucoreError, match=f"could not meet the others at {url}"):
            distributed.init_distributed(run_config(device="cpu", dist_url=url))
    with pytest.raises(ConfigError, match="run.dist_backend is nccl, which joins GPUs, but the device is cpu"):
        distributed.init_distributed(run_config(device="cpu", dist_backend="nccl"))
