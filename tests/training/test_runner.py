"""Both runners on a CPU with the host's real classes, a tiny model and data: the flow, the arithmetic, bad input."""

import json
import logging
import math
from pathlib import Path

import pytest
import runner_case as case
import torch
from lavis.common.registry import registry

from neucore_plugin.common.errors import ConfigError, DataError, NeucoreError
from neucore_plugin.config.run import RunSchema
from neucore_plugin.training.loaders import BatchLoader
from neucore_plugin.training.optimisation import parameter_groups
from neucore_plugin.training.schedule import learning_rate
from neucore_plugin.weights import checkpoint


def log_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


# ---- the whole flow -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", case.KINDS)
def test_trains_validates_and_tests(tmp_path, kind):
    task = case.TinyTask()
    runner = case.make_runner(tmp_path, task=task, **case.KINDS[kind])
    before = checkpoint.fingerprint(runner.bare_model.state_dict())
    metrics = runner.train()
    assert checkpoint.fingerprint(runner.bare_model.state_dict()) != before
    lines = log_lines(runner.output_dir)
    assert "config" in lines[0]
    rounds = [4, 8, 12, 13] if kind == "iters" else [5, 10, 15]  # 22 samples in batches of 4: 5 full ones
    assert [line["iteration"] for line in lines if "train_loss" in line] == rounds
    assert [line["iteration"] for line in lines if "dev_agg_metrics" in line] == rounds
    assert sum(map(len, task.train_indices)) == rounds[-1] * 4
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert losses[-1] < losses[0]
    assert lines[-1]["epoch"] == "best"
    assert lines[-1]["test_error"] == metrics["test"]["error"] == -metrics["test"]["agg_metrics"]
    assert task.seen == {"dev": list(range(7)), "test": list(range(8))}
    assert task.prepared == 1


def test_provenance_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    task = case.TinyTask()
    runner = case.make_runner(tmp_path, task=task)
    metrics = runner.train()
    (given, provenance), folder = task.finished[0], runner.output_dir
    assert given == metrics
    best = checkpoint.load(folder / "checkpoint_best.pth")
    assert best["architecture"] == {"arch": "tiny"}
    assert not any(name.startswith("encoder") for name in best["model"])
    assert set(best["frozen"]) == {"encoder.linear", "encoder.norm"}
    assert provenance["checkpoint"]["path"] == str(folder / "checkpoint_best.pth")
    assert provenance["threads"] == 7
    assert provenance["checkpoint"]["fingerprint"] == checkpoint.fingerprint(best["model"], extra=best["frozen"])
    assert provenance["data"] == {"test": "points-8-2"}
    assert {"python", "torch", "transformers", "salesforce-lavis", "neucore_plugin"} <= set(provenance["versions"])
    assert (provenance["seed"], provenance["world_size"]) == (5, 1)
    written = json.loads((folder / "test_metrics.json").read_text())
    assert written["metrics"] == metrics
    assert written["files"] == [str(folder / "results.json")]
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["kind"], record["config"]["run"]["seed"]) == ("finished", "train", 5)
    assert "max_epoch: 3" in (folder / "config.yaml").read_text()
    assert registry.get_path("output_dir") == str(folder)
    assert registry.get_path("result_dir") == str(folder / "result")
    assert (folder / "result").is_dir()


@pytest.mark.parametrize("kind", case.KINDS)
def test_best_is_the_highest_mean_over_the_validation_splits(tmp_path, kind):
    given = [-4.0, -6.0, -3.0, 1.0, 0.0, -6.0, -1.0, -1.0]  # means -5, -1, -3, -1: a tie does not replace the second
    run = {**case.KINDS[kind], "valid_splits": ["dev", "test"]}
    runner = case.make_runner(tmp_path, task=case.TinyTask(metrics=given), **run)
    states = []
    validate = runner._validate
    runner._validate = lambda: (states.append(checkpoint.plain(runner.bare_model.out.weight).clone()), validate())[1]
    runner.train()
    best = checkpoint.load(runner.output_dir / "checkpoint_best.pth")
    assert best["progress"]["best_metric"] == -1.0
    assert best["progress"]["best_epoch"] == 1
    assert torch.equal(best["model"]["out.weight"], states[1])
    assert torch.equal(runner.bare_model.out.weight.detach(), states[1])  # tested with it, not with the last
    assert not torch.equal(states[1], states[-1])
    logged = [line["dev_best_epoch"] for line in log_lines(runner.output_dir) if "dev_best_epoch" in line]
    assert logged[:3] == [0, 1, 1]


def test_without_validation_the_last_weights_are_tested(tmp_path):
    runner = case.make_runner(tmp_path, valid_splits=[])
    runner.train()
    best, last = (checkpoint.load(runner.output_dir / f"checkpoint_{name}.pth") for name in ("best", "last"))
    assert checkpoint.fingerprint(best["model"]) == checkpoint.fingerprint(last["model"])
    assert best["progress"]["iteration"] == 15


def test_evaluation_of_the_weights_as_they_are(tmp_path):
    """The host's `skip_reload`: nothing is loaded; here nothing is written either."""
    runner = case.make_runner(tmp_path)
    best = runner.train()
    written = (runner.output_dir / "test_metrics.json").read_bytes()
    runner.bare_model.out.weight.data.zero_()
    worse = runner.evaluate(skip_reload=True)
    assert worse["test"]["error"] != best["test"]["error"]
    assert runner.eval_epoch("test", "best", skip_reload=True) == worse["test"]
    assert runner.bare_model.out.weight.abs().sum() == 0
    assert (runner.output_dir / "test_metrics.json").read_bytes() == written
    assert runner.eval_epoch("test", "best") == best["test"]


def test_workers_change_nothing_and_order_depends_on_the_seed(tmp_path):
    orders, states = [], []
    for number, run in enumerate(({"num_workers": 0}, {"num_workers": 2}, {"seed": 6})):
        task = case.TinyTask()
        runner = case.make_runner(tmp_path / str(number), task=task, **run)
        runner.train()
        orders.append(task.train_indices)
        states.append(checkpoint.fingerprint(runner.bare_model.state_dict()))
    assert orders[0] == orders[1] != orders[2]
    assert states[0] == states[1] != states[2]
    epochs = [[index for batch in orders[0][start : start + 5] for index in batch] for start in (0, 5, 10)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


# ---- the arithmetic of a step ---------------------------------------------------------------


def rates(kind: str, total_steps: int, steps, **settings) -> list[float]:
    run = RunSchema(lr_sched=kind, max_epoch=1, **settings)
    return [learning_rate(run, step, total_steps, 10) for step in steps]


def test_schedules_in_closed_form():
    cosine = {"init_lr": 1.0, "min_lr": 0.2, "warmup_lr": 0.1, "warmup_steps": 4}
    expected = [0.1, 0.325, 0.55, 0.775, 1.0, 0.2 + 0.4 * (1 + math.cos(math.pi / 5)), 0.6, 0.2]  # 9 is half way
    assert rates("linear_warmup_cosine_lr", 14, (0, 1, 2, 3, 4, 6, 9, 14), **cosine) == pytest.approx(expected)
    for steps_of_a_decay in (10, None):  # those of a round, where not given
        decay = {"init_lr": 8.0, "min_lr": 1.5, "lr_decay_rate": 0.5, "lr_decay_steps": steps_of_a_decay}
        expected = [8, 8, 4, 4, 2, 2, 1.5, 1.5]
        assert rates("linear_warmup_step_lr", 100, (0, 9, 10, 19, 20, 29, 30, 99), **decay) == expected
    constant = {"init_lr": 0.3, "warmup_steps": 3}
    assert rates("constant_lr", 10, range(5), **constant) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3])
    assert rates("constant_lr", 10, [0], **constant, warmup_lr=-1) == [0.3]  # no warm-up, as in the host
    assert rates("linear_warmup_cosine_lr", 3, [5], init_lr=1.0, warmup_steps=3) == [0.0]  # warm-up fills it all


def test_parameter_groups_are_named_scaled_and_split():
    groups = parameter_groups(case.TinyModel(), 0.05, {"last": 0.5})
    table = {(g["name"], g["weight_decay"]): (g["lr_scale"], sum(p.numel() for p in g["params"])) for g in groups}
    assert table == {
        ("head", 0.05): (1.0, 48),
        ("head", 0.0): (1.0, 24),
        ("last", 0.05): (0.5, 8),
        ("last", 0.0): (0.5, 1),
        ("other", 0.05): (1.0, 4),
        ("other", 0.0): (1.0, 2),
    }
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    assert [(g["name"], len(g["params"])) for g in parameter_groups(plain, 0.0, {})] == [("all", 1), ("all", 3)]


def by_hand(indices: list[list[int]], rounds: list[int], accumulate: int, clip: float, run: dict) -> dict:
    """The training once more: no runner, no loader, the big batch at once, AdamW as its paper writes it."""
    model, data = case.TinyModel(dropout=0.0), case.Points(22, noise=0.0)
    model.train()
    windows, start = [], 0
    for size in rounds:  # windows end with a round
        block = indices[start : start + size]
        windows += [block[i : i + accumulate] for i in range(0, size, accumulate)]
        start += size
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("idle")}
    first = {n: torch.zeros_like(p) for n, p in trained.items()}
    second = {n: torch.zeros_like(p) for n, p in trained.items()}
    norms = []
    for step, window in enumerate(windows):
        losses = []
        for batch in window:
            sample = {"x": data.x[batch], "y": data.y[batch], "collated": True}
            losses.append(model(sample)["loss"])
        grads = dict(zip(trained, torch.autograd.grad(sum(losses) / len(losses), list(trained.values())), strict=True))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        norms.append(norm)
        if step < run["warmup_steps"]:
            rate = run["warmup_lr"] + (run["init_lr"] - run["warmup_lr"]) * step / run["warmup_steps"]
        else:
            done = (step - run["warmup_steps"]) / (len(windows) - run["warmup_steps"])
            rate = run["min_lr"] + (run["init_lr"] - run["min_lr"]) * (1 + math.cos(math.pi * done)) / 2
        for name, parameter in trained.items():
            lr = rate * (0.5 if name.startswith("out") else 1.0)
            gradient = grads[name] * min(1.0, clip / (norm + 1e-6))
            decay = run["weight_decay"] if parameter.ndim > 1 else 0.0
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.99 ** (step + 1))
            with torch.no_grad():
                parameter.mul_(1 - lr * decay).sub_(lr * m / (v.sqrt() + 1e-8))
    assert max(norms) > clip > min(norms)  # so the clipping is seen at work, and not only that
    return model.state_dict()


@pytest.mark.parametrize("kind", case.KINDS)
@pytest.mark.parametrize(("accumulate", "chunk"), [(1, None), (2, None), (3, None), (2, 3)])
def test_a_training_equals_the_formulas(tmp_path, kind, accumulate, chunk):
    task, datasets = case.TinyTask(), {"points": {"train": case.Points(22, noise=0.0), "dev": case.Points(7, 1, 0.0)}}
    run = {**case.KINDS[kind], "accum_grad_iters": accumulate, "clip_grad_norm": 2.0, "beta2": 0.99, "test_splits": []}
    run["grad_cache_chunk"] = chunk
    runner = case.make_runner(tmp_path, task=task, model=case.TinyModel(dropout=0.0), datasets=datasets, **run)
    runner.train()
    rounds = [4, 4, 4, 1] if kind == "iters" else [5, 5, 5]
    expected = by_hand(task.train_indices, rounds, accumulate, 2.0, case.RUN)
    last = checkpoint.load(runner.output_dir / "checkpoint_last.pth")["model"]
    for name, value in last.items():
        torch.testing.assert_close(
            value, expected[name], rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(last["idle.weight"], case.TinyModel().idle.weight)  # never used: not decayed either


@pytest.mark.parametrize(("amp", "dtype"), [(False, None), ("bf16", torch.bfloat16), (True, None)])
def test_amp_on_a_cpu(tmp_path, amp, dtype, caplog):
    seen, model = [], case.TinyModel()
    model.hidden.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))
    with caplog.at_level(logging.WARNING):
        runner = case.make_runner(tmp_path, model=model, amp=amp, max_epoch=1)
        runner.train()
    assert runner.optimisation.precision.dtype == dtype
    assert set(seen) == {(True, dtype or torch.float32), (False, torch.float32)}  # evaluation is in float32
    assert ("has no use on cpu" in caplog.text) == (amp is True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [False, True, "fp16"])
def test_on_a_gpu(tmp_path, amp):
    metrics = case.make_runner(tmp_path, amp=amp, device="cuda").train()
    assert math.isfinite(metrics["test"]["agg_metrics"])


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"lr_scales": {"lastt": 2.0}}, r"lr_scales names 'lastt'.*Did you mean 'last'"),
        ({"amp": "fp16"}, "fp16 needs a CUDA GPU"),
        ({"test_splits": ["tset"]}, r"no split 'tset'.*Did you mean 'test'"),
    ],
)
def test_bad_settings(tmp_path, run, message):
    with pytest.raises(ConfigError, match=message):
        case.make_runner(tmp_path, **run).train()


def test_bad_data_and_models(tmp_path):
    datasets = case.make_datasets()
    datasets["points"]["dev"] = case.Points(0)
    with pytest.raises(DataError, match="split 'dev' of the data set 'points' is empty"):
        case.make_runner(tmp_path, datasets=datasets)
    with pytest.raises(ConfigError, match="split 'dev' is in several data sets"):
        case.make_runner(tmp_path, datasets={**case.make_datasets(), "b": {"dev": case.Points(2)}})
    with pytest.raises(DataError, match="map-style"):
        BatchLoader(iter([1]), 2)
    with pytest.raises(ConfigError, match="everything is frozen"):
        case.make_runner(tmp_path, model=case.TinyModel().requires_grad_(False)).train()


def test_a_task_with_the_least_that_the_host_asks(tmp_path):
    class Plain(case.TinyTask):
        def evaluation(self, model, data_loader):
            return super().evaluation(model, data_loader, cuda_enabled=False)

    assert case.make_runner(tmp_path, task=Plain(), max_epoch=1).train()["test"]["error"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "high"])
def test_metrics_that_cannot_be_compared_are_refused(tmp_path, value):
    task = case.TinyTask()
    task.after_evaluation = lambda **_: {"agg_metrics": value}
    with pytest.raises(NeucoreError, match=r"TinyTask gave agg_metrics = .* on 'dev'; a finite number"):
        case.make_runner(tmp_path, task=task).train()


def test_a_loss_that_is_no_number_stops_with_the_last_good_state(tmp_path):
    task = case.TinyTask()
    step = task.train_step

    def explode(model, samples):
        return torch.tensor(float("nan"), requires_grad=True) if task.batches == 7 else step(model, samples)

    task.train_step = explode
    runner = case.make_runner(tmp_path, task=task)
    with pytest.raises(NeucoreError, match=r"loss is nan at iteration 7 .*init_lr(.|\n)*checkpoint_last\.pth"):
        runner.train()
    last = checkpoint.load(runner.output_dir / "checkpoint_last.pth")
    assert last["progress"]["iteration"] == 5
    assert checkpoint.non_finite(last["model"]) == []


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    model = case.TinyModel()
    task = case.TinyTask()
    validate = task.after_evaluation

    def poison(**kwargs):
        model.idle.weight.data[0, 0] = float("nan")  # not seen by the loss
        return validate(**kwargs)

    task.after_evaluation = poison
    with pytest.raises(NeucoreError, match=r"weights became NaN .* idle\.weight"):
        case.make_runner(tmp_path, task=task, model=model).train()
    assert not list((tmp_path / "job").glob("*.pth"))


def test_frozen_statistics_that_change_are_noticed(tmp_path):
    model = case.TinyModel()
    model.encoder.train = lambda mode=True: torch.nn.Module.train(model.encoder, mode)
    with pytest.raises(NeucoreError, match=r"frozen parts of the model changed in training: encoder\.norm"):
        case.make_runner(tmp_path, model=model).train()
