"""Where caches lie."""

from pathlib import Path

from neucore_plugin.common import files


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "own"))
    assert files.cache_dir() == tmp_path / "own"
    assert not (tmp_path / "own").exists()
    assert files.cache_dir(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("NEUCORE_CACHE")
    assert files.cache_dir() == Path.home() / ".cache" / "neucore"
    monkeypatch.chdir(tmp_path)
    assert files.cache_dir("relative") == tmp_path / "relative"
