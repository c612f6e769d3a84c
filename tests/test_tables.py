"""results/make: the experiments and their commands, the runner, and the tables that finished experiments become."""

import json
import random
import shlex
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from test_recipes import ROW, write, write_run

from data import persona_world
from data.persona_world import say
from results.make import (
    agreement,
    critics,
    draw,
    experiments,
    figures,
    judgements,
    ladder,
    lora,
    paper,
    rarity,
    sweep,
    tables,
)
from results.make.experiments import Experiment, experiments_of, run
from runtime.rows import read_rows

pytestmark = pytest.mark.tables


def test_python_reads_the_flags_as_bash_does():
    names = list(experiments.FLAGS)
    assert names == ["base", "sft", "grm", "bt", "dpo", "rl", "ppo", "evaluation"]
    show = "".join(f'echo "${{{name.upper()}_FLAGS[*]}}"; ' for name in names)
    read = subprocess.run(["bash", "-uc", f"source recipes/world_flags.sh; {show}"], cwd=ROOT, capture_output=True)
    assert read.stdout.decode().splitlines() == list(experiments.FLAGS.values())


# -- the runner --------------------------------------------------------------------------------------------------------


def writes(path, text="x"):
    return f'-c \'open("{path}", "a").write("{text}")\''


def test_experiments_are_run_once_in_the_order_of_their_needs(tmp_path):
    log = tmp_path / "log"
    second = Experiment("b", [writes(log, "b"), writes(log, "c")], ["a"])
    wanted = [second, Experiment("a", [writes(log, "a")], alone=True)]
    run(wanted, str(tmp_path), jobs=2)
    assert log.read_text() == "abc"
    run(wanted, str(tmp_path), jobs=2)
    assert log.read_text() == "abc"  # finished: not run again
    assert json.loads((tmp_path / "b/done.json").read_text())["commands"] == second.commands
    with pytest.raises(ValueError, match="b/done.json: it was run with other commands"):
        run([Experiment("b", [writes(log, "d")])], str(tmp_path), jobs=1)


def test_an_experiment_that_fails_stops_the_others_and_is_run_again(tmp_path):
    fails = Experiment("fails", ["-c 'raise SystemExit(\"the check failed\")'"])
    slow = Experiment("slow", ["-c 'import time; time.sleep(60)'"])
    with pytest.raises(ValueError, match=r"(?s)fails failed .*fails.log.*the check failed"):
        run([slow, fails, Experiment("after", [writes(tmp_path / "log")], ["fails"])], str(tmp_path), jobs=2)
    assert not (tmp_path / "log").exists() and not (tmp_path / "slow/done.json").exists()
    run([Experiment("fails", [writes(tmp_path / "log")])], str(tmp_path), jobs=2)
    assert (tmp_path / "log").read_text() == "x"


def commands_with_a_space(trainings):
    """Asserts that the commands are the same words when the folder has a space in its name."""
    for plain, spaced in zip(experiments_of(trainings, "o/a_b"), experiments_of(trainings, "o/a b"), strict=True):
        assert plain.name == spaced.name
        for command, other in zip(plain.commands, spaced.commands, strict=True):
            assert [word.replace("o/a b/", "o/a_b/") for word in shlex.split(other)] == shlex.split(command)


@pytest.mark.parametrize("table", [paper, rarity, lora])
def test_commands_take_a_folder_with_a_space(table):
    commands_with_a_space(table.trainings(1))
    commands_with_a_space(table.searched())


# -- the paper's tables ------------------------------------------------------------------------------------------------


def test_every_variant_is_trained_and_differs_from_cpe_in_one_thing():
    full = {e.name: e for e in experiments_of(paper.trainings(3), "out")}
    assert all(need in full for e in full.values() for need in e.needs)
    variants = paper.variants()
    names = {name.split("/")[1] for name in full if name.startswith("seed0/")}
    assert names == set(variants) | {"sft", "grm", "bt", "checks", "accuracy", "dpo"}
    assert len(set(variants.values())) == len(variants) - 1  # the two PPO baselines differ in their judge
    train = {name: full[f"seed0/{name}"].commands[0] for name in variants}
    assert "--judge bt:out/seed0/bt/model" in train["ppo_bt"] and "--judge out/seed0/grm/model" in train["ppo_grm"]
    for name in variants:
        seeds = 5 if name in (*paper.MAIN, *paper.FOLLOWED_UP) else 3
        assert {e for e in full if e.endswith(f"/{name}")} == {f"seed{s}/{name}" for s in range(seeds)}
    quick = {e.name for e in experiments_of(paper.trainings(3, quick=True), "out")}
    assert {f"seed0/{name}" for name in paper.QUICK} <= quick and len(quick) < 15
    search = experiments_of(paper.searched(), "out")
    assert sum("prompts_dev" in e.commands[-1] for e in search) == sum(map(len, paper.LRS.values()))
    assert not {e.name for e in search} & set(full) - {"world", "base"}  # no seed that is reported


def test_the_drawn_tables_are_those_of_the_finished_figures():
    """All but the accuracy of the judges and the sanity checks, whose run folders are not kept."""
    results = figures.read_json(f"{ROOT}/results/results.json")
    by_seed = {n: {int(s): f for s, f in seeds.items()} for n, seeds in results["experiments"].items()}
    losses = paper.loss_labels()
    differences = paper.all_differences(by_seed, losses)
    assert differences == results["differences"]
    with open(f"{ROOT}/results/tables.md") as f:
        page = f.read()
    for title, table in paper.table_sections(by_seed, differences, losses).items():
        assert f"## {title}\n\n{table}\n\n" in page


@pytest.mark.slow
def test_finished_experiments_become_tables_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    out = tmp_path / "a b"
    wanted = {e.name: e for e in experiments_of(paper.trainings(2) + paper.searched(), str(out))}
    scores = {}
    for name in ("ppo_grm", "cpe"):
        for seed in (0, 1):
            scores[name, seed] = write_run(out / f"seed{seed}/{name}", rng)
    write_run(out / "seed100/cpe_lr5e-05", rng)
    for done in out.glob("*/*/done.json"):
        experiment = wanted[f"{done.parts[-3]}/{done.parts[-2]}"]
        write(done, dict(commands=experiment.commands, seconds=90.0))
    shutil.rmtree(out / "seed100/cpe_lr5e-05/rollouts")
    (out / "seed0/loss_none_batch").mkdir()  # not finished
    sdpo = {"reward": 3.95, "lc": 90.4}
    write(tmp_path / "drawn/results.json", dict(experiments={"loss_sdpo": {"0": sdpo}, "cpe": {"9": {}}}))
    args = tables.Args(table="paper", out=str(out), results="drawn", seeds=2, only_draw=True)
    tables.main(args)
    text = (tmp_path / "drawn/tables.md").read_text()
    line = "| CPE, GRM, 4 + 2 | 2 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 50.0 ± 0.0 | 60.0 ± 0.0 |"
    assert line in text and "lr5e-05" not in text and "| none, batch" not in text
    assert "| sdpo, n = 6, no edits | 3.95 |" in text  # no longer trained: as the folder had it
    assert text.split("\n\n", 3)[3].strip() in capsys.readouterr().out
    results = json.loads((tmp_path / "drawn/results.json").read_text())["experiments"]
    assert set(results) == {"ppo_grm", "cpe", "loss_sdpo"} and set(results["cpe"]) == {"0", "1"}
    cpe = results["cpe"]["1"]
    assert np.isclose(cpe["in_training"], scores["cpe", 1][0].mean())
    expected = dict(trained=6, generated=30, judge_calls=9, minutes=1.5, inserted=50.0)
    assert {name: cpe[name] for name in expected} == expected
    drawn = {"score", "hacking", "dimensions", "reward_against_exact", "edits", "internalisation", "ledger"}
    assert {path.stem for path in (tmp_path / "drawn").glob("*.png")} == drawn
    args.search = True
    tables.main(args)
    assert "| CPE, GRM, 4 + 2 | **5e-05** | 1.00 | 60.00 | 1.00 |" in (tmp_path / "drawn/search.md").read_text()


def test_difference_over_seeds_is_a_paired_t_interval():
    numbers = {
        "cpe": {0: {"reward": 3.0}, 1: {"reward": 3.5}, 2: {"reward": 3.1}, 4: {"reward": 9.0}},
        "ppo_grm": {0: {"reward": 2.8}, 1: {"reward": 2.9}, 2: {"reward": 3.0}, 3: {"reward": 0.0}},
    }
    found = draw.difference(numbers, "cpe", "ppo_grm", "reward")
    differences = np.array([0.2, 0.6, 0.1])  # of the seeds that both have
    reference = stats.ttest_rel([3.0, 3.5, 3.1], [2.8, 2.9, 3.0])
    interval = reference.confidence_interval()
    assert (
        found["seeds"] == 3
        and np.isclose(found["mean"], differences.mean())
        and np.isclose(found["p"], reference.pvalue)
    )
    assert np.allclose([found["low"], found["high"]], [interval.low, interval.high])
    assert draw.difference(numbers, "cpe", "dpo", "reward") is None


def test_what_is_missing_leaves_a_gap():
    numbers = {
        "cpe": {0: {"reward": 1.0, "lc": 50.0}, 1: {"reward": 2.0, "lc": 60.0}},
        "random_0.1": {0: {"reward": 3.0, "lc": 70.0}},
    }
    lines = paper.grid_table(numbers, ("random", "batch_rank"), (0.1, 0.5, 1.0)).splitlines()
    assert lines[2] == "| random, score | 3.00 | 1.50 ± 0.71 | - |"
    assert lines[3] == "| batch_rank, score | - | - | - |"
    assert lines[4] == "| random, LC, % | 70.0 | 55.0 ± 7.1 | - |"
    table = paper.method_table({"cpe": "CPE", "dpo": "DPO"}, numbers, ["reward", "swap"]).splitlines()
    assert table[2:] == ["| CPE | 2 | 1.50 ± 0.71 | - |"]


def test_seeds_that_had_a_part_in_a_choice_are_told_apart():
    scores = {"ppo_grm": (3.0, 3.2, 3.4), "loss_sdpo": (3.5, 3.7, 4.1)}
    numbers = {name: {s: {"reward": x} for s, x in enumerate(of_seeds)} for name, of_seeds in scores.items()}
    del numbers["ppo_grm"][1]
    lines = paper.seed_table({"ppo_grm": "PPO", "loss_sdpo": "sdpo"}, numbers, chosen_on={0}).splitlines()
    assert lines[2:] == [
        "| PPO | 3.00 | - | 3.40 | 3.40 | 3.20 ± 0.28 |",
        "| sdpo | 3.50 | 3.70 | 4.10 | 3.90 ± 0.28 | 3.77 ± 0.31 |",
    ]


# -- rarity ------------------------------------------------------------------------------------------------------------


def test_critics_judge_alike_and_say_different_things():
    answer = "First plan the menu. Then set the table."
    said = {name: getattr(critics, name)(ROW, answer) for name in rarity.CRITICS}
    assert len({(j.helpfulness, j.personalization, j.naturalness) for j in said.values()}) == 1
    assert "lentil curry" in said["exact"].critique
    for name in ("kind", "vague", "silent"):
        assert "lentil curry" not in said[name].critique
    assert said["kind"].critique.startswith("Say more of the person.")
    assert said["vague"].critique == "Something is missing."


def test_wrong_critics_are_wrong_as_often_as_they_say():
    answers = [f"First plan the menu. {say('food', 'vegan')} {'Then set the table. ' * n}" for n in range(300)]
    true = [critics.exact(ROW, answer).critique for answer in answers]
    for name, probability in (("wrong10", 0.1), ("wrong50", 0.5)):
        critic = getattr(critics, name)
        first = [critic(ROW, answer).critique.split(".")[0] == t.split(".")[0] for answer, t in zip(answers, true)]
        assert sum(first) / len(first) == pytest.approx(1 - probability, abs=0.08)
        assert critic(ROW, answers[0]) == critic(ROW, answers[0])


def test_the_experiments_of_the_diagram():
    full = {e.name: e for e in experiments_of(rarity.trainings(3), "out")}
    assert all(need in full for e in full.values() for need in e.needs)
    for rate in rarity.RATES:
        for name in (*rarity.METHODS, "ppo_tokens", "sft", "checks"):
            assert {f"seed{s}/rate{rate:g}/{name}" for s in range(3)} <= set(full)
    for name in rarity.CRITICS:
        assert f"--judge results/make/critics.py:{name}" in full[f"seed0/rate0.003/critic_{name}"].commands[0]
    search = {e.name for e in experiments_of(rarity.searched(), "out")}
    assert not search & set(full) - {"world", "base", *(f"rate{r:g}" for r in rarity.RATES)}
    tried = [name for name in search if "_lr" in name and "rate0.003" in name]
    assert len(tried) == len(rarity.METHODS) * len(rarity.LRS)


def test_all_experiments_of_the_diagram_have_figures():
    """And their commands are those of today, so that none would be run again."""
    for trainings in (rarity.trainings(3), rarity.searched()):
        wanted = experiments_of(trainings, "OUT")
        known = experiments.read_kept(f"{ROOT}/results/rarity/rarity.json", {e.name: e.commands for e in wanted})
        assert experiments.missing(wanted, known, rarity.parts_of) == []


def test_learning_rates_are_the_best_of_the_search():
    """As results/rarity/rarity.json has it: by the exact score, each method at each of three rates."""
    by_rate = rarity.by_rate(experiments.read_kept(f"{ROOT}/results/rarity/rarity.json", {}), (rarity.SEARCH_SEED,))
    for rate, tried in rarity.TRIED.items():
        for name, lrs in tried.items():
            scores = {lr: rarity.values_of(by_rate, rate, f"{name}_lr{lr:g}", "reward")[0] for lr in lrs}
            assert rarity.LR[rate][name] == max(scores, key=scores.get), (rate, name, scores)
    assert {rarity.SEARCHED_AT[rate] for rate in rarity.RATES} == set(rarity.LR)


def finished_diagram(tmp_path, seeds):
    """Finished runs of some experiments, and the arguments that draw them."""
    rng = random.Random(0)
    out = tmp_path / "runs"
    for experiment in experiments_of(rarity.trainings(2), str(out)):
        seed, rate, name = rarity.parts_of(experiment.name) or (None, None, None)
        if seed in seeds and rate in (0.3, 0.003, 0.0) and name in ("sft", "ppo", "none", "checks"):
            folder = out / experiment.name
            if name == "checks":
                checks = dict(last_step=rate, advice=rate / 2, missed=[], nearly=[])
                write(folder / "sanity_checks.json", checks)
            else:
                write_run(folder, rng)
            write(folder / "done.json", dict(commands=experiment.commands, seconds=1))
    return tables.Args(table="rarity", out=str(out), results=str(tmp_path / "drawn"), seeds=2, only_draw=True)


@pytest.mark.slow
def test_finished_experiments_become_the_diagram(tmp_path, capsys):
    args = finished_diagram(tmp_path, (0, 1, *rarity.CONFIRM_SEEDS[:2]))
    tables.main(args)
    assert "32 of 165 experiments are finished" in capsys.readouterr().out
    text = (tmp_path / "drawn/rarity.md").read_text()
    assert "| PPO, n = 6 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text and "CPE, tis" not in text
    assert "|  | 30.00 ± 0.00 % | 0.30 ± 0.00 % | 0.00 ± 0.00 % |" in text  # the measured rates head the columns
    assert "| CPE, none less PPO, n = 6 | 0.3 | +0.00 | +0.00 to +0.00 | 2 |" in text
    confirmed = text.split("## R = 0 on seeds that chose nothing (101, 102, 103)")[1].split("\n## ")[0]
    assert "| PPO, n = 6 | 0 | 2 | 1.00 ± 0.00 |" in confirmed
    assert "| CPE, none less PPO, n = 6 | 0 | +0.00 |" in confirmed
    drawn = {path.stem for path in (tmp_path / "drawn").glob("*.png")}
    assert drawn == {"rarity", "rarity_curves", "rarity_novel_tokens"}
    shutil.rmtree(tmp_path / "runs")  # another machine: the tables are drawn from rarity.json
    tables.main(args)
    assert (tmp_path / "drawn/rarity.md").read_text() == text


@pytest.mark.slow
def test_the_drawn_diagram_is_that_of_the_finished_figures(tmp_path):
    """results/rarity/*.md, from results/rarity/rarity.json, which drawing leaves as it is."""
    shutil.copy(f"{ROOT}/results/rarity/rarity.json", tmp_path)
    for search, name in ((False, "rarity.md"), (True, "search.md")):
        tables.main(tables.Args("rarity", str(tmp_path / "runs"), str(tmp_path), search=search, only_draw=True))
        for file in (name, "rarity.json"):
            with open(f"{ROOT}/results/rarity/{file}") as f:
                assert f.read() == (tmp_path / file).read_text()


def test_novel_tokens_are_told_from_what_follows_them():
    ledger = {"edit/kept": 0.6, "edit/novel": 0.1, "edit/novel_weight": 0.2, "edit/inserted_weight": 0.8}
    none_novel = {"edit/kept": 0.6, "edit/novel": 0.0, "edit/inserted_weight": 0.8}
    quantities = {f"edit/inserted_{q}": 1.0 for q in ("ratio", "clipfrac")}
    curves = figures.edit_curves([quantities | ledger, {}, quantities | none_novel])
    assert curves["novel_weight"] == [0.2, None, None]
    assert curves["followed_weight"] == [1.0, None, 0.8]  # (.4 x .8 - .1 x .2) / .3
    assert figures.edit_curves([{"step": 1}]) == {}


@pytest.mark.slow
def test_experiments_of_two_machines_come_together(tmp_path):
    for seed in (0, 1):
        args = finished_diagram(tmp_path, (seed,))
        tables.main(args)
        shutil.rmtree(tmp_path / "runs")
    text = (tmp_path / "drawn/rarity.md").read_text()
    assert "| CPE, none less PPO, n = 6 | 0.3 | +0.00 | +0.00 to +0.00 | 2 |" in text
    known = json.loads((tmp_path / "drawn/rarity.json").read_text())
    todo = {e.name for e in experiments.missing(experiments_of(rarity.trainings(2), "OUT"), known, rarity.parts_of)}
    rates = ("0.3", "0.003", "0")
    assert not todo & set(known) - {f"seed{s}/rate{r}/{n}" for s in (0, 1) for r in rates for n in ("sft", "checks")}
    assert {"world", "base", "seed1/grm", "seed1/rate0.3/tis"} <= todo
    known["seed0/rate0.3/none"]["commands"] = ["other"]
    (tmp_path / "drawn/rarity.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"rarity.json: seed0/rate0.3/none was run with other commands"):
        tables.main(args)


# -- the ladder of judges ----------------------------------------------------------------------------------------------


def rollout_rows(run, step):
    return read_rows(f"{run}/rollouts/step_{step:06d}.jsonl", "object")


def test_the_experiments_of_the_ladder():
    wanted = {e.name: e.commands for e in ladder.experiments("out")}
    assert all(need in wanted for e in ladder.experiments("out") for need in e.needs)
    assert {f"seed{seed}/recipe" for seed in range(5)} <= set(wanted)
    for judge in ladder.JUDGES:
        assert {f"seed{seed}/{judge}/agreement" for seed in range(3)} <= set(wanted)
        if judge not in ladder.OF_RECIPE:
            assert f"seed2/{judge}/ppo" in wanted and (f"seed2/{judge}/cpe" in wanted) == (judge in ladder.CRITICS)
    with open(f"{ROOT}/recipes/tiny.sh") as f:
        recipe = " ".join(f.read().replace("\\\n", " ").split())
    # the same steps and flags as the recipe, whose runs are rungs of the ladder
    assert f'--max-steps "$(scaled {ladder.STEPS} 2)"' in recipe and f"scaled {ladder.GRM_STEPS} 80" in recipe
    assert ladder.METHODS["cpe"] in recipe and '"${PPO_FLAGS[@]}" --out "$OUT/ppo_grm"' in recipe
    assert "--lr 5e-5" in recipe and "--lr 5e-5" in wanted["seed0/scores/ppo"][0]


@pytest.mark.slow
def test_finished_experiments_become_the_ladder(tmp_path, capsys):
    """Runs of two seeds; then once more from ladder.json alone."""
    rng = random.Random(0)
    out = tmp_path / "runs"
    for experiment in ladder.experiments(str(out)):
        folder = out / experiment.name
        seed = int(experiment.name[len("seed")])
        if seed > 1:
            continue
        kind = experiment.name.split("/")[-1]
        if kind == "recipe":
            write(folder / "checks/sanity_checks.json", dict(sees_other_profile=1.0, missed=[], nearly=[]))
            for run in ("base", "sft", "ppo_bt", "ppo_grm", "cpe"):
                write_run(folder / run, rng)
                shutil.copytree(folder / run / "eval", folder / "eval" / run)
            for run in ("base", "sft"):
                shutil.rmtree(folder / run / "rollouts")
        elif kind == "agreement":
            write(folder / "agreement.json", dict(own=0.9, other=0.5 + seed, sees_other=0.25, unparsable=0.0))
        elif kind != "grm":
            write_run(folder, rng)
        write(folder / "done.json", dict(commands=experiment.commands, seconds=60))
    args = tables.Args(table="ladder", out=str(out), results=str(tmp_path / "drawn"), only_draw=True)
    tables.main(args)
    text = (tmp_path / "drawn/ladder.md").read_text()
    kept = json.loads((tmp_path / "drawn/ladder.json").read_text())
    sampled = [row for step in (1, 2, 3) for row in rollout_rows(f"{out}/seed1/small/ppo", step)]
    exact = [figures.exact_score(row, row["answer"]) for row in sampled]
    assert kept["seed1/small/ppo"]["late_excess"] == pytest.approx(1.5 - np.mean(exact))
    assert "| scores | 2 | 0.90 ± 0.00 | 1.00 ± 0.71 | 0.25 ± 0.00 |" in text
    assert "| Bradley-Terry: a number | 2 | 0.90 ± 0.00 | 1.00 ± 0.71 | - |" in text
    assert "| checks/cpe less checks/ppo | +0.00 | +0.00 to +0.00 | 2 |" in text
    assert "seed0/small/grm" not in kept and "seed0/recipe" in kept
    shutil.rmtree(out)  # another machine
    tables.main(args)
    assert (tmp_path / "drawn/ladder.md").read_text() == text


def test_rows_for_the_judges_of_the_ladder(tmp_path):
    """Parts that are left out, and answers of policies, which the exact judge judges."""
    rng = random.Random(0)
    rows = list(persona_world.judgement_rows(rng, "train", 8))
    write(tmp_path / "world/judgements.jsonl", rows)
    write_run(tmp_path / "run", rng, steps=4)
    args = judgements.Args(str(tmp_path / "world"), str(tmp_path / "plain.jsonl"), ("checks", "critique"))
    judgements.main(args)
    plain = read_rows(args.out, "judgement")
    assert [row["helpfulness"] for row in plain] == [row["helpfulness"] for row in rows]
    assert {(row["checks"], row["critique"]) for row in plain} == {("", ".")}
    judgements.main(replace(args, without=("checks",), rollouts=(str(tmp_path / "run"),)))
    refreshed = read_rows(args.out, "judgement")
    late = rollout_rows(tmp_path / "run", 3) + rollout_rows(tmp_path / "run", 4)
    written = {row["answer"] for row in late} | {row["edit"]["answer"] for row in late}
    ours = [row for row in refreshed if row["answer"] in written]
    assert len(refreshed) == 8 and len(ours) == 4
    for row in ours:
        exact = persona_world.judge(row, row["answer"])
        assert (row["critique"], row["helpfulness"]) == (exact.critique, exact.helpfulness)


def test_agreement_of_a_judge(tmp_path):
    """The exact judge agrees with itself; one that never looks at the profile sees no other one."""
    rows = list(persona_world.judgement_rows(random.Random(0), "eval", 30))
    write(tmp_path / "judgements_eval.jsonl", rows)
    blind = tmp_path / "blind.py"
    blind.write_text("def judge(row, answer):\n    return float(len(answer))\n")
    found = {}
    for name, spec in (("exact", "data/persona_world.py:judge"), ("blind", f"{blind}:judge")):
        agreement.main(agreement.Args(str(tmp_path), spec, str(tmp_path / name)))
        found[name] = json.loads((tmp_path / name / "agreement.json").read_text())
    assert found["exact"] == pytest.approx({"own": 1, "other": 1, "sees_other": 1, "unparsable": 0})
    assert found["blind"]["sees_other"] == 0 and abs(found["blind"]["own"]) < 0.9


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_the_experiments_of_the_sweep():
    for wanted in (sweep.experiments("out", 2), sweep.experiments("out", 1, quick=True), sweep.searched("out")):
        names = [e.name for e in wanted]
        assert len(names) == len(set(names)) and all(need in names for e in wanted for need in e.needs)
    commands = {e.name: e.commands for e in sweep.experiments("out", 2)}
    for rate in sweep.RATES:
        assert {f"seed1/rate{rate:g}/{name}" for name in ("sft", "checks", *sweep.METHODS)} <= set(commands)
        assert f"--rarity {rate:g} {rate:g} --seed 1" in commands[f"seed1/rate{rate:g}/sft"][0]
    for name in sweep.CRITICS:  # a later flag replaces an earlier one
        words = commands[f"seed0/rate0/critic_{name}"][0].split()
        assert words[len(words) - words[::-1].index("--judge")] == f"results/make/critics.py:{name}"
    assert commands["seed0/recipe"] == ladder.recipe("out", 0).commands  # the ladder's: it is not run twice
    assert not {e.name for e in sweep.searched("out")} & set(commands)


@pytest.mark.slow
def test_finished_experiments_become_the_sweep(tmp_path, capsys):
    """Two seeds, some methods; then once more from sweep.json alone."""
    rng = random.Random(0)
    out = tmp_path / "runs"
    for experiment in sweep.experiments(str(out), 2):
        seed, rate, name = sweep.parts_of(experiment.name) or (None, None, None)
        if rate in (0.3, 0.0) and name in ("sft", "ppo", "none", "checks", "critic_exact"):
            folder = out / experiment.name
            if name == "checks":
                write(folder / "sanity_checks.json", dict(last_step=rate, advice=rate / 2, missed=[], nearly=[]))
            else:
                write_run(folder, rng)
            write(folder / "done.json", dict(commands=experiment.commands, seconds=1))
    args = tables.Args(table="sweep", out=str(out), results=str(tmp_path / "drawn"), seeds=2, only_draw=True)
    tables.main(args)
    assert "18 of 122 experiments are finished" in capsys.readouterr().out
    text = (tmp_path / "drawn/sweep.md").read_text()
    assert "|  | 15.000 ± 0.000 % | 0.000 ± 0.000 % |" in text  # the measured rates head the columns
    assert "| PPO, n = 6 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text and "CPE, paper" not in text
    assert "| CPE, none | 0.3 | +0.00 | +0.00 to +0.00 |" in text
    assert "| critic_exact | 0 | 2 | 1.00 ± 0.00 |" in text and "|   beside CPE, none | 0 | 2 |" in text
    assert {path.stem for path in (tmp_path / "drawn").glob("*.png")} == {"sweep", "sweep_curves"}
    shutil.rmtree(out)
    tables.main(args)
    assert (tmp_path / "drawn/sweep.md").read_text() == text


def test_steps_until_half_of_the_samples_and_holms_correction():
    assert sweep.step_of_half([0.1, 0.49, 0.5, 0.2]) == 3 and sweep.step_of_half([0.1]) is None
    seeds = {"ppo": (1.0, 1.1, 1.2), "none": (2.0, 2.3, 2.2), "paper": (1.3, 1.2, 1.5)}
    known = {f"seed{i}/rate0/{n}": dict(reward=x, commands=[]) for n, xs in seeds.items() for i, x in enumerate(xs)}
    known |= {f"seed{i}/rate0/checks": dict(advice=0.0, commands=[]) for i in range(3)}
    table = sweep.differences_from_ppo(sweep.by_rate(known, search=False))
    raw = [stats.ttest_rel(seeds[name], seeds["ppo"]).pvalue for name in ("none", "paper")]
    assert raw[0] < raw[1]
    rows = {line.split(" | ")[0]: line.split(" | ")[4] for line in table.splitlines()[2:]}
    assert float(rows["| CPE, none"]) == pytest.approx(2 * raw[0], abs=5e-4)  # two comparisons, the smaller p first
    assert float(rows["| CPE, paper"]) == pytest.approx(max(2 * raw[0], raw[1]), abs=5e-4)


# -- LoRA --------------------------------------------------------------------------------------------------------------


def test_full_training_is_what_the_rarity_table_has_run():
    """The same commands under the same names, so that a finished experiment is taken over; adapters add two flags."""
    ours = {e.name: e.commands for e in experiments_of(lora.trainings(3), "out/rarity")}
    theirs = {e.name: e.commands for e in experiments_of(rarity.trainings(3), "out/rarity")}
    shared = {name for name in ours if "lora" not in name}
    assert {f"seed2/rate0.003/{name}" for name in ("sft", *lora.METHODS)} < shared
    assert all(ours[name] == theirs[name] for name in shared)
    full, low = (ours[f"seed0/rate0.003/{name}"][0].split() for name in ("unclipped", "unclipped_lora32"))
    assert low[-2:] == ["--lora-rank", "32"] and sum(a != b for a, b in zip(full, low)) == 2  # --out and --lr
    search = experiments_of(lora.searched(), "out/rarity")
    assert sum("_lora32_lr" in e.name for e in search) == len(lora.METHODS) * len(lora.LRS)


@pytest.mark.slow
def test_finished_experiments_become_the_table_of_lora(tmp_path):
    rng = random.Random(0)
    finished = []
    for name in ("ppo", "ppo_lora4"):
        for seed in (0, 1):
            folder = tmp_path / f"seed{seed}/rate0.003/{name}"
            write_run(folder, rng)
            phases = {f"seconds/{phase}": 2.0 + seed for phase in ("rollout", "score", "update")}
            steps = [row | phases for row in read_rows(str(folder / "metrics.jsonl"), "metrics")]
            write(folder / "metrics.jsonl", steps)
            finished.append(f"seed{seed}/rate0.003/{name}")
    lora.write_table(str(tmp_path), [*finished, "seed0/rate0.003/sft"], str(tmp_path / "drawn"), search=False)
    text = (tmp_path / "drawn/lora.md").read_text()
    assert "| PPO, n = 6 | all weights | 2 | 1.00 ± 0.00 |" in text and "| PPO, n = 6 | lora4 | 2 |" in text
    assert text.count("| 2.5 ± 0.7 | 2.5 ± 0.7 | 2.5 ± 0.7 |") == 2 and "sft" not in text
