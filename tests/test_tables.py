"""results/make: the experiments and their commands, the runner, and the tables that finished experiments become."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from test_recipes import ROW, write, write_run

from data import persona_world
from data.persona_world import say
from recipes import fork
from results.make import (
    agreement,
    critics,
    draw,
    experiments,
    figures,
    followed,
    judgements,
    ladder,
    subset,
    sweep,
    tables,
    tournament,
)
from results.make.experiments import Experiment, run
from runtime.digests import digest_of
from runtime.rows import read_rows, write_rows

pytestmark = pytest.mark.tables


def test_python_reads_the_flags_as_bash_does():
    names = list(experiments.FLAGS)
    assert names == ["base", "sft", "grm", "bt", "rl", "ppo", "evaluation"]
    show = "".join(f'echo "${{{name.upper()}_FLAGS[*]}}"; ' for name in names)
    read = subprocess.run(["bash", "-uc", f"source recipes/world_flags.sh; {show}"], cwd=ROOT, capture_output=True)
    assert read.stdout.decode().splitlines() == list(experiments.FLAGS.values())


# -- the runner --------------------------------------------------------------------------------------------------------


def writes(path, text="x"):
    return f'-c \'open("{path}", "a").write("{text}")\''


def test_experiments_are_run_once_in_the_order_of_their_needs(tmp_path):
    log = tmp_path / "log"
    second = Experiment("b", [writes(log, "b"), writes(log, "c")], ["a"])
    wanted = [second, Experiment("a", [writes(log, "a")])]
    run(wanted, str(tmp_path), jobs=2)
    assert log.read_text() == "abc"
    run(wanted, str(tmp_path), jobs=2)
    assert log.read_text() == "abc"  # finished: not run again
    assert json.loads((tmp_path / "b/done.json").read_text())["commands"] == second.commands
    with pytest.raises(ValueError, match="b/done.json: it was run with other commands"):
        run([Experiment("b", [writes(log, "d")])], str(tmp_path), jobs=1)
    for text in "ef":  # a folder that is always made anew
        run([Experiment("always", [writes(tmp_path / "always/log", text)], always=True)], str(tmp_path), jobs=1)
    assert (tmp_path / "always/log").read_text() == "f"


def test_an_experiment_is_of_what_it_needs(tmp_path, monkeypatch):
    """Another command of what it needs, another input or other flags of a stage: its figures are of other settings."""

    def wanted(command="x", made_from=""):
        found = [Experiment("a", [command], [], made_from), Experiment("b", ["y"], ["a"])]
        experiments.set_settings(found)
        return found[1]

    made = wanted()
    record = dict(commands=made.commands, settings=made.settings)
    assert not experiments.was_made_otherwise(wanted(), record)
    assert experiments.was_made_otherwise(wanted("z"), record) and experiments.was_made_otherwise(
        wanted("x", "1"), record
    )
    monkeypatch.setitem(experiments.FLAGS, "grm", "--epochs 9")
    write(tmp_path / "table.json", {"b": record})
    with pytest.raises(ValueError, match="table.json: b was run with other commands or after others"):
        experiments.read_kept(str(tmp_path / "table.json"), [wanted()])


def test_an_experiment_that_fails_stops_no_other_and_is_run_again(tmp_path):
    """Those that need it are left out, and the command fails in the end."""
    log = tmp_path / "log"
    fails = Experiment("fails", ["-c 'raise SystemExit(\"the check failed\")'"])
    after = [Experiment("after", [writes(log, "a")], ["fails"]), Experiment("later", [writes(log, "l")], ["after"])]
    with pytest.raises(ValueError, match=r"(?s)fails failed .*fails.log.*the check failed.*after was left out.*later"):
        run([fails, *after, Experiment("other", [writes(log, "o")])], str(tmp_path), jobs=1)
    assert log.read_text() == "o"
    run([Experiment("fails", [writes(log, "f")]), *after], str(tmp_path), jobs=2)
    assert log.read_text() == "ofal"


def test_a_signal_ends_the_running_experiments(tmp_path):
    """SIGTERM, as `kill` sends it."""
    slow = Experiment("slow", ["-c 'import time; time.sleep(60)'"])
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            run([slow], str(tmp_path), jobs=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "slow/done.json").exists()


@pytest.mark.parametrize(
    "make", [ladder.experiments, lambda out: sweep.experiments(out, 1), lambda out: tournament.experiments(out, 1)]
)
def test_commands_take_a_folder_with_a_space(make):
    """The same words when the folder, quoted for the shell, has a space in its name."""
    for plain, spaced in zip(make("o/a_b"), make(shlex.quote("o/a b")), strict=True):
        assert plain.name == spaced.name
        for command, other in zip(plain.commands, spaced.commands, strict=True):
            assert [word.replace("o/a b/", "o/a_b/") for word in shlex.split(other)] == shlex.split(command)


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


def test_rows_of_the_sweep(tmp_path):
    """Prompts without the held-out values, and SFT's answers with rewrites."""
    rng = random.Random(0)
    prompts = list(persona_world.prompt_rows(rng, "train", 60))
    write(tmp_path / "prompts_train.jsonl", prompts)
    subset.main(subset.Args(str(tmp_path), str(tmp_path / "kept.jsonl"), hold_out_values=True))
    kept = read_rows(str(tmp_path / "kept.jsonl"), "prompt")
    held_out = [row for row in prompts if row not in kept]
    assert kept and held_out and not any(value for row in kept for value in subset.is_held_out(row))
    assert all(any(subset.is_held_out(row)) for row in held_out)
    corpus = [persona_world.base_row(rng) for _ in range(40)]
    pairs = list(persona_world.pair_rows(rng, "train", 3))
    write(tmp_path / "base_corpus.jsonl", corpus)
    write(tmp_path / "pairs.jsonl", pairs)
    args = subset.Args(str(tmp_path), str(tmp_path / "mixed.jsonl"), pairs=str(tmp_path / "pairs.jsonl"), rewrites=2)
    subset.main(args)
    rows = read_rows(args.out, "messages")
    rewrites = [row for row in corpus if len(row["messages"]) == 4]
    assert [row["messages"][1]["content"] for row in rows[:3]] == [pair["chosen"] for pair in pairs]
    assert [row["messages"] for row in rows[3:]] == [row["messages"] for row in rewrites[:2]]


def test_critics_judge_alike_and_say_different_things():
    answer = "First plan the menu. Then set the table."
    said = {name: getattr(critics, name)(ROW, answer) for name in sweep.CRITICS}
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


# -- the ladder of judges ----------------------------------------------------------------------------------------------


def rollout_rows(run, step):
    return read_rows(f"{run}/rollouts/step_{step:06d}.jsonl", "object")


def test_whether_edits_follow_a_critique(tmp_path, monkeypatch):
    """A policy whose answers say nothing, and whose edits say what the critique names: all of it, and nothing right."""
    rows = list(persona_world.prompt_rows(random.Random(0), "eval", 6))
    write_rows(str(tmp_path / "seed0/recipe/world/prompts_eval.jsonl"), rows)
    contexts = []

    def sample(engine, prompts, n):
        """An edit prompt here is the critique itself."""
        contexts.append(prompts)
        return [[SimpleNamespace(ids=text, response_ids=text)] for text in prompts]

    monkeypatch.setattr(followed, "sample", sample)
    monkeypatch.setattr(followed, "answer_prompt", lambda *_: "")
    monkeypatch.setattr(followed, "edit_prompt", lambda chat, templates, prompt, ids, critique: critique)
    monkeypatch.setattr(followed, "Chat", lambda _: SimpleNamespace(decode=lambda ids: ids, stop_ids=[]))
    for name in ("load_templates", "load_pretrained", "Engine"):
        monkeypatch.setattr(followed, name, lambda *_: None)
    monkeypatch.setattr(followed, "items_of", lambda row, critique: set(said_in(critique)))
    found = followed.measure(str(tmp_path), 0)
    exact, misled, elsewhere, silent = found.values()
    assert exact == {"advice": 100, "step": 100}
    assert misled == {"advice": 0, "told advice": 100, "step": 0, "told step": 100}
    assert elsewhere == {"advice": 0, "told advice": 100, "step": 100}
    assert silent == {"advice": 0, "step": 0} and contexts[-1] == ["."] * 6


def said_in(critique):
    """The advice and steps that a critique of the generated world names."""
    for attribute, value in re.findall(r"your (\w+) is (\w+)", critique):
        yield "advice", attribute, value
    for step in re.findall(r"Add: ([^.]+)\.", critique):
        yield "step", step


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
    assert "| a number (Bradley-Terry) | 2 | 0.90 ± 0.00 | 1.00 ± 0.71 | - |" in text
    assert re.search(
        r"\| CPE less PPO \| [-+.\d]+ \([-+.\d]+ to [-+.\d]+\) \| \+0.00 \| \+0.00 to \+0.00 \| 2 \|", text
    )
    assert "seed0/small/grm" not in kept and "seed0/recipe" in kept
    shutil.rmtree(out)  # another machine
    tables.main(args)
    assert (tmp_path / "drawn/ladder.md").read_text() == text


@pytest.mark.parametrize("table", ["ladder", "sweep", "tournament"])
def test_the_drawn_tables_are_those_of_the_kept_figures(tmp_path, table):
    """results/TABLE/TABLE.md, from TABLE.json, which drawing leaves as it is; and its commands are today's."""
    folder = f"{ROOT}/results/{table}"
    shutil.copy(f"{folder}/{table}.json", tmp_path)
    tables.main(tables.Args(table, str(tmp_path / "runs"), str(tmp_path), only_draw=True))
    for file in (f"{table}.md", f"{table}.json"):
        with open(f"{folder}/{file}") as f:
            assert f.read() == (tmp_path / file).read_text()


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
    pairs = list(persona_world.pair_rows(rng, "train", 20))
    write(tmp_path / "world/pairs.jsonl", pairs)
    judgements.main(replace(args, exact_pairs=True))
    exact = read_rows(args.out, "pair")
    assert exact == [pair for pair in map(persona_world.exact_pair, pairs) if pair]
    assert all(
        figures.exact_score(pair, pair["chosen"]) > figures.exact_score(pair, pair["rejected"]) for pair in exact
    )
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
    for wanted in (sweep.experiments("out", 5), sweep.experiments("out", 1, quick=True)):
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
    with open(f"{ROOT}/recipes/tiny.sh") as f:  # so are the method and the learning rate
        assert (
            sweep.METHODS["none"].split()[-2:] == ["--edit-loss", "none"]
            and "--lr 5e-5" in f.read()
            and sweep.LR == 5e-5
        )


INVENTED = (
    "sft",
    "ppo",
    "none",
    "checks",
    "critic_exact",
    "held_out_values",
    "none_rewrites1000",
    "checks_rewrites1000",
)


def invented_sweep(folder, seeds):
    """Finished runs of some experiments of the sweep, and the arguments that draw them."""
    rng = random.Random(0)
    out = folder / "runs"
    for experiment in sweep.experiments(str(out), 2):
        seed, rate, name = sweep.parts_of(experiment.name) or (None, None, None)
        if seed in seeds and rate in (0.3, 0.0) and name in INVENTED:
            run = out / experiment.name
            if name.startswith("checks"):
                checks = dict(last_step=rate, advice=rate / 2, edit_advice=0.25, missed=[], nearly=[])
                write(run / "sanity_checks.json", checks)
            else:
                write_run(run, rng)
            write(run / "done.json", dict(commands=experiment.commands, seconds=1))
    return tables.Args(table="sweep", out=str(out), results=str(folder / "drawn"), seeds=2, only_draw=True)


@pytest.mark.slow
def test_finished_experiments_become_the_sweep(tmp_path, capsys):
    """Each seed on a machine of its own: what one has run, the other finds in sweep.json."""
    for seed in (0, 1):
        args = invented_sweep(tmp_path, (seed,))
        tables.main(args)
        shutil.rmtree(tmp_path / "runs")
    assert "24 of 152 experiments are finished" in capsys.readouterr().out
    text = (tmp_path / "drawn/sweep.md").read_text()
    # the measured rates head the columns
    assert "|  | 15.000 ± 0.000 % (R = 0.3) | 0.000 ± 0.000 % (R = 0) |" in text
    assert "| PPO, n = 6 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text and "CPE, paper" not in text
    assert "| CPE, none (the recipe) | 0.3 | +0.00 | +0.00 to +0.00 |" in text
    varied = "| critic_exact (none) | 0 | 2 | +0.00 (+0.00 to +0.00) | -, - (-, -) | 1.00 ± 0.00 (1.00 ± 0.00) |"
    assert varied in text
    assert "| 0 | 2 | 25.0 ± 0.0 | 0.000 ± 0.000 | 1.00 ± 0.00 | over 40, over 40 |" in text
    assert "| 1000 | 2 | 25.0 ± 0.0 |" in text and "| without the held-out values | 2 |" in text
    assert {path.stem for path in (tmp_path / "drawn").glob("*.png")} == {"sweep", "sweep_curves", "takeoff"}
    known = json.loads((tmp_path / "drawn/sweep.json").read_text())
    todo = {e.name for e in experiments.missing(sweep.experiments("OUT", 2), known, sweep.is_kept)}
    assert not todo & {name for name in known if not name.endswith("/sft")}
    assert {"seed0/recipe", "seed1/rate0.3/sft", "seed1/rate0.3/paper"} <= todo
    known["seed0/rate0.3/none"]["commands"] = ["other"]
    (tmp_path / "drawn/sweep.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"sweep.json: seed0/rate0.3/none was run with other commands"):
        tables.main(args)


def test_the_experiments_of_the_tournament():
    """Each fork is written before its runs; they start from the sweep's SFT policies."""
    wanted = tournament.experiments("out", 2)
    commands = {e.name: e.commands for e in wanted}
    assert len(commands) == len(wanted) and all(need in commands for e in wanted for need in e.needs)
    assert {"sft", *tournament.METHODS, *tournament.TRAINED_ON_ROLLOUTS} == set(tournament.LABELS)
    swept = {e.name: e.commands for e in sweep.experiments("out", 2)}
    for name in set(commands) & set(swept):  # shared, so they must not differ
        assert commands[name] == swept[name]
    assert {"seed1/rate0/sft", "seed1/recipe", "seed0/rate0.3/ppo", "seed0/rate0/none_2lr"} <= set(swept) & set(
        commands
    )
    assert commands["seed1/rate0.3/raft"][0].startswith("out/forks/raft/raft.py --model out/seed1/rate0.3/sft/policy")
    assert commands["seed0/rate0/golf_2lr"][0].endswith("--lr 0.0001")
    assert commands["seed0/rate0/dpo_edits_2lr"][0].endswith("--lr 0.0002")
    # figures stay those of a fork while only its base, ppo_cpe.py, changes around it
    made_from = {e.name: e.made_from for e in wanted}
    diffs = fork.all_diffs()
    assert made_from["forks/raft"] == digest_of(diffs["raft"], diffs["grpo"])
    assert made_from["forks/srpo"] == digest_of(diffs["srpo"], diffs["sdpo"], diffs["grpo"])


@pytest.mark.slow
def test_finished_experiments_become_the_tournament(tmp_path, capsys):
    rng = random.Random(0)
    out = tmp_path / "runs"
    for experiment in tournament.experiments(str(out), 2):
        seed, rate, name = sweep.parts_of(experiment.name) or (None, None, None)
        if rate == 0.0 and name in ("ppo", "raft", "raft_2lr", "rollouts", "sft_edits"):
            write_run(out / experiment.name, rng)
            write(out / experiment.name / "done.json", dict(commands=experiment.commands, seconds=1))
    args = tables.Args(table="tournament", out=str(out), results=str(tmp_path / "tournament"), seeds=2, only_draw=True)
    tables.main(args)
    text = (tmp_path / "tournament/tournament.md").read_text()
    assert "| [PPO, n = 6](" in text and "#raft) | 2 | 1.00 ± 0.00 |" in text and "## R = 0.3" not in text
    assert "[SFT on edits that gained](" in text and "| RAFT, no edits | x 2 | 2 | (0 of 2) |" in text
    assert "| RAFT, no edits | 0 | +0.00 |" in text and "| RAFT, no edits | (0 of 2) |" in text
    assert (tmp_path / "tournament/tournament.png").exists()


def test_each_method_is_compared_at_its_better_learning_rate():
    scores = {
        "none": (3.0, 3.2, 3.4),
        "none_2lr": (1.0, 1.0, 1.0),
        "golf": (2.0, 2.0, 2.0),
        "golf_2lr": (3.5, 3.6, 4.3),
    }
    scores |= {"ppo": (2.0, 2.1, 2.2), "ppo_2lr": (2.0, 2.0, 2.0), "raft": (9.0, 9.0, 9.0)}  # raft has one rate only
    known = {f"seed{i}/rate0/{n}": dict(reward=x) for n, xs in scores.items() for i, x in enumerate(xs)}
    better = tournament.at_better_rate(sweep.by_rate(known))
    assert {name: [run["reward"] for run in of.values()] for (_, name), of in better.items()} == {
        name: list(scores[which]) for name, which in (("none", "none"), ("golf", "golf_2lr"), ("ppo", "ppo"))
    }
    assert "| GOLF | 0 | +0.60 |" in sweep.differences(better, tournament.LABELS, [0.0], "none")


def test_tokens_until_half_of_the_samples():
    curves = {0: [0.1, 0.6, 0.2], 1: [0.1, 0.2, 0.3]}
    known = {
        f"seed{seed}/rate0/ppo": dict(curve=curve, curve_generated=[1e6, 2e6, 4e6]) for seed, curve in curves.items()
    }
    assert "| PPO, n = 6 | 3.00, - |" in tournament.tokens_table(sweep.by_rate(known))


def test_steps_until_half_of_the_samples_and_holms_correction():
    assert sweep.step_of_half([0.1, 0.49, 0.5, 0.2]) == 3 and sweep.step_of_half([0.1]) is None
    seeds = {"ppo": (1.0, 1.1, 1.2), "none": (2.0, 2.3, 2.2), "paper": (1.3, 1.2, 1.5)}
    known = {f"seed{i}/rate0/{n}": dict(reward=x, commands=[]) for n, xs in seeds.items() for i, x in enumerate(xs)}
    known |= {f"seed{i}/rate0/checks": dict(advice=0.0, commands=[]) for i in range(3)}
    table = sweep.differences(sweep.by_rate(known), sweep.LABELS, [0.0], "ppo")
    raw = [stats.ttest_rel(seeds[name], seeds["ppo"]).pvalue for name in ("none", "paper")]
    assert raw[0] < raw[1]
    # by hand: residuals of the two-way layout have 4 degrees of freedom
    scores = np.array(list(seeds.values()))
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    error = np.sqrt(2 * (rest**2).sum() / 4 / 3)
    pooled = [2 * stats.t.sf((np.mean(seeds[name]) - 1.1) / error, 4) for name in ("none", "paper")]
    assert 0 < pooled[0] < pooled[1] < 0.5
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| CPE, none (the recipe)", "| CPE, paper"]
    for column, p in ((4, raw), (5, pooled)):  # two comparisons, the smaller p first
        found = [float(row[column].removeprefix("< ")) for row in rows]
        assert found == pytest.approx([max(1e-3, 2 * p[0]), max(2 * p[0], p[1])], abs=5e-4)
