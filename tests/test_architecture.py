"""The house rules that a machine can check: imports go one way, sizes stay small."""

import ast
import re

import pytest
from helpers import REPOSITORY

# A package imports from those before it only; single modules are packages of their own. The Hub's
# client comes early, because everything that loads a model goes through it.
PACKAGES = [
    "_version",
    "utils",
    "hub/client",
    "entries",
    "history",
    "model_config",
    "transforms",
    "models",
    "pretrained",
    "method",
    "data",
    "starts",
    "trainer",
    "training",
    "runs",
    "report",
    "hub",
    "studies",
]
HOUSE = REPOSITORY / "hf_dash"
MODULES = sorted(path for path in HOUSE.rglob("*.py") if path.name != "__init__.py")
STUBS = sorted(HOUSE.rglob("__init__.pyi"))
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


def name_of(path):
    return path.relative_to(HOUSE).with_suffix("").as_posix()


def imported_modules(path):
    """Return what a file imports of hf_dash, as paths below it, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [node.module]
            if (HOUSE.parent / node.module.replace(".", "/")).is_dir():
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("hf_dash."):
                yield name.removeprefix("hf_dash.").replace(".", "/")


def package_of(module):
    """The package of a module, by its name below the house."""
    return module if module in PACKAGES else module.split("/")[0]


def test_every_module_has_its_package():
    assert {package_of(name_of(path)) for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    own = name_of(path)
    for module in imported_modules(path):
        assert (HOUSE / f"{module}.py").is_file(), f"{module}: import the module that defines it"
        mine, other = package_of(own), package_of(module)
        assert PACKAGES.index(other) <= PACKAGES.index(mine), module
    if path.stem == "reference":
        assert not list(imported_modules(path)), "the reference shares nothing with the fast code"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_no_circles(package):
    edges = {
        name_of(path): {m for m in imported_modules(path) if package_of(m) == package}
        for path in MODULES
        if package_of(name_of(path)) == package
    }
    while edges:
        free = [module for module, needed in edges.items() if not needed & edges.keys()]
        assert free, f"these import each other: {sorted(edges)}"
        for module in free:
            del edges[module]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_use_the_packages_and_open_with_their_launch_line(path):
    text = path.read_text()
    assert set(imported_modules(path)) <= {"method/reference", "studies/reference"}
    assert "\nLaunch:  " in ast.get_docstring(ast.parse(text), clean=False)
    assert 'if __name__ == "__main__":' in text
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sizes_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) < 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            body = node.body[1:] if has_docstring and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 50, node.name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_public_module_has_its_test_file(path):
    if path.stem.startswith("_") or path.stem == "reference":
        return
    package, _, module = name_of(path).rpartition("/")
    assert (REPOSITORY / "tests" / package / f"test_{module}.py").is_file()


def test_tests_share_helpers_alone():
    for path in TESTS:
        assert not re.search(r"^(from|import) (test_|conftest)", path.read_text(), re.M), path


def test_the_hubs_client_is_made_in_one_place():
    for path in MODULES:
        if name_of(path) not in ("hub/client", "hub/publish"):
            assert "HfApi" not in path.read_text(), path.name


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.parent.name)
def test_every_name_of_a_stub_is_there(stub):
    import hf_dash

    place = hf_dash if stub.parent == HOUSE else getattr(hf_dash, stub.parent.name)
    assert dir(place) == sorted(set(place.__all__))
    for name in place.__all__:
        assert getattr(place, name) is not None


def test_the_top_level_stays_small():
    import hf_dash

    names = [name for name in hf_dash.__all__ if name not in PACKAGES]
    assert len(names) <= 25, names
