"""recipes/lora.py and recipes/real_curve.py: cells, tables, the rule judge by hand, the curve of invented runs."""

import random

import pytest
from test_tables import write, write_cell

from judges import annotated_critiques
from recipes import lora, rarity, real_curve
from runtime.rows import check_row, read_rows

ROW = dict(
    prompt_id="p",
    persona={"name": "Mia", "likes": {"food": "curry", "sport": "yoga", "music": "jazz", "place": "lakes"}},
    question="What should I cook tonight?",
)
GOOD = "Make a quick curry with rice, beans and a spoon of yoghurt on top; it takes twenty minutes and warms you up."


def test_full_training_is_what_the_other_recipe_has_run():
    """The same commands under the same names, so that a finished cell is taken over; adapters differ by two flags."""
    ours = {cell.name: cell.commands for cell in lora.cells_of(lora.Args())}
    theirs = {cell.name: cell.commands for cell in rarity.cells_of(rarity.Args(), "out/rarity")}
    shared = {name for name in ours if "lora" not in name}
    assert {f"seed2/rate0.003/{name}" for name in ("sft", *lora.METHODS)} < shared
    assert all(ours[name] == theirs[name] for name in shared)
    full, low = (ours[f"seed0/rate0.003/{name}"][0].split() for name in ("unclipped", "unclipped_lora32"))
    assert low[-2:] == ["--lora-rank", "32"] and sum(a != b for a, b in zip(full, low)) == 2  # --out and --lr
    search = lora.cells_of(lora.Args(search=True))
    assert sum("_lora32_lr" in cell.name for cell in search) == len(lora.METHODS) * len(lora.LRS)


def test_finished_cells_become_a_table(tmp_path, capsys):
    rng, finished = random.Random(0), []
    for name in ("ppo", "ppo_lora4"):
        for seed in (0, 1):
            cell = tmp_path / f"seed{seed}/rate0.003/{name}"
            write_cell(cell, rng)
            phases = {f"seconds/{phase}": 2.0 + seed for phase in ("rollout", "score", "update")}
            steps = [row | phases for row in read_rows(str(cell / "metrics.jsonl"), "metrics")]
            write(cell / "metrics.jsonl", steps)
            finished.append(f"seed{seed}/rate0.003/{name}")
    text = lora.table(str(tmp_path), [*finished, "seed0/rate0.003/sft"])
    assert "| PPO, n = 6 | all weights | 2 | 1.00 ± 0.00 |" in text and "| PPO, n = 6 | lora4 | 2 |" in text
    assert text.count("| 2.5 ± 0.7 | 2.5 ± 0.7 | 2.5 ± 0.7 |") == 2 and "sft" not in text


@pytest.mark.parametrize(
    "answer, scores, critique",
    [
        (GOOD, (5, 4, 5), "Nothing to fix."),
        (GOOD.replace("curry", "stew"), (5, -3, 5), "Suggest something with curry."),
        (GOOD + " Then go for yoga.", (5, 2, 5), "Leave out yoga."),
        ("Mia, curry.", (1, 4, 2), "Say a little more, at least 20 words. Do not use the person's name."),
        (GOOD[:-1], (3, 4, 5), "End with a whole sentence."),
        ("As an AI, I say:\n- " + GOOD, (5, 4, -2), "Write sentences, not a list. Do not talk about yourself or the"),
        ("word " * 99 + "curry.", (1, 4, 5), "Cut it to 60 words; it has 100."),
        ("word " * 999, (-5, -3, 5), "Cut it to 60 words; it has 999. End with a whole sentence. Suggest"),
    ],
)
def test_the_rule_by_hand(answer, scores, critique):
    found = real_curve.judge(ROW, answer)
    assert (found.helpfulness, found.personalization, found.naturalness) == scores
    assert found.critique.startswith(critique)


def test_rows_and_judge_fit_rl(tmp_path):
    real_curve.main(real_curve.Rows(out=str(tmp_path), rows=50))
    train, dev = (read_rows(str(tmp_path / f"prompts_{name}.jsonl"), "prompt") for name in ("train", "dev"))
    assert (len(train), len(dev)) == (50, 5) and not {r["prompt_id"] for r in train} & {r["prompt_id"] for r in dev}
    for row in train:
        check_row(row, "prompt", "here")
        assert real_curve.judge(row, "I do not know.").critique
    assert annotated_critiques(real_curve.judge)  # known to write critiques before anything is sampled


def test_the_curve_of_two_runs(tmp_path, capsys):
    for name in ("ppo", "cpe"):
        steps = []
        for i in range(6):
            steps.append({"step": i + 1, "original/reward": i / 2, "generated_tokens": 10, "seconds/rollout": 60.0})
            if i % 2 == 0:
                steps[-1][real_curve.HELD_OUT] = float(i)
        write(tmp_path / name / "metrics.jsonl", steps)
    runs = [f"{name}={tmp_path / name}" for name in ("ppo", "cpe")]
    real_curve.main(real_curve.Curve(runs=runs, out=str(tmp_path / "drawn")))
    assert "| cpe | 6 | 6 | 60 | 0.00 | 2.00 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"curve.png", "curve.svg", "curve.md"}
