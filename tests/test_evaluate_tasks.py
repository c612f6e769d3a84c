"""evaluate.py: numbers by hand, files in AlpacaEval's format, accuracy of a reward model, persona swap."""

import csv
import json

import numpy as np
import pytest
import tyro
from conftest import error_of
from test_evaluate import run, world, world_pairs, write  # noqa: F401
from test_judge_servers import pair_server  # noqa: F401
from test_winrate import annotations as made_annotations
from test_winrate import gamed_file

import evaluate
from data import persona_world
from evaluation import annotations, tables
from evaluation.accuracy import accuracy, accuracy_by_tier, longer_wins
from recipes import benchmark_table
from reporting.evaluations import evaluation_run

# -- numbers ---------------------------------------------------------------------------------------


def test_mean_and_error_by_hand():
    # deviations -1, 0, 1: variance 2 / 2 = 1, standard error 1 / sqrt(3)
    assert evaluate.mean_and_error([1, None, 2, 3]) == {"mean": 2, "standard_error": pytest.approx(0.57735, abs=1e-5)}
    assert evaluate.mean_and_error([4]) == {"mean": 4, "standard_error": None}
    assert evaluate.mean_and_error([None]) == {"mean": None, "standard_error": None}


def test_win_rate_by_hand():
    # won, tied, lost, won; two prompts without a verdict
    result = annotations.win_rate(np.array([1, 0.5, 0, 0.9, np.nan, np.nan]), seed=0)
    assert result["win_rate"] == 2.4 / 4
    assert (result["wins"], result["ties"], result["losses"], result["left_out"]) == (2, 1, 1, 2)
    assert 0 <= result["low"] < 0.6 < result["high"] <= 1
    nothing = annotations.win_rate(np.array([np.nan]), seed=0)
    assert nothing["win_rate"] is None and nothing["low"] is None and nothing["left_out"] == 1


def test_position_bias_by_hand():
    # P(model) by order: the first place gets 0.3 and 0.9, then 0.4 and 0.6; the same answer wins only in the second
    shown = [
        {"baseline_first": 0.7, "model_first": 0.9},
        {"baseline_first": 0.6, "model_first": 0.4},
        None,
        {"baseline_first": 0.1, "model_first": None},
        {"model_first": 0.8},
    ]
    bias = annotations.position_bias(shown, 0, None)
    assert bias["first_place"] == pytest.approx(((0.3 + 0.9) / 2 + (0.4 + 0.4) / 2) / 2)
    assert bias["rows"] == 2 and bias["agree"] == 0.5
    assert annotations.position_bias([None], 0, None) is None
    of_person = [annotations.position_bias(shown[:2] * 10, 0, persons) for persons in (list(range(20)), [0, 1] * 10)]
    assert of_person[0]["high"] - of_person[0]["low"] < of_person[1]["high"] - of_person[1]["low"]


# -- answers in AlpacaEval's format


def test_alpaca_eval_outputs(world, tmp_path):
    """Answers in AlpacaEval's format are found by the question, or by profile and question."""
    good = [json.loads(line) for line in (world / "good.jsonl").read_text().splitlines()]
    outputs = [dict(instruction=evaluate.instruction_of(r), output=r["answer"], generator="Good-7B") for r in good]
    outputs[1]["output"] = f"<think>\n\n</think>\n\n{outputs[1]['output']}"  # no part of the answer
    questions = [r["question"] for r in good]
    for output, r in zip(outputs[:3], good):
        if questions.count(r["question"]) == 1:
            output["instruction"] = r["question"]
    (tmp_path / "outputs.json").write_text(json.dumps(outputs[::-1][:-1]))  # another order, one missing
    results, answers, _ = run(
        "--prompts",
        world / "prompts.jsonl",
        "--answers",
        tmp_path / "outputs.json",
        "--baseline-answers",
        world / "bad.jsonl",
        "--judge",
        "world",
        "--out",
        tmp_path / "out",
    )
    assert [a["answer"] for a in answers["model"]] == [r["answer"] for r in good[1:]]
    assert results["generators"]["model"] == "Good-7B" and results["missing"]["model"] == [good[0]["prompt_id"]]


def test_outputs_to_a_question_of_several_people(world, tmp_path, capsys):
    """One question, six personas: found by the persona, as object or JSON; refused where that is not said."""
    good = [json.loads(line) for line in (world / "good.jsonl").read_text().splitlines()]
    rows = [r | {"question": good[0]["question"]} for r in good]
    outputs = [dict(instruction=r["question"], output=r["answer"], persona=r["persona"]) for r in rows]
    outputs[1]["persona"] = json.dumps(outputs[1]["persona"])
    outputs[2] = dict(outputs[2], instruction=evaluate.instruction_of(rows[2]), prompt_id=rows[2]["prompt_id"])
    rows[5]["persona"] = rows[5]["persona"] | {"name": "Somebody Else"}  # whose answer is not there
    flags = ["--prompts", write(tmp_path / "prompts.jsonl", rows), "--judge", f"{tmp_path}/length.py:length"]
    flags += ["--baseline-answers", write(tmp_path / "bad.jsonl", [r | {"answer": "Tea."} for r in rows])]
    flags += ["--bootstrap-draws", 5, "--out", tmp_path / "out", "--answers", tmp_path / "outputs.json"]
    (tmp_path / "length.py").write_text("def length(row, answer): return len(answer)")
    (tmp_path / "outputs.json").write_text(json.dumps(outputs[::-1]))
    results, answers, _ = run(*flags)
    assert [a["answer"] for a in answers["model"]] == [r["answer"] for r in rows[:5]]
    assert results["missing"]["model"] == [rows[5]["prompt_id"]]
    (tmp_path / "outputs.json").write_text(json.dumps([*outputs, outputs[3]]))
    assert "outputs.json, entry 6: a second answer to question of a persona" in error_of(evaluate, capsys, *flags)
    assert "the first is entry 3" in error_of(evaluate, capsys, *flags)
    for other in ({"instruction": "?"}, {"persona": rows[3]["persona"]}):  # under the id of a prompt
        (tmp_path / "outputs.json").write_text(json.dumps([*outputs[:2], outputs[2] | other]))
        expected = f'outputs.json, entry 2: prompt "{rows[2]["prompt_id"]}" has another question or persona here'
        assert expected in error_of(evaluate, capsys, *flags)


# -- tables from annotation files


def test_annotations_to_tables(tmp_path, capsys):
    """No model: leaderboard in AlpacaEval's columns, paired test, kappa, plots."""
    first = [r | {"output_1": "b" * len(r["output_1"])} for r in made_annotations("mixed", 340)]
    second = [
        r | {"generator_2": "other", "output_2": "o", "preference": r["preference"] and max(1, r["preference"] - 0.3)}
        for r in first
    ]
    second = [r | {"generator_1": "the same under another name"} for r in second]
    people = [r | {"annotator": "people", "preference": r["preference"] and round(r["preference"])} for r in first[::2]]
    for name, rows in (("a", first), ("b", second), ("people", people)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    flags = [
        "--annotations",
        tmp_path / "a.json",
        tmp_path / "b.json",
        "--labels",
        tmp_path / "people.json",
        "--out",
        tmp_path / "out",
        "--bootstrap-draws",
        50,
    ]
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in flags]))
    results = json.loads((tmp_path / "out/results.json").read_text())
    with open(tmp_path / "out/leaderboard.csv") as f:
        leaderboard = {row[""]: row for row in csv.DictReader(f)}
    y = np.array([np.nan if r["preference"] is None else (r["preference"] or 1.5) - 1 for r in first])
    row = leaderboard["model"]
    assert float(row["win_rate"]) == pytest.approx(100 * np.nanmean(y)) and row["mode"] == "community"
    assert int(row["avg_length"]) == int(np.mean([len(r["output_2"]) for r in first]))
    assert int(row["n_total"]) == (~np.isnan(y)).sum() and set(tables.LEADERBOARD) <= set(row)
    assert list(leaderboard) == sorted(leaderboard, key=lambda k: -float(leaderboard[k]["length_controlled_winrate"]))
    (test,) = results["paired_tests"]
    assert test["difference"] > 0.15 and test["p_permutation"] < 0.001
    assert (test["first"], test["second"]) == ("model", "other")
    kappa = results["kappas"][0]
    assert kappa["n"] + kappa["left_out"] == 170 and 0.3 < kappa["kappa"] < 1
    assert len(results["kappas"]) == 1 and annotations.judge_kappa(second, people, ("b", "people")) is None
    for name in ("win_rates", "lengths"):
        assert (tmp_path / f"out/plots/{name}.png").stat().st_size > 5000
        assert (tmp_path / f"out/plots/{name}.svg").read_text().count("<path") > 5
    assert "win rate against the baseline, %" in (tmp_path / "out/plots/win_rates.svg").read_text()
    other = [r | {"output_1": "c", "generator_1": "another baseline"} for r in first]
    assert annotations.paired(first, other, 0, ("a", "c")) is None
    with pytest.raises(ValueError, match="model and model were compared with different answers of a baseline"):
        annotations.paired(first, [r | {"output_1": "c"} for r in first], 0, ("a", "c"))
    table = (tmp_path / "out/table.md").read_text()
    assert table in capsys.readouterr().out and "| model - other |" in table and "Cohen's kappa" in table
    assert f"| model | {100 * np.nanmean(y):.1f} (" in table
    error = error_of(evaluate, capsys, "--annotations", tmp_path / "b.json", *flags[3:])
    assert "people.json: no instruction with the same two outputs" in error
    (tmp_path / "out/annotations.json").write_text("[]")  # as an evaluation leaves it
    assert f"--out {tmp_path}/out: it holds an evaluation (annotations.json)" in error_of(evaluate, capsys, *flags)


def test_rows_that_occur_twice_are_not_compared(tmp_path, capsys):
    """Twenty questions, some twice: a second row of one is no more evidence, and the last label no better."""
    rows = [r | {"output_1": "b"} for r in made_annotations("mixed", 20)]
    other = [r | {"generator_2": "other", "output_2": "o"} for r in rows]

    def write_all(**files):
        for name, some in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(some))
        return [tmp_path / f"{name}.json" for name in files]

    flags = ["--out", tmp_path / "out", "--bootstrap-draws", 5, "--annotations"]
    a, b, people = write_all(a=rows, b=[*other, *other[:14]], people=[*rows[:5], rows[2] | {"preference": 1.5}])
    assert "b.json, entry 20: entry 0 has the same instruction;" in error_of(evaluate, capsys, *flags, a, b)
    assert "b.json, entry 20" in error_of(evaluate, capsys, *flags, b, a)
    error = error_of(evaluate, capsys, *flags, a, "--labels", people)
    assert "people.json, entry 5: entry 2 has the same instruction, output_1, output_2" in error
    # our own files tell apart by prompt_id what has one text
    twice = [[r | {"prompt_id": f"p{i}"} for i, r in enumerate([*rows, *rows[:14]])] for rows in (rows, other)]
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in [*flags, *write_all(c=twice[0], d=twice[1])]]))
    (test,) = json.loads((tmp_path / "out/results.json").read_text())["paired_tests"]
    assert test["n"] + test["left_out"] == 34
    # a file with prompt_ids and one without are matched by the instruction
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in [*flags, a, *write_all(d=twice[1][:20])]]))
    (test,) = json.loads((tmp_path / "out/results.json").read_text())["paired_tests"]
    assert test["n"] + test["left_out"] == 20


def test_degenerate_rates_are_marked(tmp_path, capsys):
    rows = [r | {"preference": 1} for r in made_annotations("mixed", 40)]
    (tmp_path / "lost.json").write_text(json.dumps(rows))
    flags = ["--annotations", tmp_path / "lost.json", "--out", tmp_path / "out", "--bootstrap-draws", 5]
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in flags]))
    printed = capsys.readouterr().out
    assert "| 50.0 * |" in printed and "all verdicts are losses" in printed


def test_bad_annotations(tmp_path, capsys):
    good = made_annotations("mixed", 6)

    def error(rows, *flags):
        (tmp_path / "a.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return error_of(evaluate, capsys, "--annotations", tmp_path / "a.json", "--out", tmp_path / "out", *flags)

    assert "a.json: not JSON" in error('[{"instruction"')
    assert "a.json: expected a non-empty JSON list" in error([])
    short = {k: v for k, v in good[1].items() if k != "output_2"}
    assert 'a.json, entry 1: field "output_2" is missing' in error([good[0], short])
    assert 'a.json, entry 0: field "output_1" is null' in error([good[0] | {"output_1": None}])
    assert 'a.json, entry 0: field "preference" is "2"' in error([good[0] | {"preference": "2"}])
    assert 'a.json, entry 0: field "prompt_id" is [1]' in error([good[0] | {"prompt_id": [1]}])
    assert 'field "generator_2" has 2 values' in error([good[0], good[1] | {"generator_2": "x"}])
    assert "needs AlpacaEval's 805 rows" in error(good, "--gamed-data", gamed_file(tmp_path / "df_gamed.csv"))
    assert "--labels needs --annotations" in error_of(evaluate, capsys, "--labels", tmp_path / "a.json")
    assert not (tmp_path / "out").exists()


# -- reward-model accuracy


def test_accuracy_by_hand():
    found = accuracy(np.array([1, 1, 0.5, 0, np.nan]), seed=0)
    assert (found["accuracy"], found["ties_half"], found["ties"], found["n"], found["without_verdict"]) == (
        0.5,
        0.625,
        1,
        4,
        1,
    )
    pairs = [
        dict(chosen="a" * n, rejected="bb", kind=kind, tier=tier, user_id=u)
        for n, kind, tier, u in (
            (3, "general", "easy", 1),
            (1, "general", "easy", 1),
            (2, "general", "hard", 2),
            (3, "specific", "mid", 3),
        )
    ]
    found = accuracy_by_tier(pairs, np.array([1, 1, 0, 0.5]), seed=0)
    assert {k: (v["accuracy"], v["longer_answer"]) for k, v in found["groups"].items()} == {
        "general easy": (1, 0.5),
        "general hard": (0, 0.5),
        "specific mid": (0, 1),
    }
    general = found["kinds"]["general"]
    assert general["accuracy"] == pytest.approx(2 / 3) and general["mean_of_tiers"] == 0.5  # by rows, by tiers
    assert found["total"]["accuracy"] == 0.5 and found["total"]["mean_of_tiers"] == pytest.approx(1 / 3)
    judged = accuracy_by_tier(pairs, np.array([1, np.nan, np.nan, 0.5]), seed=0)  # over the pairs of the judge's number
    assert judged["total"]["longer_answer"] == 1 and judged["groups"]["general hard"]["longer_answer"] is None
    assert found["total"]["longer_answer"] == 0.625 and found["intervals"].startswith("rows of one user_id")


def test_reward_accuracy_of_a_judge_that_scores(tmp_path, capsys):
    file, pairs = world_pairs(tmp_path)
    evaluate.main(
        tyro.cli(
            evaluate.Args,
            args=[
                "--task",
                "reward-accuracy",
                "--prompts",
                str(file),
                "--judge",
                "world",
                "--out",
                str(tmp_path / "out"),
            ],
        )
    )
    results = json.loads((tmp_path / "out/results.json").read_text())
    scores = [[persona_world.judge(p, p[side]).score() for side in ("chosen", "rejected")] for p in pairs]
    assert results["total"]["accuracy"] == pytest.approx(np.mean([a > b for a, b in scores]))
    assert results["total"]["ties"] == sum(a == b for a, b in scores) >= 1
    assert set(results["groups"]) == {f"{k} {t}" for k in ("general", "specific") for t in ("easy", "mid", "hard")}
    assert results["total"]["longer_answer"] == pytest.approx(np.mean([longer_wins(p) for p in pairs]))
    assert "| longer answer % |" in capsys.readouterr().out
    shown = evaluation_run(str(tmp_path / "out"))["rows"]
    assert [[side["reward"] for side in row["sides"]] for row in shown] == scores
    assert {row["group"] for row in shown} == set(results["groups"])


def test_reward_accuracy_of_a_judge_that_compares(tmp_path, pair_server):
    file, pairs = world_pairs(tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for pair in pairs[1], rows[1]:
        pair["rejected"] = pair["chosen"]
    write(file, rows)
    pair_server.faults = {(pairs[0]["chosen"], pairs[0]["rejected"]): ["neither"]}
    evaluate.main(
        tyro.cli(
            evaluate.Args,
            args=[
                "--task",
                "reward-accuracy",
                "--prompts",
                str(file),
                "--judge",
                pair_server.url,
                "--out",
                str(tmp_path / "out"),
            ],
        )
    )
    results = json.loads((tmp_path / "out/results.json").read_text())
    longer = [longer_wins(p) for p in pairs[1:]]  # what this server goes by; of equal lengths: the second
    assert results["total"]["accuracy"] == pytest.approx(np.mean([x == 1 for x in longer]))
    assert results["total"]["ties"] == longer.count(0.5)
    assert results["total"]["without_verdict"] == 1 and results["failures"] == {"unparsable": 1}
    assert results["position_bias"]["rows"] == 10  # equal texts are not asked about
    with open(tmp_path / "out/verdicts.jsonl") as f:
        verdicts = [json.loads(line)["verdicts"] for line in f]
    assert [v["order"] for v in verdicts[0]] == ["rejected_first", "chosen_first"] and verdicts[1] == []
    for row, pair in zip(evaluation_run(str(tmp_path / "out"))["rows"], pairs):  # a P(first is better) is no score
        sides = [(side["title"], side["answer"], side["reward"]) for side in row["sides"]]
        assert sides == [("chosen", pair["chosen"], None), ("rejected", pair["rejected"], None)]


# -- persona swap


def test_persona_swap(world, tmp_path, capsys):
    flags = [
        "--task",
        "persona-swap",
        "--prompts",
        world / "prompts.jsonl",
        "--answers",
        world / "good.jsonl",
        "--judge",
        "world",
        "--out",
        tmp_path,
    ]
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in flags]))
    results = json.loads((tmp_path / "results.json").read_text())
    with open(tmp_path / "verdicts.jsonl") as f:
        verdicts = [json.loads(line) for line in f]
    good = {r["prompt_id"]: r for r in map(json.loads, (world / "good.jsonl").read_text().splitlines())}
    gaps = []
    for v in verdicts:
        row = good[v["prompt_id"]]
        assert v["persona"] != row["persona"]
        own, other = (
            persona_world.judge(row | {"persona": persona}, row["answer"]).score()
            for persona in (row["persona"], v["persona"])
        )
        assert (v["own"]["reward"], v["swapped"]["reward"]) == (own, other)
        gaps.append(own - other)
    assert results["difference"]["reward"]["difference"] == pytest.approx(np.mean(gaps)) and np.mean(gaps) > 0
    assert "| reward |" in capsys.readouterr().out
    assert "needs a judge that scores" in error_of(evaluate, capsys, *flags[:-3], "pair:x", "--out", tmp_path / "no")

    lost = verdicts[0]["persona"]  # the judgement under one other persona is lost, and so is that row
    (tmp_path / "judge.py").write_text(
        f"def judge(row, answer):\n    return None if row['persona'] == {lost!r} else 1.0\n"
    )
    judged = [*flags[:-3], f"{tmp_path}/judge.py:judge", "--out", tmp_path / "some"]
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in judged]))
    some = json.loads((tmp_path / "some/results.json").read_text())
    assert some["own"]["reward"]["mean"] == some["swapped"]["reward"]["mean"] == 1
    assert some["difference"]["reward"]["left_out"] == sum(some["failures"].values()) > 0
    assert "judgements without a verdict" in capsys.readouterr().out

    (tmp_path / "judge.py").write_text("def judge(row, answer):\n    return None\n")  # no verdict at all
    judged = [*flags[:-3], f"{tmp_path}/judge.py:judge", "--out", tmp_path / "none"]
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in judged]))
    nothing = json.loads((tmp_path / "none/results.json").read_text())
    assert nothing["difference"]["reward"]["difference"] is None
    n = len(verdicts)
    assert benchmark_table.figures_of(nothing) == {"swap": f"- [0 of {n}]"}
    assert "[" not in benchmark_table.figures_of(results)["swap"]
