"""Packages that are put off while the host is imported: on use an absent one is named, a present one real."""

import importlib
import importlib.util
import sys

import pytest

from neucore_plugin.host import deferred


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `made_up` with modules, a number, a function, and a log of what was done to it."""
    folder = tmp_path / "made_up" / "deep"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("LOG = []\nNUMBER = 7\ndef note(x): LOG.append(x); return 'noted'\n")
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text("class Thing:\n    def __init__(self, x): self.x = x\n    size = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "made_up"
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]


def is_clean(name: str) -> bool:
    """No stand-in is left in sys.modules, nobody of ours looks for further ones."""
    mine = [module for module in sys.modules.values() if isinstance(module, deferred._Module)]
    return not mine and not any(getattr(finder, "name", None) == name for finder in sys.meta_path)


def test_an_absent_package_is_named_when_it_is_used():
    with deferred.deferred({"absent_one": "absent-one-for-pip"}):
        import absent_one
        from absent_one.a.b import decorate, other

        kept = absent_one.table.row
    assert is_clean("absent_one")
    assert importlib.util.find_spec("absent_one") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("absent_one")
    message = "was used, but absent-one-for-pip is not installed; run: pip install absent-one-for-pip"
    for use, path in (
        (lambda: decorate(1), "absent_one.a.b.decorate"),
        (lambda: other.method(), "absent_one.a.b.other.method"),
        (lambda: kept(), "absent_one.table.row"),
        (lambda: absent_one.CONSTANT, "absent_one.CONSTANT"),
    ):
        with pytest.raises(ModuleNotFoundError, match=f"^{path} {message}$") as caught:
            use()
        assert caught.value.name == "absent_one"


def test_a_class_of_a_present_package_can_be_subclassed_while_it_is_put_off(package):
    with deferred.deferred({package: package}):
        from made_up.deep.inner import Thing

        class Own(Thing):
            pass

    real = importlib.import_module("made_up.deep.inner").Thing
    assert issubclass(Own, real) and Own(5).x == 5 and Own.size == 3
    assert is_clean(package)


def test_a_present_package_is_imported_when_it_is_used(package):
    with deferred.deferred({package: package}):
        import made_up as stand_in
        import made_up.deep
        from made_up.deep.inner import Thing
    assert is_clean(package)
    assert package not in sys.modules
    assert (Thing(5).x, stand_in.NUMBER, stand_in.note("a")) == (5, 7, "noted")
    import made_up

    assert made_up is not stand_in
    assert made_up.LOG == stand_in.LOG == ["a"]
    assert made_up.deep.inner.Thing.size == 3


def test_a_submodule_can_be_put_off_while_its_package_is_there(package):
    import made_up

    with deferred.deferred({"made_up.deep": "made-up"}):
        from made_up.deep import inner

        assert isinstance(sys.modules["made_up.deep"], deferred._Module)
        assert made_up.NUMBER == 7
    assert is_clean("made_up.deep")
    assert not hasattr(made_up, "deep")
    assert inner.Thing(2).x == 2
    assert made_up.deep.inner.Thing.size == 3


@pytest.mark.parametrize("who", ["somebody else", "a stand-in"])
def test_calls_for_their_effect_are_made_once_whoever_imports_the_package(package, monkeypatch, who):
    monkeypatch.setattr(deferred, "_FOR_EFFECT", ("made_up.note",))
    with deferred.deferred({package: package}):
        import made_up as stand_in

        assert stand_in.note("first") == "first"
        assert stand_in.note("second") == "second"
        assert isinstance(sys.modules[package], deferred._Module)
    assert package not in sys.modules
    assert importlib.util.find_spec(package) is not None  # whoever only asks for it changes nothing
    if who == "somebody else":
        importlib.import_module(package)
    else:
        assert stand_in.NUMBER == 7
    assert sys.modules[package].LOG == ["first", "second"]
    assert is_clean(package)
    assert type(sys.modules[package].__loader__).__name__ == "SourceFileLoader"
    importlib.reload(sys.modules[package])
    assert sys.modules[package].LOG == []


def test_a_call_at_once_gets_the_real_one(package):
    with deferred.deferred({package: package}):
        import made_up as stand_in

        assert stand_in.note("now") == "noted"
        assert sys.modules[package].LOG == ["now"]
        import made_up

        assert made_up.LOG == ["now"]  # no stand-in any more
    assert is_clean(package)


def test_what_is_imported_already_is_left_alone(package):
    import made_up

    with deferred.deferred({package: package}):
        import made_up as again

        assert again is made_up


def test_a_broken_package_keeps_its_own_error(package, tmp_path):
    (tmp_path / "made_up" / "__init__.py").write_text("import not_there_either\n")
    with deferred.deferred({package: package}):
        from made_up import note
    with pytest.raises(ModuleNotFoundError, match="^No module named 'not_there_either'$"):
        note(1)


def test_an_error_within_leaves_nothing_behind(package):
    def fail():
        with deferred.deferred({package: package}):
            import made_up  # noqa: F401

            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_clean(package)
    import made_up

    assert made_up.NUMBER == 7
