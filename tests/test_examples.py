"""The examples in docstrings run, offline and in an empty folder, and no public name is without."""

import doctest
import inspect

import pytest
from helpers import REPOSITORY

import hf_dash

STUBS = sorted((REPOSITORY / "hf_dash").rglob("__init__.pyi"))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_names():
    """Yield each function and class of the stubs once, as (its place, itself)."""
    seen = set()
    for stub in STUBS:
        package = hf_dash if stub.parent.name == "hf_dash" else getattr(hf_dash, stub.parent.name)
        for name in package.__all__:
            item = getattr(package, name)
            if (inspect.isfunction(item) or inspect.isclass(item)) and item not in seen:
                seen.add(item)
                yield f"{item.__module__}.{name}", item


NAMES = dict(public_names())


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example(name):
    text = NAMES[name].__doc__
    assert "\n    Example:\n" in text
    assert ">>> " in text


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for name, item in NAMES.items() for test in finder.find(item, name)]


@pytest.mark.parametrize("example", [pytest.param(test, id=test.name) for test in examples()])
def test_an_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
