"""What keeps the project readable: imports point one way, no stage imports another, nothing that is read runs code."""

import ast
import os
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = {"sft", "train_grm", "dpo", "ppo_cpe", "evaluate"}
MAY_IMPORT_STAGES = {"replay", "bench", "tests"}  # they measure or test what a stage does

KNOW_THE_WORLD = {"data", "recipes", "results", "bench", "tests"}

# Each layer may import those before it. What is not named (data/, recipes/, tools, ...) is on top or between two.
LAYERS = [{"kernels"}, {"model"}, {"engine", "prompts", "runtime"}, {"judges"}, {"diagnostics", "evaluation"}, STAGES]


def sources():
    """{module: file} of all Python files in the project's folders. exp/ and out/ hold what users write."""
    modules = {}
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "_")) and name not in ("exp", "out")]
        for name in names:
            if name.endswith(".py"):
                file = Path(folder, name)
                modules[".".join(file.relative_to(ROOT).with_suffix("").parts)] = file
    return modules


def imported_by(source, modules):
    """Which of the modules a source imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"  # scripts are no package
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(modules)


def unit(module):
    """The folder that a module is in, or the module itself at the root."""
    return module.partition(".")[0]


@pytest.fixture(scope="module")
def imports():
    """{module: the project's modules that it imports}."""
    modules = sources()
    return {module: imported_by(file.read_text(encoding="utf-8"), modules) for module, file in modules.items()}


@pytest.fixture(scope="module")
def unit_imports(imports):
    """{unit: the other units that it imports}."""
    units = {unit(module): set() for module in imports}
    for module, names in imports.items():
        units[unit(module)] |= {unit(name) for name in names} - {unit(module)}
    return units


def circle(imports):
    """Names that import one another in a circle, [] where there is none."""
    done = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for imported in sorted(imports[name]):
            if found := visit(imported, [*path, name]):
                return found
        done.add(name)
        return []

    for name in sorted(imports):
        if found := visit(name, []):
            return found
    return []


def reachable(imports, name):
    """All that is imported when `name` is, however indirectly."""
    seen = set()
    waiting = [name]
    while waiting:
        new = imports[waiting.pop()] - seen
        seen |= new
        waiting.extend(new)
    return seen


def upward_imports(imports):
    """Imports against the layers, as "unit -> unit of a higher layer"."""
    found = []
    for height, layer in enumerate(LAYERS):
        higher = set().union(*LAYERS[height + 1 :])
        for name in sorted(layer & set(imports)):
            found += [f"{name} -> {other}" for other in sorted(reachable(imports, name) & higher)]
    return found


def test_the_checks_find_what_they_look_for():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert imported_by("def f():\n    from runtime import flags", ["runtime.flags"]) == {"runtime.flags"}
    through_another = {"runtime": {"helpers"}, "helpers": {"judges"}, "judges": {"model"}, "model": set()}
    assert upward_imports(through_another) == ["runtime -> judges"]


def test_nothing_is_imported_in_a_circle(imports, unit_imports):
    assert imports["sft"] > {"runtime.flags", "model"}
    assert circle(imports) == []
    assert circle(unit_imports) == []  # by folder


def test_imports_point_from_the_stages_down_to_the_kernels(unit_imports):
    assert upward_imports(unit_imports) == []


def test_only_its_own_scripts_know_the_generated_world(imports):
    """Its judge is a function in a file, as anybody's is."""
    found = {unit(module) for module in imports if "data.persona_world" in imports[module]}
    assert found <= KNOW_THE_WORLD


def test_stages_do_not_import_one_another(imports):
    found = {m: imports[m] & STAGES for m in imports if unit(m) not in MAY_IMPORT_STAGES}
    assert {module: names for module, names in found.items() if names} == {}


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
        if unit(module) != "tests":  # these make hostile files
            found[module] = unsafe_reads(file.read_text(encoding="utf-8"))
    assert {module: lines for module, lines in found.items() if lines} == {}
