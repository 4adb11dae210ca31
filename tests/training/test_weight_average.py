"""The moving average of the trained weights: its closed form, what is validated and saved."""

import copy

import pytest
import runner_case as case
import torch
from torch import nn

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.training.weight_average import WeightAverage
from neucore_plugin.weights import checkpoint


def test_closed_form():
    """Weights 1, 2, ..., k: d^(k-1) x 1 + (1-d) x sum of d^(k-i) x i over i = 2..k."""
    decay, steps = 0.9, 7
    model = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), nn.BatchNorm1d(3), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    average, frozen = WeightAverage(model, decay), model[2].weight.clone()
    for step in range(1, steps + 1):
        for value in (model[0].weight, model[1].bias, model[1].running_var):
            value.data.fill_(step)
        average.update()
    expected = decay ** (steps - 1) + (1 - decay) * sum(decay ** (steps - i) * i for i in range(2, steps + 1))
    with average.applied():
        for value in (model[0].weight, model[1].bias, model[1].running_var):  # two number types, and a statistic
            assert torch.allclose(value, torch.full_like(value, expected), rtol=1e-6)
        assert torch.equal(model[2].weight, frozen)
    assert torch.equal(model[0].weight, torch.full_like(model[0].weight, steps))
    assert set(average.state_dict()["weights"]) == {
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"
    }  # fmt: skip
    assert average.steps == steps


def test_the_models_weights_come_back_after_an_error_too():
    model = nn.Linear(2, 2)
    average, before = WeightAverage(model, 0.5), model.weight.detach().clone()
    average.update()
    model.weight.data += 1
    seen = []
    with pytest.raises(ZeroDivisionError), average.applied():
        seen.append((model.weight.detach().clone(), 1 / 0))
    assert torch.equal(model.weight, before + 1)


def test_state_of_another_model_is_refused():
    average = WeightAverage(nn.Linear(2, 2), 0.5)
    for state in (None, WeightAverage(nn.Linear(3, 2), 0.5).state_dict(), {"steps": 1, "weights": {}}):
        with pytest.raises(CheckpointError, match="averaged weights are not those of this model: .*weight|bias"):
            average.load_state_dict(state)


class Recorded(case.TinyTask):
    """Keeps the weights of each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluated: list[tuple[int, dict]] = []

    def evaluation(self, model, data_loader, cuda_enabled=True):
        self.evaluated.append((len(data_loader.dataset), copy.deepcopy(checkpoint.trainable_state(model))))
        return super().evaluation(model, data_loader, cuda_enabled)


def test_the_average_is_validated_saved_as_best_and_tested(tmp_path):
    decay, task, model = 0.7, Recorded(), case.TinyModel()
    runner = case.make_runner(tmp_path, task=task, model=model, ema_decay=decay)
    expected: dict[str, torch.Tensor] = {}
    at_rounds = []
    update = runner._update

    def follow(*arguments):
        update(*arguments)
        for name, value in model.named_parameters():
            value = value.detach().double()
            expected[name] = decay * expected[name] + (1 - decay) * value if name in expected else value
        if runner.progress.iteration % 5 == 0:
            at_rounds.append({name: value.clone() for name, value in expected.items()})

    runner._update = follow
    runner.train()
    validated = [state for size, state in task.evaluated if size == 7]  # dev
    assert len(validated) == len(at_rounds) == 3
    for state, wanted in zip(validated, at_rounds, strict=True):
        for name, value in state.items():
            torch.testing.assert_close(value, wanted[name].float(), rtol=1e-5, atol=1e-6)
    best, last = (checkpoint.load(runner.output_dir / f"checkpoint_{name}.pth") for name in ("best", "last"))
    place = best["progress"]["best_epoch"]
    tested = [state for size, state in task.evaluated if size == 8]  # test
    for name, value in best["model"].items():
        assert torch.equal(value, validated[place][name]) and torch.equal(value, tested[0][name])
    assert not torch.equal(last["model"]["out.weight"], last["average"]["weights"]["out.weight"])
    assert torch.equal(last["average"]["weights"]["out.weight"], validated[-1]["out.weight"])
    assert "average" not in best and last["average"]["steps"] == runner.progress.step


def test_training_itself_is_the_same_with_and_without(tmp_path):
    """The average only watches: weights, moments and random state of the last checkpoint are the same bits."""
    ends = []
    for number, decay in enumerate((None, 0.8)):
        runner = case.make_runner(tmp_path / str(number), ema_decay=decay, **case.ITERS)
        runner.train()
        ends.append(case.final_state(runner.output_dir))
    assert all(ends[0][part] == ends[1][part] for part in ("last", "moments", "rng"))
    assert ends[0]["best"] != ends[1]["best"] and ends[0]["average"] is None


def normed_group(output_dir, run: dict) -> dict:
    """In a process of a group: batch norm is trained, so each process sees other statistics."""

    class Normed(case.TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

    runner = case.make_runner(output_dir, model=Normed(), **run)
    runner.train()
    return {name: value.numpy() for name, value in runner.optimisation.average.state_dict()["weights"].items()}


def test_the_same_in_all_processes(tmp_path):
    run = {**case.ITERS, "ema_decay": 0.8, "batch_size_train": 3}
    parts = case.in_group(tmp_path, normed_group, tmp_path / "normed", run)
    for name, value in parts[0].items():
        assert (parts[1][name] == value).all(), name
    assert "norm.running_var" in parts[0]
