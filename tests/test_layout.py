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


# -- only safetensors and JSON are read from outside: what follows would run code that a file holds

RUNS_CODE = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "torch.distributed.checkpoint"}


def unsafe_reads(source):
    """What in a source may run code out of a file or a download, as "line N: what it is"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"line {node.lineno}: {name}" for name in names if name in RUNS_CODE]
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if called in ("eval", "exec", "yaml.load", "np.load"):
            found.append(f"line {node.lineno}: {called}")
        if given.get("trust_remote_code", "False") != "False":
            found.append(f"line {node.lineno}: trust_remote_code")
    return found


def test_nothing_that_is_read_runs_code():
    bad = """
import pickle
from torch.distributed import checkpoint
torch.load(file)
torch.load(file, weights_only=False)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
eval(text)
"""
    assert len(unsafe_reads(bad)) == 6
    assert unsafe_reads("torch.load(file, weights_only=True)\nast.literal_eval(text)\nmodel.eval()") == []
    found = {}
    for module, file in sources().items():
        if not module.startswith("tests."):  # these make hostile files
            with open(file, encoding="utf-8") as f:
                found[module] = unsafe_reads(f.read())
    assert {module: lines for module, lines in found.items() if lines} == {}
