"""The benchmark of searches compares equal scores, and finds what is to be found."""

import importlib.util

from places import ROOT


def test_each_form_is_measured_and_finds_the_same(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("search_benchmark", ROOT / "benchmarks" / "search.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "WIDTH", 16)
    monkeypatch.setattr(benchmark, "UNIT", 256)
    monkeypatch.setattr(benchmark, "BLOCK", 100)
    monkeypatch.setattr(benchmark, "bandwidth", lambda: (1e10, 1e10))
    found = benchmark.measure(600, 4, None, False, str(tmp_path))
    assert found["difference"] < 1e-5 and found["bytes"] > 64
    for form in ("exact", "broadcast"):
        assert 0 < found[form]["p50"] <= found[form]["p99"], form
    assert "two-stage" not in found
    assert "600" in benchmark.shown([found])
