"""The house rules that a machine can check: imports go one way, sizes stay small."""

import ast

import pytest
from conftest import REPOSITORY

# From the front door to the back; a module imports only from those before it.
ROOMS = [
    "_version",
    "_files",
    "_preserve",
    "_hub_calls",
    "_safetensors",
    "config",
    "_trainer_checks",
    "training_config",
    "distributed",
    "batches",
    "columns",
    "arrivals",
    "_shards",
    "incoming",
    "augmentation",
    "examples",
    "streams",
    "_chunks",
    "stream_loader",
    "rounds",
    "models",
    "classifiers",
    "round_data",
    "script_arguments",
    "tensors",
    "orthogonal",
    "filling",
    "gradients",
    "shrink",
    "dash",
    "starts",
    "named_starts",
    "sampling",
    "reporting",
    "callback",
    "convergence",
    "optimizers",
    "training",
    "evaluation",
    "features",
    "memorisation",
    "history",
    "schedule",
    "checkpoints",
    "comparison",
    "promotion",
    "continual",
    "pretraining",
    "framework",
    "tables",
    "evidence",
    "plots",
    "_card_tables",
    "card",
    "results",
    "_round_folder",
    "hub",
    "lineage",
    "sharing",
    "reference",
]
PACKAGE = sorted((REPOSITORY / "hf_dash").glob("*.py"))
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.py"))


def imported_modules(path):
    """Return the modules of hf_dash a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [node.module]
            if node.module == "hf_dash":
                names += [f"hf_dash.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("hf_dash."))


def test_every_module_has_its_place():
    assert sorted(path.stem for path in PACKAGE) == sorted(["__init__", *ROOMS])


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    before = set(ROOMS[: ROOMS.index(room)])
    imported = set(imported_modules(REPOSITORY / "hf_dash" / f"{room}.py"))
    assert imported <= before
    if room == "reference":
        assert not imported, "the reference shares nothing with the fast code"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_import_the_package_alone_and_open_with_their_launch_line(path):
    text = path.read_text()
    assert set(imported_modules(path)) <= {"reference"}
    assert "\nLaunch:  " in ast.get_docstring(ast.parse(text), clean=False)
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.name)
def test_sizes_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) < 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            body = node.body[1:] if has_docstring and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 50, node.name


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.name)
def test_every_public_module_has_its_test_file(path):
    if path.stem.startswith("_") or path.stem == "reference":
        return
    assert (REPOSITORY / "tests" / f"test_{path.stem}.py").is_file()


def test_the_hubs_client_is_made_in_one_place():
    for path in PACKAGE:
        if path.stem not in ("_hub_calls", "hub"):
            assert "HfApi" not in path.read_text(), path.name


def test_all_names_are_listed_sorted_and_there():
    import hf_dash

    # As ruff sorts them: constants, classes, then the rest.
    assert len(set(hf_dash.__all__)) == len(hf_dash.__all__)
    for name in hf_dash.__all__:
        assert hasattr(hf_dash, name)
