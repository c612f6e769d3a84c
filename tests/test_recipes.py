"""The recipes: their commands, qwen.sh to its table, rare content, tables."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_script
from test_judge_servers import PairServer, Quiet

from data.persona_world import TOPICS, judge, judgement_rows, recites_profile, sample_prompt, write_answer
from json_files import read_json
from prompts import DIMENSIONS, judgement_text
from recipes import rare_content, sanity_checks, tiny_table
from results.make import experiments, ladder, sweep
from runtime.rows import read_rows

# -- the shell recipes -------------------------------------------------------------------------------------------------

# Stands in for `python` and `torchrun`: writes a line of its arguments, as JSON; code that is given with -c it runs.
# With STATUS, a named pipe, its exit status is what comes through that.
STUB = """#!{python} -IS
import json, os, sys
if sys.argv[1] == "-c":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if "STATUS" in os.environ:
    with open(os.environ["STATUS"]) as f:
        sys.exit(int(f.read()))
"""


@pytest.fixture
def stubs(tmp_path):
    """A folder with the recipes and an environment of stubs."""
    shutil.copytree(f"{ROOT}/recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(f"{ROOT}/requirements.txt", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(f"{ROOT}/requirements.txt", tmp_path / ".venv/installed.txt")  # there is nothing to install
    for name in ("python", "torchrun"):
        (tmp_path / ".venv/bin" / name).write_text(STUB.format(python=sys.executable))
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def calls_of(stubs):
    """(recipe, its arguments, environment) -> the commands that it runs: lists of words. Nothing is trained."""

    def calls(name, *arguments, **environment):
        log = stubs / "calls"
        log.write_text("")
        if name in ("own_data.sh", "qwen.sh"):  # as if data/annotate.py had written rows of held-out persons
            for folder in ("out/own/data", "out/data", f"{environment.get('OUT')}/data", environment.get("DATA")):
                if folder:
                    write(stubs / folder / "prompts_eval.jsonl", [{}])
        environment = os.environ | environment | {"CALLS": str(log)}
        command = ["bash", str(stubs / "recipes" / name), *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        return [json.loads(line) for line in log.read_text().splitlines()]

    return calls


ARGUMENTS = {"real_cpu.sh": ["my_model"], "own_data.sh": ["people.csv", "asked.csv", "--judge", "http://host#m"]}


@pytest.mark.parametrize("name", ["tiny.sh", "real_cpu.sh", "own_data.sh", "qwen.sh 0.5b", "qwen.sh 7b", "qwen.sh 14b"])
def test_a_folder_may_have_a_space_in_its_name(calls_of, name):
    recipe, *size = name.split()

    def calls(out, data, model):
        arguments = [model if word == "my_model" else word for word in ARGUMENTS.get(recipe, size)]
        return calls_of(recipe, *arguments, OUT=out, DATA=data, MODEL=model)

    plain, spaced = calls("out/a_b", "my_data", "my_model"), calls("out/a b", "my data", "my model")
    assert len(plain) >= 6
    back = {"out/a b": "out/a_b", "my data": "my_data", "my model": "my_model"}
    pattern = re.compile("|".join(map(re.escape, back)))
    renamed = [[pattern.sub(lambda match: back[match[0]], word) for word in call] for call in spaced]
    assert sorted(renamed) == sorted(plain)  # tiny.sh runs some beside others, in any order


def test_a_world_of_another_rarity_is_not_taken_for_this_one(stubs):
    world = stubs / "out/tiny/world"
    world.mkdir(parents=True)
    (world / "judgements_eval.jsonl").write_text("")
    (world / "made_with.txt").write_text("SEED=0 RARITY=0\n")
    environment = os.environ | {"CALLS": str(stubs / "calls"), "RARITY": "0.1"}
    command = ["bash", str(stubs / "recipes/tiny.sh")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "was made with SEED=0 RARITY=0, not SEED=0 RARITY=0.1" in ran.stderr


def test_a_plan_of_the_data_trains_nothing(calls_of):
    calls = calls_of("qwen.sh", "0.5b", "people.csv", "-", "--plan", PLAN_ONLY="")
    assert any("--plan" in call and "data/annotate.py" in call for call in calls)
    after = calls[max(i for i, call in enumerate(calls) if "data/annotate.py" in call) + 1 :]
    assert after == []


def test_a_stopped_stage_can_say_what_it_saved(stubs):
    """Otherwise a script dies of the line that it prints before its checkpoint, since nobody reads it."""
    stage = """trap 'sleep 0.3; echo saved; exit 75' TERM; echo begun; while :; do sleep 0.05; done"""
    script = f'source recipes/jobs.sh; marked A bash -c "{stage}" & all_done'
    recipe = subprocess.Popen(["bash", "-c", script], cwd=stubs, stdout=subprocess.PIPE, text=True)
    assert recipe.stdout.readline() == "[A] begun\n"
    recipe.terminate()
    assert recipe.stdout.read().endswith("[A] saved\n")
    recipe.wait()


def test_a_failed_installation_is_tried_again(stubs):
    (stubs / "requirements.txt").write_text("torch\n")
    (stubs / ".venv/bin/pip").write_text("")
    (stubs / ".venv/bin/pip").chmod(0o755)
    (stubs / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    for _ in range(2):
        command = ["bash", "-c", "source recipes/environment.sh; echo it went on"]
        done = subprocess.run(command, cwd=stubs, capture_output=True, text=True)
        assert done.returncode == 1 and "went on" not in done.stdout and "the installation failed" in done.stderr


def test_tables_are_named_from_where_the_command_was_given(stubs, tmp_path_factory):
    mine = tmp_path_factory.mktemp("mine")
    environment = os.environ | {"CALLS": str(stubs / "calls"), "PLAN_ONLY": ""}
    command = ["bash", str(stubs / "recipes/qwen.sh"), "0.5b", "people.csv", "asked.csv", "--plan"]
    subprocess.run(command, cwd=mine, env=environment, capture_output=True, text=True, timeout=60, check=True)
    calls = (stubs / "calls").read_text()
    assert f"{mine}/people.csv" in calls and f"{mine}/asked.csv" in calls


RECIPES = [name for name in sorted(os.listdir(f"{ROOT}/recipes")) if name.endswith(".sh")]
SOURCED = {"environment.sh", "jobs.sh", "world_flags.sh"}


@pytest.mark.parametrize(
    "file", [f"recipes/{name}" for name in RECIPES if name not in SOURCED] + ["bench/cpu.sh", "bench/gpu.sh"]
)
def test_the_help_of_a_recipe_is_its_first_comment(file, tmp_path):
    """And nothing is run, from whatever folder it is asked."""
    folder, name = os.path.split(f"{ROOT}/{file}")
    for where, script in ((ROOT, file), (folder, name), (tmp_path, f"{ROOT}/{file}")):
        done = subprocess.run(["bash", script, "--help"], cwd=where, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0 and done.stderr == "" and f"  bash {file}" in done.stdout
        assert not done.stdout.startswith("#") and "set -" not in done.stdout


def scripts(calls):
    """The script of each command."""
    return [next(os.path.basename(word) for word in call if word.endswith(".py")) for call in calls]


STAGES = ["sft.py", "train_grm.py", "ppo_cpe.py"]


def test_the_recipe_of_own_data(calls_of):
    """All stages with the flags given for each; some of them; questions that are written; a judge of one's own."""
    given = dict(PREPARE_FLAGS="--question-column text", SFT_FLAGS="--max-steps 4", GRM_FLAGS="--max-steps 5", OUT="o")
    calls = calls_of("own_data.sh", "people.csv", "asked.csv", "--judge", "http://host#m", **given)
    assert scripts(calls) == ["prepare.py", "annotate.py", "report.py", *STAGES, "evaluate.py"]
    commands = [" ".join(call) for call in calls]
    assert "--question-column text" in commands[0] and "--judge http://host#m" in commands[1]
    assert "--max-steps 4" in commands[3] and "--max-steps 5" in commands[4] and "--judge o/grm/model" in commands[5]
    calls = calls_of("own_data.sh", "people.csv", "-", "--plan")
    assert scripts(calls) == ["annotate.py"] and "--personas" in calls[0]
    calls = calls_of("own_data.sh", "people.csv", "asked.csv", JUDGE="http://host", STAGES="sft grm cpe")
    assert scripts(calls) == ["sft.py", "ppo_cpe.py"] and calls[1][calls[1].index("--judge") + 1] == "http://host"


def test_own_data_without_held_out_persons(calls_of, stubs):
    """Said before any training; without judgements of theirs, the GRM is trained and not tested."""
    write(stubs / "out/own/data/judgements_eval.jsonl", [{}])
    (held_out,) = calls_of("own_data.sh", "people.csv", "asked.csv", STAGES="grm")
    assert held_out[held_out.index("--eval-data") + 1] == "out/own/data/judgements_eval.jsonl"
    (stubs / "out/own/data/judgements_eval.jsonl").write_text("")
    (none,) = calls_of("own_data.sh", "people.csv", "asked.csv", STAGES="grm")
    assert "--eval-data" not in none
    (stubs / "out/own/data/prompts_eval.jsonl").unlink()
    command = ["bash", str(stubs / "recipes/own_data.sh"), "people.csv", "asked.csv"]
    environment = os.environ | {"CALLS": str(stubs / "calls")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and "no person is held out" in ran.stderr


BASELINES = ["train_grm.py", "dpo.py", "ppo_cpe.py"]  # BT, DPO, PPO (BT)
PUBLIC = ["prepare.py"] * 3  # PersonaFeedback, AlpacaEval, PersonaMem
TABLE = ["evaluate.py", "evaluate.py"] * 3 + ["benchmark_table.py"]  # of the base alone, since nothing is trained


@pytest.mark.parametrize("size", ["0.5b", "7b", "14b"])
def test_the_recipe_of_qwen_begins_with_rows_or_takes_a_judge(calls_of, size):
    def runs(*arguments, **environment):
        return [call for call in calls_of("qwen.sh", size, *arguments, **environment) if "--plan" not in call]

    def judge_of(call):
        return call[call.index("--judge") + 1]

    stages = ["sft.py", "train_grm.py", *BASELINES, "ppo_cpe.py", "ppo_cpe.py"]
    assert scripts(runs()) == [*PUBLIC, *stages, *TABLE]
    with_rows = runs("people.csv", "asked.csv", "--judge", "http://host#m", STAGES="sft grm cpe")
    assert scripts(with_rows) == ["prepare.py", "annotate.py", "report.py", *STAGES]
    assert "out/data" in with_rows[1] and "out/data/pairs.jsonl" in with_rows[3]
    for judged in (runs("--judge", "http://host"), runs(JUDGE="http://host")):
        assert scripts(judged) == [*PUBLIC, "sft.py", *BASELINES, "ppo_cpe.py", "ppo_cpe.py", *TABLE]
        of_ppo, of_cpe = [call for call in judged if "ppo_cpe.py" in call][-2:]
        assert judge_of(of_ppo) == judge_of(of_cpe) == "http://host"
    rl = runs(STAGES="cpe")
    assert scripts(rl) == ["ppo_cpe.py"]
    assert judge_of(rl[0]) == f"out/qwen{size}/grm/model"
    assert f"out/qwen{size}/sft/policy" in rl[0]
    plans = calls_of("qwen.sh", size, PLAN_ONLY="1", GRM_MODEL="larger")
    assert scripts(plans) == stages and all("--plan" in call for call in plans)
    assert "larger" in plans[1] and judge_of(plans[-1]) == "larger"


def test_a_wrong_stage_or_benchmark_of_qwen_is_told_before_any_work(calls_of, stubs):
    for environment, message in (
        (dict(STAGES="sft ppo"), "STAGES: ppo is none of rows, sft, grm, bt, dpo, ppo_bt, ppo_grm, cpe, evaluate"),
        (dict(BENCHMARKS="alpaca_eval mine"), r"BENCHMARKS: there is no out/data/mine\.jsonl"),
    ):
        with pytest.raises(AssertionError, match=message):
            calls_of("qwen.sh", "7b", **environment)
        calls = [json.loads(line) for line in (stubs / "calls").read_text().splitlines()]
        assert all("--plan" in call or "data/prepare.py" in call for call in calls)


class ChatAndPairServer(PairServer):
    """Also judges single answers, and answers questions, each with one sentence."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        text = json.loads(body)["messages"][0]["content"]
        if "Which of the two" in text:
            self.rfile = io.BytesIO(body)
            return super().do_POST()
        content = judgement_text("Name the tea.", -1 if "it depends" in text else 4, 1, 1)
        if "<scores>" not in text:
            self.server.requests[text].append(body)
            content = "Plan a quiet evening with tea."
        message = dict(role="assistant", content=content)
        self.reply(200, json.dumps(dict(choices=[dict(index=0, message=message, finish_reason="stop")])).encode())


@pytest.fixture
def chat_server(short_pauses):
    server = Quiet(ChatAndPairServer)
    server.models = ["gpt"]
    server.logprobs = "given"
    yield server
    server.end()


def run_recipe(folder, name, *arguments, **environment):
    """Runs a recipe with stubs, and each of its commands in this process -> the commands, and what they printed."""
    calls = folder / "calls"
    status = folder / "status"
    for pipe in (calls, status):
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
    environment = os.environ | environment | {"CALLS": str(calls), "STATUS": str(status)}
    command = ["bash", "-c", 'bash "$@"; echo "$?" > "$CALLS"', "-", f"recipes/{name}", *arguments]
    recipe = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    commands = []
    outputs = []
    try:
        while (call := json.loads(calls.read_text())) != 0:
            assert isinstance(call, list), f"exit status {call}"
            commands.append(call)
            first = next(i for i, word in enumerate(call) if word.endswith(".py"))
            outputs.append(run_script(*call[first:], folder=folder))
            status.write_text("0")
    finally:
        if recipe.poll() is None:
            os.killpg(recipe.pid, signal.SIGKILL)
        recipe.wait()
    return commands, outputs


@pytest.mark.slow
def test_the_recipe_of_qwen_to_its_table(stubs, tiny, chat_server):
    """All stages with a tiny checkpoint. A server is RL's judge, the baseline and the evaluation's judge. The baseline
    is asked once, and a second run makes nothing."""
    data = stubs / "out/data"
    results = stubs / "out/qwen0.5b/evaluate"
    for name, source in dict(prompts_train="prompts", pairs="pairs", judgements="judgements").items():
        write(data / f"{name}.jsonl", read_rows(str(tiny / f"{source}.jsonl"), "prompt"))
    rows = read_rows(str(tiny / "prompts.jsonl"), "prompt")[:6]
    benchmarks = ["prompts_winrate", "personamem_32k"]
    for name in benchmarks:
        held_out = [row | dict(prompt_id=f"{name}-{i}", persona={"name": f"Lea {i}"}) for i, row in enumerate(rows)]
        write(data / f"{name}.jsonl", held_out)
    template = f"--answer-template {tiny}/answer.txt"
    small = "--tokens-per-microbatch 500 --batch-size 16 --max-steps 1"
    url = f"{chat_server.url}#gpt"
    stages = ["sft", "grm", "bt", "dpo", "ppo_bt", "ppo_grm", "cpe"]
    environment = dict(
        STAGES=" ".join(["rows", *stages, "evaluate"]),
        MODEL=str(tiny / "checkpoint"),
        JUDGE=url,
        SFT_FLAGS=f"{small} {template}",
        GRM_FLAGS=f"{small} --grm-template {tiny}/grm.txt",
        BT_FLAGS=f"{small} {template}",
        DPO_FLAGS=small,
        RL_FLAGS="--prompts-per-step 4 --mini-batch-prompts 2 --n-samples 2 --max-new-tokens 8 --max-steps 1 "
        f"--tokens-per-microbatch 300 --edit-template {tiny}/edit.txt",
        EVALUATION_FLAGS=f"--max-new-tokens 8 --bootstrap-draws 5 {template}",
        BENCHMARKS=" ".join(benchmarks),
        BASELINE=url,
        PEERS=url,
        EVALUATION_JUDGE=f"pair:{url}",
    )
    commands, outputs = run_recipe(stubs, "qwen.sh", "0.5b", **environment)
    assert [call[call.index("--out") + 1] for call in commands[7:14]] == [f"out/qwen0.5b/{name}" for name in stages]
    assert all("fits: yes" in output for output in outputs[:7])
    for name, judge_of_run, edit_rate in (
        ("ppo_bt", "bt:out/qwen0.5b/bt/model", 0),
        ("ppo_grm", url, 0),
        ("cpe", url, 0.5),
    ):
        run_args = read_json(f"{stubs}/out/qwen0.5b/{name}/args.json")
        assert (run_args["judge"], run_args["edit_rate"]) == (judge_of_run, edit_rate)

    policies = ["base", "sft", "dpo", "ppo_bt", "ppo_grm", "cpe", "gpt"]
    table = (results / "table.md").read_text()
    assert table in outputs[-1]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:9]]
    for name, (title, *cells) in zip(policies, shown, strict=True):
        assert title == name
        for i, benchmark in enumerate(benchmarks):
            evaluated = read_json(f"{results}/{benchmark}/{name}/results.json")
            rate = evaluated["length_controlled"]["minimal"]["length_controlled_winrate"]
            tokens = evaluated["model"]["n_tokens"]["mean"]
            assert cells[2 * i].startswith(f"{rate:.1f}")
            assert cells[2 * i + 1] == ("-" if tokens is None else f"{tokens:.0f}")
            assert evaluated["generators"]["model"].endswith(
                {"base": "checkpoint", "gpt": "#gpt"}.get(name, f"{name}/policy")
            )
            assert evaluated["generators"]["baseline"] == (url if benchmark == "personamem_32k" else "reference")
    asked = [len(times) for text, times in chat_server.requests.items() if isinstance(text, str)]
    assert asked == [2] * 6  # once a benchmark, in one of which it is the baseline, too

    chat_server.requests.clear()
    commands, outputs = run_recipe(stubs, "qwen.sh", "0.5b", **environment | dict(STAGES="sft cpe evaluate"))
    assert not chat_server.requests and not any(re.search("[1-9][0-9]* to make", output) for output in outputs)
    assert (results / "table.md").read_text() == table
    (stubs / "out/qwen0.5b/dpo/policy/README.md").unlink()  # a run that was stopped: its policy is half trained
    commands, _ = run_recipe(stubs, "qwen.sh", "0.5b", **environment | dict(STAGES="evaluate"))
    assert "out/qwen0.5b/sft/policy" in str(commands) and "out/qwen0.5b/dpo/policy" not in str(commands)


def test_the_audit_fetches_rows_and_evaluates_each_weight(calls_of, stubs):
    for name in ("pairs", "pairs_eval"):  # as data/prepare.py would
        write(stubs / f"d/{name}.jsonl", [])
    calls = calls_of("audit.sh", OUT="o", DATA="d")
    assert scripts(calls) == ["prepare.py", *["evaluate.py"] * 6, "benchmark_table.py"]
    assert [call[call.index("--task") + 1] for call in calls[1:7]] == ["win-rate", "persona-swap"] * 2 + [
        "reward-accuracy"
    ] * 2
    assert calls[-1][-3:] == [
        "PersonalAILab_Personalized-Qwen2.5-7B-Instruct",
        "PersonalAILab_Personalized-Qwen2.5-14B-Instruct",
        "PersonalAILab_GRM-Qwen2.5-14B-Instruct",
    ]


@pytest.mark.slow
def test_the_audit_to_its_table(stubs, tiny, chat_server):
    """Two tiny policies, and a server as GRM, judge and baseline: each figure with its interval. Each answer is made
    once."""
    data = stubs / "data"
    for name, source in dict(prompts_eval="prompts", pairs="pairs", pairs_eval="pairs", rewardbench="pairs").items():
        rows = read_rows(str(tiny / f"{source}.jsonl"), "prompt")[:6]
        write(data / f"{name}.jsonl", [row | {"prompt_id": f"{name}-{i}"} for i, row in enumerate(rows)])
    shutil.copytree(tiny / "checkpoint", stubs / "other")
    url = f"{chat_server.url}#gpt"
    environment = dict(
        POLICIES=f"{tiny}/checkpoint other",
        GRM=url,
        JUDGE=f"pair:{url}",
        BASELINE=url,
        DATA="data",
        OUT="out",
        EVALUATION_FLAGS=f"--max-new-tokens 8 --bootstrap-draws 5 --answer-template {tiny}/answer.txt",
    )
    _, outputs = run_recipe(stubs, "audit.sh", **environment)
    table = (stubs / "out/table.md").read_text()
    assert table in outputs[-1]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert shown[0][1:] == [
        "win-rate: LC, %",
        "win-rate: tokens",
        "persona-swap: swap",
        "personafeedback: accuracy, %",
        "rewardbench: accuracy, %",
    ]
    *policies, grm = shown[2:5]
    for _, rate, tokens, *others in policies:
        assert " to " in rate and tokens.isdigit() and others == ["0.00", "-", "-"]  # all equal
    assert grm[1:] == ["-", "-", "-", "100.0", "100.0"]
    assert [len(times) for text, times in chat_server.requests.items() if isinstance(text, str)] == [1] * 6
    pairs = read_json(f"{stubs}/out/personafeedback/{grm[0]}/results.json")["total"]
    assert pairs["n"] + pairs["without_verdict"] == 12  # the pairs of both files
    sampled = [next(line for line in output.splitlines() if line.startswith("answers:")) for output in outputs[:4]]
    assert ["0 to make" in line for line in sampled] == [False, True, True, True]  # the second has the first's weights


def test_the_recipe_of_qwen_knows_three_sizes(calls_of):
    with pytest.raises(AssertionError, match=r"usage: bash recipes/qwen.sh 0.5b\|7b\|14b"):
        calls_of("qwen.sh", "3b")


def scripts_at(calls, script):
    return next(i for i, call in enumerate(calls) if script in call)


def test_the_tiny_recipe_and_the_experiments_train_with_the_same_flags(calls_of):
    tiny = [" ".join(call[1:]) for call in calls_of("tiny.sh", OUT="out")]
    tiny = [command.removeprefix("--nproc_per_node=2 ") for command in tiny]
    wanted = ladder.experiments("out") + sweep.experiments("out", 1)
    full = [command for e in wanted for command in e.commands]
    stages = {
        "base": "sft.py --from-scratch",
        "sft": "sft.py --model",
        "grm": "train_grm.py --model",
        "bt": "train_grm.py --objective bt",
        "rl": "ppo_cpe.py",
        "evaluation": "evaluate.py --model",
    }
    for stage, start in stages.items():
        for commands in (tiny, full) if stage != "bt" else (tiny,):
            found = [command for command in commands if command.startswith(start)]
            assert found and all(experiments.FLAGS[stage] in command for command in found)
    without_edits = [command for command in tiny if experiments.FLAGS["ppo"] in command]
    assert [command.split("--out ")[1] for command in without_edits] == ["out/ppo_bt", "out/ppo_grm"]


# -- rare content in the generated world -------------------------------------------------------------------------------

PERSONA = dict(name="Ada Novak", food="vegan", drink="tea", sport="yoga", transport="bus", music="jazz", pet="cat")
PERSONA |= dict(budget="low", job="nurse")
ROW = dict(prompt_id="p", persona=PERSONA, question="How do I host a dinner?")
LAST = TOPICS["host a dinner"][2][-1]


def test_rare_content_by_hand():
    """food: suitable advice; drink: a true value without advice. Then advice that is another person's, and nothing."""
    answers = (
        f"Your food is vegan, so choose lentil curry. Your drink is tea. First {LAST}.",
        "Your food is vegan, so choose lamb kebab. First plan the menu.",
        "First plan the menu.",
    )
    measured = rare_content.measure([ROW | {"answer": answer} for answer in answers])
    assert measured == dict(last_step=1 / 3, advice=1 / 6, advice_right=1 / 2, wrong=1 / 3)
    assert rare_content.measure([ROW | {"answer": "First plan the menu."}])["advice_right"] is None


def test_what_an_edit_carries_out():
    row = ROW | {"answer": "First plan the menu. Then set the table. Then send the invitations."}
    dictated = judge(row, row["answer"]).critique
    assert dictated.startswith("Say your food is vegan, so choose lentil curry. Say your drink is tea")
    assert f"Add: {LAST}." in dictated
    edit = f"Your food is vegan, so choose lentil curry. Your drink is tea. First {LAST}."
    assert rare_content.carried_out([row], [edit]) == dict(edit_step=1.0, edit_advice=0.5)


@pytest.mark.parametrize("rarity_of, said", [((0.0, 0.0), 0.0), ((1.0, 1.0), 1.0)])
def test_the_world_is_as_rare_as_asked(rarity_of, said):
    rng = random.Random(0)
    rows = []
    for _ in range(200):
        persona, question = sample_prompt(rng, "train")
        answer = write_answer(rng, persona, question, 1.0, rarity_of)
        rows.append(dict(prompt_id="p", persona=persona, question=question, answer=answer))
    measured = rare_content.measure(rows)
    assert measured["last_step"] == said
    if said == 0:
        assert measured["advice"] == 0
    else:
        assert measured["advice"] > 0.7  # an attribute may be left out, or advice be off


# -- the closing table of tiny.sh --------------------------------------------------------------------------------------


def write(path, rows):
    """A JSON file, or for .jsonl one of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(lines)


def write_run(folder, rng, steps=3):
    """A finished experiment as ppo_cpe.py and evaluate.py leave it, of invented runs -> exact scores, edited scores."""
    numbers = {name: {"mean": 1.0, "standard_error": 0.1} for name in ("reward", *DIMENSIONS, "n_tokens")}
    results = dict(
        model=numbers,
        win_rate={"win_rate": 0.5, "low": 0.25, "high": 0.75},
        length_controlled={"minimal": {"length_controlled_winrate": 60.0}},
    )
    write(folder / "eval/results.json", results)
    write(folder / "done.json", dict(commands=[], seconds=90.0))
    parts, quantities = ("kept", "inserted", "novel"), ("ratio", "weight", "gradient_mass", "clipfrac")
    ledger = {f"edit/{kind}_{what}": 0.5 for kind in parts for what in quantities} | {
        "edit/kept": 0.6,
        "edit/novel": 0.1,
    }
    costs = {"batch": 2, "generated_tokens": 10, "judge_calls": 3, "seconds/update": 1.0}
    write(folder / "metrics.jsonl", [dict(step=step + 1, **costs, **ledger) for step in range(steps)])
    before, after = [], []
    for step in range(1, steps + 1):
        rows = []
        for _ in range(4):
            persona, question = sample_prompt(rng, "train")
            texts = write_answer(rng, persona, question, 0.2), write_answer(rng, persona, question, 0.9)
            for scores, text in zip((before, after), texts):
                scores.append(judge(dict(persona=persona, question=question), text).score())
            edit = {"answer": texts[1], "reward": 2.0}
            rows.append(
                dict(
                    prompt_id="p",
                    persona=persona,
                    question=question,
                    answer=texts[0],
                    reward=1.5,
                    n_tokens=9,
                    edit=edit,
                )
            )
        for name in ("rollouts", "held_out"):
            write(folder / name / f"step_{step:06d}.jsonl", rows)
        write(folder / "eval/answers_model.jsonl", rows)
    return np.array(before), np.array(after)


def test_the_closing_table_of_the_tiny_recipe(tmp_path, capsys):
    before, after = write_run(tmp_path / "cpe", random.Random(0), steps=6)
    write(tmp_path / "sanity_checks.json", dict(same_first_edit=0.845, missed=[], nearly=["same_first_edit"]))
    run = str(tmp_path / "cpe")
    tiny_table.main(tiny_table.Args(runs=(f"PPO (GRM)={run}/eval",), edits_of=run, checks=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    answers = read_rows(f"{run}/eval/answers_model.jsonl", "object")
    said = rare_content.measure(answers)
    shown = [f"{100 * said[name]:.1f}" for name in ("last_step", "advice", "wrong")]
    recites = [recites_profile(row["persona"], row["answer"]) for row in answers]
    error = np.std(recites, ddof=1) / len(recites) ** 0.5
    shown.append(f"{100 * np.mean(recites):.2f} ± {100 * error:.2f}")
    tokens = "1.00 ± 0.10"
    win_rate = "50.0 (25.0 to 75.0)"
    assert re.split(r"  +", lines[1]) == ["PPO (GRM)", "1.00 ± 0.10", *shown, tokens, win_rate]
    assert any(line.startswith("sanity check same_first_edit: 0.845") for line in lines)
    gains = after - before
    for line, part in zip(lines[-3:], (gains[:8], gains[-8:], gains), strict=True):  # 4 edits a step
        better, worse = 100 * (part > 0).mean(), 100 * (part < 0).mean()
        assert line.split()[-5:] == ["+0.50", f"{part.mean():+.2f}", f"{better:.0f}", f"{worse:.0f}", f"{len(part)}"]


# -- sanity_checks.py --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [True, False])
def test_a_judge_that_does_not_read_the_profile_fails_the_checks(tmp_path, monkeypatch, reads):
    """The exact judge sees the whole drop under another profile. One that believes all claims sees none of it."""
    rows = list(judgement_rows(random.Random(0), "eval", 80))
    write(tmp_path / "judgements_eval.jsonl", rows)

    def judgements_of(_, asked):
        believed = dict(zip((row["prompt_id"] for row in rows), rows))
        return [judge(row if reads else believed[row["prompt_id"]], row["answer"]) for row in asked]

    monkeypatch.setattr(sanity_checks, "open_judge", lambda *_: None)
    monkeypatch.setattr(sanity_checks, "judgements_of", judgements_of)
    args = sanity_checks.Args(world=str(tmp_path), policy="", grm="", out="")
    figures = sanity_checks.grm_figures(args, ranks=None)
    assert figures["score_correlation"] == pytest.approx(1) and figures["same_first_edit"] == 1
    assert figures["sees_other_profile"] == pytest.approx(float(reads))
    for name in ("sees_other_profile", "swapped_correlation"):
        assert (sanity_checks.shortfall(name, figures[name]) <= 0) == reads
