"""What keeps the project readable: no circle of imports, stages that do not import one another, files of a size."""

import ast
import os

import pytest
from conftest import ROOT

STAGES = {"sft", "train_grm", "dpo", "ppo_cpe", "evaluate"}
MAY_IMPORT_STAGES = ("replay", "bench.", "tests.")
FOLDERS = ("", "bench", "data", "evaluation", "kernels", "recipes", "reporting", "runtime", "tests")
LINES, PPO_LINES = 700, 650


def sources():
    """{module: file} of the project's own modules."""
    found = {}
    for folder in FOLDERS:
        for name in sorted(os.listdir(os.path.join(ROOT, folder))):
            if name.endswith(".py"):
                module = f"{folder}.{name[:-3]}" if folder else name[:-3]
                found[module] = os.path.join(ROOT, folder, name)
    return found


def imported_by(source, modules):
    """Which of the modules a source imports, at its top or inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"  # scripts are no package
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(modules)


@pytest.fixture(scope="module")
def imports():
    """{module: the project's modules that it imports}."""
    modules = sources()
    found = {}
    for module, file in modules.items():
        with open(file, encoding="utf-8") as f:
            found[module] = imported_by(f.read(), modules)
    return found


def circle(imports):
    """Modules that import one another in a circle, [] where there is none."""
    done = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        found = next((c for m in sorted(imports[module]) if (c := visit(m, [*path, module]))), [])
        done.add(module)
        return found

    return next((c for module in sorted(imports) if (c := visit(module, []))), [])


def test_no_modules_import_one_another_in_a_circle(imports):
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]  # what would be found
    assert imported_by("def f():\n    from runtime import flags", ["runtime.flags"]) == {"runtime.flags"}
    assert imports["sft"] > {"runtime.flags", "model"}
    assert circle(imports) == []


def test_stages_do_not_import_one_another(imports):
    found = {m: imports[m] & STAGES for m in imports if not m.startswith(MAY_IMPORT_STAGES)}
    assert {module: names for module, names in found.items() if names} == {}


def test_no_file_is_long():
    lengths = {}
    for file in sources().values():
        with open(file, encoding="utf-8") as f:
            lengths[os.path.relpath(file, ROOT)] = sum(1 for _ in f)
    assert {file: n for file, n in lengths.items() if n > LINES} == {}
    assert lengths["ppo_cpe.py"] < PPO_LINES
