"""The commands of README and docs, run as they stand there, in a folder as a reader has it after the stages before.

Only sizes are added to them (SMALL). What is not run here says why (ELSEWHERE): it needs a GPU or hours, or another
test runs it.
"""

import html
import json
import os
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script
from test_docs import PAGES, commands, read
from test_evaluate_tasks import made_annotations
from test_forks import RUN_WITH
from test_prepare import hub

pytestmark = pytest.mark.slow

ELSEWHERE = {
    r"([A-Z_]+=\S+ )*bash (recipes/tiny|tests/run)\.sh": "the README's two commands: .ci/run",
    r"python SCRIPT\.py": "any of the scripts",
    r"torchrun .* -m exp\.mine": "test_forks.py starts a copy in this way",
    r".*bench/gpu\.sh|.*recipes/(qwen|audit)|torchrun --nnodes": "GPUs; tests/test_gpu_script.py, test_recipes.py",
    r".*https?://": "needs a server; tests/test_judge_servers.py",
    r"python results/make/tables\.py": "minutes to hours; tests/test_tables.py",
    r"bash tests/faults\.sh|(COMPILE_ALL|HYPOTHESIS_PROFILE)=": "minutes to hours",
    r".*recipes/(real_cpu|own_data|real_english)\.sh|EMULATED_GPU=|python serve\.py": "a test of its own",
    r"python data/annotate\.py|.*out/own": "tests/test_annotate.py runs docs/own-experiment.md",
    r".*out/edits": "needs more rollouts; tests/test_forks.py",
}
PPO = "--prompts-per-step 4 --mini-batch-prompts 2 --n-samples 2 --max-new-tokens 24 --judge-max-new-tokens 64 "
PPO += "--tokens-per-microbatch 300 --max-steps 5 --answer-template answer.txt --edit-template edit.txt"
SMALL = {  # script: what is added to its command
    "sft.py": "--epochs 30 --batch-size 16 --lr 5e-3 --answer-template answer.txt",  # answers that a GRM has seen
    "ppo_cpe.py": PPO,
    "exp/mine.py": PPO,
    **{f"exp/{name}.py": PPO for name in RUN_WITH},
    "evaluate.py": "--max-new-tokens 24 --bootstrap-draws 20",
}
NAMED = {
    "--judge FOLDER": "--judge out/grm/model",
    "FOLDER": "out/sft/policy",
    "--source PersonalAILab/PersonaFeedback": "--source release --out out/release",
    "Qwen/Qwen2.5-0.5B-Instruct": "checkpoint",
    "out/qwen7b/cpe": "out/ppo_cpe",
    "out/qwen7b/evaluate/prompts_eval/cpe": "out/evaluate",
    "out/NAME": "out/ppo_cpe",
    "out/tiny/cpe": "out/ppo_cpe",
    '"${world[@]}" ': "",  # the flags for recipes/tiny.sh's run
    "--temperature 1.3": "--temperature 0.9",  # hotter answers are none that the GRM can read
}
RUN_HERE = {page: [c for c in commands(page) if not any(re.match(e, c) for e in ELSEWHERE)] for page in PAGES}


def run(folder, command):
    """The command, with what SMALL adds and a folder of its own unless it names one -> what it printed."""
    for placeholder, name in NAMED.items():
        command = command.replace(placeholder, name)
    words = shlex.split(command)
    script = words[words.index("python") + 1]
    if script in SMALL:
        words += shlex.split(SMALL[script])
        if not {"--out", "--plan"} & set(words):
            words += ["--out", f"out/fresh/{len(os.listdir(folder / 'out/fresh'))}"]
    return run_script(script, *words[words.index(script) + 1 :], folder=folder)


@pytest.fixture(scope="module")
def reader(tiny, tiny_grm, tmp_path_factory):
    """A checkout whose out/ has rows, SFT policy, GRM, RL runs and an evaluation, by their default names."""
    folder = tmp_path_factory.mktemp("reader")
    for name in os.listdir(ROOT):
        if name not in ("out", "exp", ".git"):
            os.symlink(os.path.join(ROOT, name), folder / name)
    data = folder / "out/data"
    data.mkdir(parents=True)
    (folder / "out/fresh").mkdir()
    for name in ("answer", "edit"):
        shutil.copy(tiny / f"{name}.txt", folder)
    for source, train in dict(prompts="prompts_train", pairs="pairs", judgements="judgements").items():
        shutil.copy(tiny / f"{source}.jsonl", data / f"{train}.jsonl")
        lines = (tiny / f"{source}.jsonl").read_text().splitlines(keepends=True)[:6]
        others = "".join(lines).replace("Kim ", "Lea ").replace('"prompt_id": "', '"prompt_id": "eval-')
        (data / f"{source}_eval.jsonl").write_text(others)
    write_personamem(data)
    for name in ("a", "b", "people"):
        made = [r | {"generator_2": name, "annotator": name} for r in made_annotations("mixed", 340)]
        if name == "people":  # whole verdicts, of the first model's answers
            made = [r | {"generator_2": "a", "preference": r["preference"] and round(r["preference"])} for r in made]
        (folder / f"{name}.json").write_text(json.dumps(made))
    (folder / "out/grm").symlink_to(tiny_grm)
    (folder / "checkpoint").symlink_to(tiny / "checkpoint")
    hub(folder / "release")
    run(folder, f"python sft.py --model {tiny / 'checkpoint'} --out out/sft")
    run(folder, "python ppo_cpe.py --save-batch 5 --edit-rate 1 --log-tokens 4 --out out/ppo_cpe")
    (folder / "out/ppo_cpe/batch_000020").symlink_to("batch_000005")
    (folder / "out/ppo").symlink_to("ppo_cpe")
    run(folder, "python evaluate.py --judge out/grm/model --out out/evaluate")
    save_what_pages_hold(folder)
    return folder


def write_personamem(data):
    row = dict(persona="Kim likes tea.", question="What now?", context_id="c", end_index=1, question_type="facts")
    row |= dict(options=["Tea.", "Jazz.", "A trip.", "Go."], correct="a", version="v1 32k", user_id="1")
    rows = [row | dict(prompt_id=f"q{i}") for i in range(4)]
    (data / "personamem_32k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = dict(context_id="c", messages=[dict(role="system", content="Kim likes tea.")])
    (data / "personamem_32k_contexts.jsonl").write_text(json.dumps(context) + "\n")


def save_what_pages_hold(folder):
    """Their reward functions become the files that their commands name."""
    (code,) = re.findall(r"^    def reward\(.*\n(?:    .*\n)+", read("docs/stages.md"), re.MULTILINE)
    (folder / "my_reward.py").write_text(re.sub(r"^    ", "", code, flags=re.MULTILINE))
    forks = read("docs/forking.md")
    (code,) = re.findall(r"```python\n(.*?def brief.*?)```", forks, re.DOTALL)
    (folder / "brief.py").write_text(code)
    (folder / "exp").mkdir()
    shutil.copy(folder / "ppo_cpe.py", folder / "exp" / "mine.py")


def test_what_is_not_run_is_on_a_page():
    every = [command for page in PAGES for command in commands(page)]
    assert [e for e in ELSEWHERE if not any(re.match(e, c) for c in every)] == []
    assert sum(map(len, RUN_HERE.values())) >= 20


@pytest.mark.parametrize("page", [page for page in PAGES if RUN_HERE[page]])
def test_the_commands_of_a_page_run_as_written(reader, page):
    """In their order: some stand on what those before them wrote."""
    for command in RUN_HERE[page]:
        print(command)
        assert run(reader, command).strip(), command


def test_the_notebook_runs_from_top_to_bottom(reader, monkeypatch):
    """With a tiny checkpoint instead of the one on the hub, few rows and steps, and a stand-in for IPython."""
    shown = []
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=shown.append))
    monkeypatch.chdir(reader)
    fewer = {"data/persona_world.py": " --pairs 60 --eval-prompts 8 --eval-pairs 8"}
    fewer |= {"sft.py": " --max-steps 2", "ppo_cpe.py": " --max-steps 2 --eval-n 4"}
    names = {}
    scripts = []
    for cell in json.loads(read("docs/ten_steps.ipynb"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source == "!pip install -q -r requirements.txt":  # tests/run.sh has done it
            continue
        if source.startswith("!python "):
            scripts.append(source.split()[1])
            run(reader, source.removeprefix("!").replace("\\\n", "") + fewer.get(scripts[-1], ""))
        else:
            exec(source, names)
    assert scripts == ["data/persona_world.py", "sft.py", "ppo_cpe.py", "report.py"]
    (page,) = shown
    assert "held_out/original/reward" in html.unescape(page)
