"""Both sets of packages give the same: encoders, fingerprints, word pieces, ranks of a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import set_case
from places import ROOT

from neucore_plugin import launch

RECORDED = Path(set_case.__file__).with_name("recorded_encoders.json")  # by constraints.txt on Python 3.11
OTHER = os.environ.get("NEUCORE_OTHER_PYTHON", "")


def test_encoders_are_those_recorded():
    """Fingerprints and word pieces exactly; numbers but for the last bits, in which processors differ."""
    recorded, found = json.loads(RECORDED.read_text()), set_case.everything()
    assert found["word_pieces"] == recorded["word_pieces"]
    assert found["encoders"].keys() == recorded["encoders"].keys()
    for name, wanted in recorded["encoders"].items():
        assert found["encoders"][name]["fingerprint"] == wanted["fingerprint"], name
        for key, values in wanted["values"].items():
            assert found["encoders"][name]["values"][key] == pytest.approx(values, rel=1e-4, abs=1e-5), (name, key)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="NEUCORE_OTHER_PYTHON names the Python of an environment with the other set")
def test_a_checkpoint_of_one_set_ranks_the_same_on_the_other(tiny_config, shapes_root, tmp_path):
    """Trained here; encoders to the last bit, ranks and scores in both environments, on one machine."""
    path = tiny_config(lambda config: config["run"].update(max_epoch=1))
    launch.run(path)
    (best,) = (tmp_path / "output").glob("*/checkpoint_best.pth")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = {}
    for name, python in (("this", sys.executable), ("other", OTHER)):
        out = tmp_path / f"{name}.json"
        done = subprocess.run(
            [python, "-W", "ignore", set_case.__file__, str(out), str(best), str(shapes_root / "images")],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = json.loads(out.read_text())
    assert len(found["this"]["ranks"]) == 15
    for query, hits in found["this"]["ranks"].items():
        assert [name for name, _ in hits] == [name for name, _ in found["other"]["ranks"][query]], query
    assert found["this"] == found["other"]
