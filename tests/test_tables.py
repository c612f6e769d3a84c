"""The recipes: their commands, the runner of recipes/cells.py, and what recipes/draw.py makes of finished cells."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from data.persona_world import judge, sample_prompt, write_answer
from prompts import DIMENSIONS
from recipes import cells as recipe
from recipes import draw, rates
from recipes.cells import Args, Cell, cells_of, run, variants

# -- the shell recipes -------------------------------------------------------------------------------------------------

# Stands in for `python` and `torchrun`: writes a line of its arguments, as JSON; code that is given with -c it runs.
STUB = """#!{python} -IS
import json, os, sys
if sys.argv[1] == "-c":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def calls_of(tmp_path):
    """(recipe, its arguments, environment) -> the commands that it runs: lists of words. Nothing is trained."""
    shutil.copytree(f"{ROOT}/recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(f"{ROOT}/requirements.txt", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(f"{ROOT}/requirements.txt", tmp_path / ".venv/installed.txt")  # there is nothing to install
    for name in ("python", "torchrun"):
        (tmp_path / ".venv/bin" / name).write_text(STUB.format(python=sys.executable))
        (tmp_path / ".venv/bin" / name).chmod(0o755)

    def calls(name, *arguments, **environment):
        log = tmp_path / "calls"
        log.write_text("")
        environment = os.environ | environment | {"CALLS": str(log)}
        command = ["bash", str(tmp_path / "recipes" / name), *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        return [json.loads(line) for line in log.read_text().splitlines()]

    return calls


ARGUMENTS = {"real_cpu.sh": ["my_model"], "own_data.sh": ["people.csv", "asked.csv", "--judge", "http://host#m"]}


@pytest.mark.parametrize("name", ["tiny.sh", "real_cpu.sh", "own_data.sh", "qwen0.5b.sh", "qwen7b.sh", "qwen14b.sh"])
def test_a_folder_may_have_a_space_in_its_name(calls_of, name):
    def calls(out, data, model):
        arguments = [model if word == "my_model" else word for word in ARGUMENTS.get(name, [])]
        return calls_of(name, *arguments, OUT=out, DATA=data, MODEL=model)

    plain, spaced = calls("out/a_b", "my_data", "my_model"), calls("out/a b", "my data", "my model")
    assert len(plain) >= 6
    back = {"out/a b": "out/a_b", "my data": "my_data", "my model": "my_model"}
    pattern = re.compile("|".join(map(re.escape, back)))
    renamed = [[pattern.sub(lambda match: back[match[0]], word) for word in call] for call in spaced]
    assert sorted(renamed) == sorted(plain)  # tiny.sh runs some beside others, in any order


def scripts(calls):
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


@pytest.mark.parametrize("name", ["qwen0.5b.sh", "qwen7b.sh", "qwen14b.sh"])
def test_recipes_begin_with_rows_or_take_a_judge(calls_of, name):
    def runs(*arguments):
        return [call for call in calls_of(name, *arguments) if "--plan" not in call]

    assert scripts(runs()) == STAGES
    with_rows = runs("people.csv", "asked.csv", "--judge", "http://host#m")
    assert scripts(with_rows) == ["prepare.py", "annotate.py", "report.py", *STAGES]
    assert "out/data" in with_rows[1] and "out/data/pairs.jsonl" in with_rows[3]
    judged = runs("--judge", "http://host")
    assert scripts(judged) == ["sft.py", "ppo_cpe.py"] and judged[1][judged[1].index("--judge") + 1] == "http://host"


def test_the_recipe_for_a_cpu_takes_rows_of_ones_own(calls_of, tmp_path):
    """Its GRM is trained on their judgements, if some are held out to see whether it parses, else on the world's."""
    by_default = calls_of("real_cpu.sh", "model", OUT="o")
    assert "o/world/judgements.jsonl" in by_default[scripts_at(by_default, "train_grm.py")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "judgements_eval.jsonl").write_text("{}\n")
    own = calls_of("real_cpu.sh", "model", OUT="o", DATA="mine")
    assert "mine/judgements.jsonl" in own[scripts_at(own, "train_grm.py")]
    assert "mine/pairs.jsonl" in own[scripts_at(own, "sft.py")]


def scripts_at(calls, script):
    return next(i for i, call in enumerate(calls) if script in call)


def test_the_tiny_recipe_and_the_cells_train_with_the_same_flags(calls_of):
    tiny = [" ".join(call[1:]) for call in calls_of("tiny.sh", OUT="out")]
    tiny = [command.removeprefix("--nproc_per_node=2 ") for command in tiny]
    full = [command for cell in cells_of(Args(), "out") for command in cell.commands]
    stages = {
        "base": "sft.py --from-scratch",
        "sft": "sft.py --model",
        "grm": "train_grm.py --model",
        "bt": "train_grm.py --objective bt",
        "rl": "ppo_cpe.py",
        "evaluation": "evaluate.py --model",
    }
    for stage, start in stages.items():
        for commands in (tiny, full):
            found = [command for command in commands if command.startswith(start)]
            assert found and all(recipe.FLAGS[stage] in command for command in found)
    without_edits = [command for command in tiny if recipe.FLAGS["ppo"] in command]
    assert [command.split("--out ")[1] for command in without_edits] == ["out/ppo_bt", "out/ppo_grm"]


def test_python_reads_the_flags_as_bash_does():
    names = list(recipe.FLAGS)
    assert names == ["base", "sft", "grm", "bt", "dpo", "rl", "ppo", "evaluation"]
    show = "".join(f'echo "${{{name.upper()}_FLAGS[*]}}"; ' for name in names)
    read = subprocess.run(["bash", "-uc", f"source recipes/world_flags.sh; {show}"], cwd=ROOT, capture_output=True)
    assert read.stdout.decode().splitlines() == list(recipe.FLAGS.values())


# -- the runner --------------------------------------------------------------------------------------------------------


def writes(path, text="x"):
    return f'-c \'open("{path}", "a").write("{text}")\''


def test_cells_are_run_once_in_the_order_of_their_needs(tmp_path):
    log = tmp_path / "log"
    cells = [Cell("b", [writes(log, "b"), writes(log, "c")], ["a"]), Cell("a", [writes(log, "a")], alone=True)]
    run(cells, str(tmp_path), jobs=2)
    assert log.read_text() == "abc"
    run(cells, str(tmp_path), jobs=2)
    assert log.read_text() == "abc"  # finished: not run again
    assert json.loads((tmp_path / "b/done.json").read_text())["commands"] == cells[0].commands
    with pytest.raises(ValueError, match="b/done.json: this cell was run with other commands"):
        run([Cell("b", [writes(log, "d")])], str(tmp_path), jobs=1)


def test_a_cell_that_fails_stops_the_others_and_is_run_again(tmp_path):
    fails = Cell("fails", ["-c 'raise SystemExit(\"the gate is closed\")'"])
    slow = Cell("slow", ["-c 'import time; time.sleep(60)'"])
    with pytest.raises(ValueError, match=r"(?s)fails failed .*fails.log.*the gate is closed"):
        run([slow, fails, Cell("after", [writes(tmp_path / "log")], ["fails"])], str(tmp_path), jobs=2)
    assert not (tmp_path / "log").exists() and not (tmp_path / "slow/done.json").exists()
    run([Cell("fails", [writes(tmp_path / "log")])], str(tmp_path), jobs=2)
    assert (tmp_path / "log").read_text() == "x"


def test_every_cell_is_there_and_differs_from_cpe_in_one_thing():
    full = {cell.name: cell for cell in cells_of(Args(), "out")}
    assert all(need in full for cell in full.values() for need in cell.needs)
    names = {name.split("/")[1] for name in full if name.startswith("seed0/")}
    assert names == set(variants()) | {"sft", "grm", "bt", "gates", "accuracy", "dpo"}
    flags = list(variants().values())
    assert len(set(flags)) == len(flags) - 1  # the two PPO baselines differ in their judge
    train = {name: full[f"seed0/{name}"].commands[0] for name in variants()}
    assert "--judge bt:out/seed0/bt/model" in train["ppo_bt"] and "--judge out/seed0/grm/model" in train["ppo_grm"]
    for name in variants():
        seeds = 5 if name in (*draw.MAIN, *draw.FOLLOWED_UP) else 3
        assert {cell for cell in full if cell.endswith(f"/{name}")} == {f"seed{s}/{name}" for s in range(seeds)}
    quick, search = ({cell.name for cell in cells_of(Args(**{k: True}), "out")} for k in ("quick", "search"))
    assert {f"seed0/{name}" for name in recipe.QUICK} <= quick and len(quick) < 15
    searched = cells_of(Args(search=True), "out")
    assert sum("prompts_dev" in cell.commands[-1] for cell in searched) == sum(map(len, draw.LRS.values()))
    assert not search & set(full) - {"world", "base"}  # no seed that is reported


def test_the_commands_of_cells_take_a_folder_with_a_space():
    for flags in ({}, {"search": True}):
        for plain, spaced in zip(cells_of(Args(**flags), "o/a_b"), cells_of(Args(**flags), "o/a b"), strict=True):
            assert plain.name == spaced.name
            for command, other in zip(plain.commands, spaced.commands, strict=True):
                assert [word.replace("o/a b/", "o/a_b/") for word in shlex.split(other)] == shlex.split(command)


# -- tables and figures ------------------------------------------------------------------------------------------------


def write(path, rows):
    """A JSON file, or for .jsonl one of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(lines)


def write_cell(folder, rng, steps=3):
    """A finished cell as ppo_cpe.py and evaluate.py leave it, of invented runs -> (exact scores, edited scores)."""
    numbers = {name: {"mean": 1.0, "standard_error": 0.1} for name in ("reward", *DIMENSIONS, "n_tokens")}
    results = dict(
        model=numbers | {"recites_profile": {"mean": 0.25, "standard_error": 0.1}},
        win_rate={"win_rate": 0.5, "low": 0.25, "high": 0.75},
        length_controlled={"minimal": {"length_controlled_winrate": 60.0}},
    )
    write(folder / "eval/results.json", results)
    write(folder / "done.json", dict(commands=[], seconds=90.0))
    parts, quantities = ("kept", "inserted", "branch"), ("ratio", "weight", "mass", "clipfrac")
    ledger = {f"edit/{kind}_{what}": 0.5 for kind in parts for what in quantities} | {
        "edit/kept": 0.6,
        "edit/branch": 0.1,
    }
    costs = dict(batch=2, generated_tokens=10, judge_calls=3)
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
            rows.append(dict(persona=persona, question=question, answer=texts[0], reward=1.5, n_tokens=9, edit=edit))
        for name in ("rollouts", "held_out"):
            write(folder / name / f"step_{step:06d}.jsonl", rows)
        write(folder / "eval/answers_model.jsonl", rows)
    return np.array(before), np.array(after)


def test_finished_cells_become_tables_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, out = random.Random(0), tmp_path / "a b"
    scores = {(name, s): write_cell(out / f"seed{s}/{name}", rng) for name in ("ppo_grm", "cpe") for s in (0, 1)}
    write_cell(out / "seed100/cpe_lr5e-05", rng)
    shutil.rmtree(out / "seed100/cpe_lr5e-05/rollouts")
    (out / "seed0/loss_sdpo").mkdir()  # not finished
    draw.main(draw.Cells(out=str(out), results="drawn"))
    text = (tmp_path / "drawn/tables.md").read_text()
    line = "| CPE, GRM, 4 + 2 | 2 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 50.0 ± 0.0 | 60.0 ± 0.0 |"
    assert line in text and "lr5e-05" not in text and "| sdpo" not in text
    assert text.split("\n\n", 3)[3].strip() in capsys.readouterr().out
    found = json.loads((tmp_path / "drawn/results.json").read_text())
    assert set(found["cells"]) == {"ppo_grm", "cpe"} and set(found["cells"]["cpe"]) == {"0", "1"}
    cell = found["cells"]["cpe"]["1"]
    assert np.isclose(cell["in_training"], scores["cpe", 1][0].mean())
    expected = dict(trained=6, generated=30, judge_calls=9, minutes=1.5, inserted=50.0, recites=25.0)
    assert {name: cell[name] for name in expected} == expected
    figures = {"score", "hacking", "dimensions", "reward_against_exact", "edits", "internalisation", "ledger"}
    assert {path.stem for path in (tmp_path / "drawn").glob("*.png")} == figures
    draw.main(draw.Search(out=str(out), results="drawn"))
    assert "| CPE, GRM, 4 + 2 | **5e-05** | 1.00 | 60.00 | 1.00 |" in (tmp_path / "drawn/search.md").read_text()


def test_the_closing_table_of_the_tiny_recipe(tmp_path, capsys):
    before, after = write_cell(tmp_path / "cpe", random.Random(0), steps=6)
    write(tmp_path / "gates.json", dict(same_first_edit=0.845, missed=[], nearly=["same_first_edit"]))
    run = str(tmp_path / "cpe")
    draw.main(draw.Tiny(runs=[f"PPO (GRM)={run}/eval"], edits_of=run, gates=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    said = rates.rates(
        [json.loads(line) for line in (tmp_path / "cpe/eval/answers_model.jsonl").read_text().splitlines()]
    )
    shown = [f"{100 * said[name]:.1f}" for name in ("last_step", "advice", "wrong")]
    tokens, win_rate = "1.00 ± 0.10", "50.0 (25.0 to 75.0)"
    assert re.split(r"  +", lines[1]) == ["PPO (GRM)", "1.00 ± 0.10", *shown, "25.00 ± 10.00", tokens, win_rate]
    assert any(line.startswith("gate same_first_edit: 0.845") for line in lines)
    gains = after - before
    for line, part in zip(lines[-3:], (gains[:8], gains[-8:], gains), strict=True):  # 4 edits a step
        better, worse = 100 * (part > 0).mean(), 100 * (part < 0).mean()
        assert line.split()[-5:] == ["+0.50", f"{part.mean():+.2f}", f"{better:.0f}", f"{worse:.0f}", f"{len(part)}"]


def test_difference_over_seeds_is_a_paired_t_interval():
    numbers = {
        "cpe": {0: {"reward": 3.0}, 1: {"reward": 3.5}, 2: {"reward": 3.1}, 4: {"reward": 9.0}},
        "ppo_grm": {0: {"reward": 2.8}, 1: {"reward": 2.9}, 2: {"reward": 3.0}, 3: {"reward": 0.0}},
    }
    found = draw.difference(numbers, "cpe", "ppo_grm", "reward")
    gaps = np.array([0.2, 0.6, 0.1])  # of the seeds that both have
    reference = stats.ttest_rel([3.0, 3.5, 3.1], [2.8, 2.9, 3.0])
    interval = reference.confidence_interval()
    assert found["seeds"] == 3 and np.isclose(found["mean"], gaps.mean()) and np.isclose(found["p"], reference.pvalue)
    assert np.allclose([found["low"], found["high"]], [interval.low, interval.high])
    assert draw.difference(numbers, "cpe", "dpo", "reward") is None


def test_what_is_missing_leaves_a_gap():
    numbers = {
        "cpe": {0: {"reward": 1.0, "lc": 50.0}, 1: {"reward": 2.0, "lc": 60.0}},
        "random_0.1": {0: {"reward": 3.0, "lc": 70.0}},
    }
    lines = draw.grid(numbers, ("random", "batch_rank"), (0.1, 0.5, 1.0)).splitlines()
    assert lines[2] == "| random, score | 3.00 | 1.50 ± 0.71 | - |"
    assert lines[3] == "| batch_rank, score | - | - | - |"
    assert lines[4] == "| random, LC, % | 70.0 | 55.0 ± 7.1 | - |"
    table = draw.method_table({"cpe": "CPE", "dpo": "DPO"}, numbers, ["reward", "swap"]).splitlines()
    assert table[2:] == ["| CPE | 2 | 1.50 ± 0.71 | - |"]


def test_seeds_that_had_a_part_in_a_choice_are_told_apart():
    scores = {"ppo_grm": (3.0, 3.2, 3.4), "loss_sdpo": (3.5, 3.7, 4.1)}
    numbers = {name: {s: {"reward": x} for s, x in enumerate(of_seeds)} for name, of_seeds in scores.items()}
    del numbers["ppo_grm"][1]
    lines = draw.seed_table({"ppo_grm": "PPO", "loss_sdpo": "sdpo"}, numbers, chosen_on={0}).splitlines()
    assert lines[2:] == [
        "| PPO | 3.00 | - | 3.40 | 3.40 | 3.20 ± 0.28 |",
        "| sdpo | 3.50 | 3.70 | 4.10 | 3.90 ± 0.28 | 3.77 ± 0.31 |",
    ]
