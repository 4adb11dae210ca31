"""The clock of a trial looks on: it counts steps of processor time, and changes nothing of what they give."""

from types import SimpleNamespace

import pytest

from neucore_plugin.study import worker


@pytest.fixture
def runner(monkeypatch):
    """A runner of rounds of three steps; each step takes a second of processor time, a validation after a round ten."""
    now = [100.0]
    monkeypatch.setattr(worker.time, "process_time", lambda: now[0])

    def train_step(model, samples):
        now[0] += 1.0
        return (model, samples)

    made = SimpleNamespace(
        task=SimpleNamespace(train_step=train_step), progress=SimpleNamespace(iteration=0), round_iters=3
    )

    def steps(count):
        seen = []
        for _ in range(count):
            seen.append(made.task.train_step(model="m", samples=made.progress.iteration))
            made.progress.iteration += 1
            now[0] += 10.0 * (made.progress.iteration % 3 == 0)
        return seen

    made.steps = steps
    return made


def test_steps_are_timed_without_the_validations_between_rounds(runner):
    clock = worker._StepClock()
    assert clock.summary(9) == {"step_ms": None, "training_seconds": None}
    clock.watch(runner)
    assert runner.steps(9) == [("m", place) for place in range(9)]
    assert clock.first == 100.0
    assert clock.summary(9) == {"step_ms": 1000.0, "training_seconds": 9.0}


def test_a_resumed_training_counts_the_steps_before_it_at_the_same_pace(runner):
    runner.progress.iteration = 4
    clock = worker._StepClock()
    clock.watch(runner)
    runner.steps(5)
    assert clock.summary(9)["training_seconds"] == 9.0


def test_a_probe_ends_after_enough_steps(runner):
    clock = worker._StepClock(enough=4)
    clock.watch(runner)
    with pytest.raises(worker._Enough):
        runner.steps(50)
    assert runner.progress.iteration == 5  # two of each round are timed, as the third ends in a validation
