"""recipes/rarity.py and what it stands on: rates of rare content, critics, the world's --rarity, cells and tables."""

import json
import os
import random
import shlex
import shutil

import pytest
from test_tables import write, write_cell

from data.persona_world import TOPICS, judge, sample_prompt, say, write_answer
from recipes import critics, rarity
from recipes.rates import carried_out, rates

PERSONA = dict(name="Ada Novak", food="vegan", drink="tea", sport="yoga", transport="bus", music="jazz", pet="cat")
PERSONA |= dict(budget="low", job="nurse")
ROW = dict(prompt_id="p", persona=PERSONA, question="How do I host a dinner?")
LAST = TOPICS["host a dinner"][2][-1]


def test_rates_by_hand():
    """food: suitable advice; drink: a true value without advice. Then advice that is another person's, and nothing."""
    answers = (
        f"Your food is vegan, so choose lentil curry. Your drink is tea. First {LAST}.",
        "Your food is vegan, so choose lamb kebab. First plan the menu.",
        "First plan the menu.",
    )
    found = rates([ROW | {"answer": answer} for answer in answers])
    assert found == dict(last_step=1 / 3, advice=1 / 6, advice_right=1 / 2, wrong=1 / 3)
    assert rates([ROW | {"answer": "First plan the menu."}])["advice_right"] is None


def test_what_an_edit_carries_out():
    row = ROW | {"answer": "First plan the menu. Then set the table. Then send the invitations."}
    dictated = judge(row | {"persona": PERSONA}, row["answer"]).critique
    assert dictated.startswith("Say your food is vegan, so choose lentil curry. Say your drink is tea")
    assert f"Add: {LAST}." in dictated
    edit = f"Your food is vegan, so choose lentil curry. Your drink is tea. First {LAST}."
    assert carried_out([row], [edit]) == dict(edit_step=1.0, edit_advice=0.5)


@pytest.mark.parametrize("rarity_of, said", [((0.0, 0.0), 0.0), ((1.0, 1.0), 1.0)])
def test_the_world_is_as_rare_as_asked(rarity_of, said):
    rng, rows = random.Random(0), []
    for _ in range(200):
        persona, question = sample_prompt(rng, "train")
        answer = write_answer(rng, persona, question, 1.0, rarity_of)
        rows.append(dict(persona=persona, question=question, answer=answer))
    found = rates(rows)
    assert found["last_step"] == said
    assert (
        found["advice"] == 0 if said == 0 else found["advice"] > 0.7
    )  # an attribute may be left out, or advice be off


def test_critics_judge_alike_and_say_different_things():
    answer = "First plan the menu. Then set the table."
    said = {name: getattr(critics, name)(ROW, answer) for name in rarity.CRITICS}
    assert len({(j.helpfulness, j.personalization, j.naturalness) for j in said.values()}) == 1
    assert "lentil curry" in said["exact"].critique
    for name in ("kind", "vague", "silent"):
        assert "lentil curry" not in said[name].critique
    assert (
        said["kind"].critique.startswith("Say more of the person.")
        and said["vague"].critique == "Something is missing."
    )


def test_wrong_critics_are_wrong_as_often_as_they_say():
    answers = [f"First plan the menu. {say('food', 'vegan')} {'Then set the table. ' * n}" for n in range(300)]
    true = [critics.exact(ROW, answer).critique for answer in answers]
    for name, share in (("wrong10", 0.1), ("wrong50", 0.5)):
        critic = getattr(critics, name)
        first = [critic(ROW, answer).critique.split(".")[0] == t.split(".")[0] for answer, t in zip(answers, true)]
        assert sum(first) / len(first) == pytest.approx(1 - share, abs=0.08)
        assert critic(ROW, answers[0]) == critic(ROW, answers[0])


def test_the_cells_of_the_diagram():
    full = {cell.name: cell for cell in rarity.cells_of(rarity.Args(), "out")}
    assert all(need in full for cell in full.values() for need in cell.needs)
    for rate in rarity.RATES:
        for name in (*rarity.METHODS, "ppo_tokens", "sft", "gates"):
            assert {f"seed{s}/rate{rate:g}/{name}" for s in range(3)} <= set(full)
    for name in rarity.CRITICS:
        assert f"--judge recipes/critics.py:{name}" in full[f"seed0/rate0.003/critic_{name}"].commands[0]
    search = rarity.cells_of(rarity.Args(search=True), "out")
    assert not {cell.name for cell in search} & set(full) - {"world", "base", *(f"rate{r:g}" for r in rarity.RATES)}
    tried = [cell.name for cell in search if "_lr" in cell.name and "rate0.003" in cell.name]
    assert len(tried) == len(rarity.METHODS) * len(rarity.LRS)
    for plain, spaced in zip(rarity.cells_of(rarity.Args(), "a_b"), rarity.cells_of(rarity.Args(), "a b"), strict=True):
        for command, other in zip(plain.commands, spaced.commands, strict=True):
            assert [word.replace("a b/", "a_b/") for word in shlex.split(other)] == shlex.split(command)


def finished_cells(tmp_path, seeds):
    rng, out = random.Random(0), tmp_path / "runs"
    for cell in rarity.cells_of(rarity.Args(seeds=2), str(out)):
        seed, rate, name = rarity.parts_of(cell.name) or (None, None, None)
        if seed in seeds and rate in (0.3, 0.003, 0.0) and name in ("sft", "ppo", "none", "gates"):
            run = out / cell.name
            if name == "gates":
                write(run / "gates.json", dict(last_step=rate, advice=rate / 2, missed=[], nearly=[]))
            else:
                write_cell(run, rng)
            write(run / "done.json", dict(commands=cell.commands, seconds=1))
    return rarity.Args(out=str(out), results=str(tmp_path / "drawn"), seeds=2, only_draw=True)


def test_learning_rates_are_the_best_of_the_search():
    """As results/rarity/rarity.json has it: by the exact score, each method at each of three rates."""
    found, _ = rarity.by_rate(
        rarity.read_results(os.path.join(rarity.HERE, "../results/rarity"), {}), (rarity.SEARCH_SEED,)
    )
    for rate, tried in rarity.TRIED.items():
        for name, lrs in tried.items():
            scores = {lr: rarity.of(found, rate, f"{name}_lr{lr:g}", "reward")[0] for lr in lrs}
            assert rarity.LR[rate][name] == max(scores, key=scores.get), (rate, name, scores)
    assert {rarity.SEARCHED_AT[rate] for rate in rarity.RATES} == set(rarity.LR)


def test_finished_cells_become_the_diagram(tmp_path, capsys):
    args = finished_cells(tmp_path, (0, 1, *rarity.CONFIRM_SEEDS[:2]))
    rarity.main(args)
    assert "32 of 175 cells are finished" in capsys.readouterr().out
    text = (tmp_path / "drawn/rarity.md").read_text()
    assert "| PPO, n = 6 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text and "CPE, tis" not in text
    assert "|  | 30.00 ± 0.00 % | 0.30 ± 0.00 % | 0.00 ± 0.00 % |" in text  # the measured rates head the columns
    assert "| CPE, none less PPO, n = 6 | 0.3 | +0.00 | +0.00 to +0.00 | 2 |" in text
    confirmed = text.split("## R = 0 on seeds that chose nothing (101, 102, 103)")[1].split("\n## ")[0]
    assert (
        "| PPO, n = 6 | 0 | 2 | 1.00 ± 0.00 |" in confirmed and "| CPE, none less PPO, n = 6 | 0 | +0.00 |" in confirmed
    )
    drawn = {path.stem for path in (tmp_path / "drawn").glob("*.png")}
    assert drawn == {"rarity", "rarity_curves", "rarity_branches"}
    shutil.rmtree(tmp_path / "runs")  # another machine: the tables are drawn from rarity.json
    rarity.main(args)
    assert (tmp_path / "drawn/rarity.md").read_text() == text


def test_branches_are_told_from_what_follows_them(tmp_path):
    ledger = {"edit/kept": 0.6, "edit/branch": 0.1, "edit/branch_weight": 0.2, "edit/inserted_weight": 0.8}
    no_branch = {"edit/kept": 0.6, "edit/branch": 0.0, "edit/inserted_weight": 0.8}
    quantities = {f"edit/inserted_{q}": 1.0 for q in ("ratio", "clipfrac")}
    steps = [quantities | ledger, {}, quantities | no_branch]
    write(tmp_path / "metrics.jsonl", [dict(step=i) | step for i, step in enumerate(steps, 1)])
    curves = rarity.edit_curves(str(tmp_path))
    assert curves["branch_weight"] == [0.2, None, None]
    assert curves["followed_weight"] == [1.0, None, 0.8]  # (.4 x .8 - .1 x .2) / .3
    write(tmp_path / "metrics.jsonl", [{"step": 1}])
    assert rarity.edit_curves(str(tmp_path)) == {}


def test_cells_of_two_machines_come_together(tmp_path):
    for seed in (0, 1):
        args = finished_cells(tmp_path, (seed,))
        rarity.main(args)
        shutil.rmtree(tmp_path / "runs")
    assert (
        "| CPE, none less PPO, n = 6 | 0.3 | +0.00 | +0.00 to +0.00 | 2 |" in (tmp_path / "drawn/rarity.md").read_text()
    )
    known = json.loads((tmp_path / "drawn/rarity.json").read_text())
    todo = {cell.name for cell in rarity.missing(rarity.cells_of(args, "OUT"), known)}
    assert not todo & set(known) - {
        f"seed{s}/rate{r}/{n}" for s in (0, 1) for r in ("0.3", "0.003", "0") for n in ("sft", "gates")
    }
    assert {"world", "base", "seed1/grm", "seed1/rate0.3/tis"} <= todo
    known["seed0/rate0.3/none"]["commands"] = ["other"]
    (tmp_path / "drawn/rarity.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"rarity.json: seed0/rate0.3/none was run with other commands"):
        rarity.main(args)


def test_nothing_runs_where_all_is_known(tmp_path):
    wanted = rarity.cells_of(rarity.Args(seeds=1), "OUT")
    assert rarity.missing(wanted, {cell.name: {} for cell in wanted}) == []
