"""The shape of the package: imports go one way, files stay readable, and the map leads somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import aipo
from aipo.config import Config
from aipo.labelling import LABELLED_BY

ROOT = Path(__file__).parents[1]
# run by python -m, as train.py is: they may build what train.py builds
COMMANDS = {"aipo.branching.latent", "aipo.replay"}
TOP = {"aipo.trainer", "aipo.run"}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports anywhere, inside functions too."""
    files = {module(path): path for path in (ROOT / "aipo").rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {each if each in files else str(node.module) for each in full}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] &= files.keys()
    return found


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_go_one_way() -> None:
    TopologicalSorter(imports()).prepare()  # raises CycleError with the modules of a circle


def test_labels_know_the_code_that_they_come_of() -> None:
    """All that labelling imports, but for what reads, checks, keeps, judges or carries numbers and makes none."""
    graph, known, waiting = imports(), set[str](), ["aipo.labelling"]
    while waiting:
        if (name := waiting.pop()) not in known:
            known.add(name)
            waiting += graph[name]
    listed = {module(path) for glob in LABELLED_BY for path in (ROOT / "aipo").glob(glob)}
    others = ["config", "distributed", "errors", "metrics", "problems", "record", "reward", "rollouts", "sharding"]
    others += ["startup", "threads", "verify"]
    assert {name.split(".")[1] for name in known - listed} == set(others)


def test_no_folder_knows_the_trainer() -> None:
    up = {name: TOP & found for name, found in imports().items() if TOP & found}
    assert set(up) - COMMANDS <= {"aipo.run"}, up


def test_a_file_is_read_in_one_sitting() -> None:
    lines = {module(path): len(path.read_text().splitlines()) for path in (ROOT / "aipo").rglob("*.py")}
    long = {name: count for name, count in lines.items() if count > 450}
    assert not long
    assert lines["aipo.trainer"] <= 350


def test_the_map_leads_somewhere() -> None:
    names = re.findall(r"aipo(?:\.\w+)+", aipo.__doc__ or "")
    assert len(names) > 25
    for name in names:
        resolve(name)
    for path in re.findall(r"configs/\S+\.yaml", aipo.__doc__ or ""):
        assert (ROOT / path).is_file(), path
    numbered = re.findall(r"^    (?:eq\. |table |figure )([\d, ]+?) {2,}", aipo.__doc__ or "", re.MULTILINE)
    assert {int(number) for each in numbered for number in each.split(",")} >= set(range(1, 10))


def resolve(name: str) -> Any:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def test_the_documents_name_what_is_there() -> None:
    """Paths of code and configs, and modules that are run, in README and docs."""
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text()
        for path in re.findall(r"\b(?:aipo|tests|bench|configs|docs)/[\w/.-]+\.(?:py|yaml|sh|slurm|md)\b", text):
            if not re.search("X$|NAME|MACHINE|random_sums", Path(path).stem):  # the reader's own
                assert (ROOT / path).exists(), f"{document.name}: {path}"
        for name in re.findall(r"python -m (aipo[\w.]+)", text):
            assert importlib.util.find_spec(name), f"{document.name}: {name}"


def test_every_formula_has_its_key_and_its_test() -> None:
    """The table of docs/methods.md."""
    table = (ROOT / "docs" / "methods.md").read_text().split("## Every formula")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    keys, sources = set(flatten(Config.model_fields)), dict[str, str]()  # of the tests of each key
    for formula, named, tests, source in rows[1:]:
        assert re.search("paper|code|notes|ours", source), formula
        cited = re.findall(r"`([^`:]+)::(\w+)`", tests)
        assert cited, formula
        for path, name in cited:
            assert name in parts(ROOT / path), f"{path}::{name}"
        for key in re.findall(r"`([^`]+)`", named):
            assert key in keys, key
            sources[key] = sources.get(key, "") + "".join(source_of(ROOT / path, name) for path, name in cited)
    assert not [key for key, text in sources.items() if not sets(key, text)]


def sets(key: str, text: str) -> bool:
    """Whether a test gives the key a value: an override of the config, an argument, an entry or a parameter."""
    name = key.partition(".")[2]
    return re.search(rf'\b{key}\b|\b{name}=|"{name}"', text) is not None


@cache
def parts(path: Path) -> dict[str, ast.stmt]:
    """Statements of a test file by the names that they define."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))
            found |= dict.fromkeys(names, node)
    return found


def source_of(path: Path, test: str) -> str:
    """Of a test with its decorators, and of the fixtures, helpers and constants of its file that it leads to."""
    seen, waiting, lines, text = set[str](), [test], path.read_text().splitlines(keepends=True), ""
    while waiting:
        name = waiting.pop()
        node = parts(path).get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        text += "".join(lines[first - 1 : node.end_lineno])
        waiting += [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
        waiting += [each.arg for each in ast.walk(node) if isinstance(each, ast.arg)]
    return text


def flatten(fields: dict[str, Any]) -> list[str]:
    """Dotted names of a config's keys."""
    return [
        f"{section}.{key}" for section, field in fields.items() for key in getattr(field.annotation, "model_fields", {})
    ]
