"""evaluate.py: its numbers by hand, answers from files and from models, what it reuses, and what it refuses."""

import json
import random
import shutil

import evaluate
import pytest
import tyro
from conftest import error_of, finish, launch, random_model, tiny_config

from data import persona_world
from model import load_config, save_pretrained


def run(*flags):
    """A run in this process -> results.json, answers by side, verdicts."""
    args = tyro.cli(evaluate.Args, args=[str(flag) for flag in flags])
    evaluate.main(args)
    return written(args.out)


def written(out):
    def rows(name):
        with open(f"{out}/{name}.jsonl") as f:
            return [json.loads(line) for line in f]

    with open(f"{out}/results.json") as f:
        return json.load(f), {side: rows(f"answers_{side}") for side in ("model", "baseline")}, rows("verdicts")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with six prompts of the generated world and answers of high and low quality to them."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    rows = list(persona_world.prompt_rows(rng, "eval", 6))
    write(folder / "prompts.jsonl", rows)
    for name, quality in (("good", 1.0), ("bad", 0.0)):
        answers = [persona_world.write_answer(rng, r["persona"], r["question"], quality) for r in rows]
        write(folder / f"{name}.jsonl", [r | {"answer": a} for r, a in zip(rows, answers)])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- numbers ---------------------------------------------------------------------------------------


def test_mean_and_error_by_hand():
    # deviations -1, 0, 1: variance 2 / 2 = 1, standard error 1 / sqrt(3)
    assert evaluate.mean_and_error([1, None, 2, 3]) == {"mean": 2, "standard_error": pytest.approx(0.57735, abs=1e-5)}
    assert evaluate.mean_and_error([4]) == {"mean": 4, "standard_error": None}
    assert evaluate.mean_and_error([None]) == {"mean": None, "standard_error": None}


def test_win_rate_by_hand():
    # won, tied, lost, won; two prompts without a judgement on one side
    result = evaluate.win_rate([3.0, 1.0, 2.0, 0.1, None, 0.0], [1.0, 1.0, 3.0, 0.0, 2.0, None], seed=0)
    assert result["win_rate"] == 2.5 / 4
    assert (result["wins"], result["ties"], result["losses"], result["left_out"]) == (2, 1, 1, 2)
    assert 0 <= result["low"] < 0.625 < result["high"] <= 1
    nothing = evaluate.win_rate([None], [1.0], seed=0)
    assert nothing["win_rate"] is None and nothing["low"] is None and nothing["left_out"] == 1


def test_the_interval_is_that_of_a_share():
    # 60 of 100: normal approximation 0.6 +- 1.96 sqrt(0.24 / 100) = 0.504 to 0.696
    result = evaluate.win_rate([1.0] * 60 + [0.0] * 40, [0.5] * 100, seed=0)
    assert result["low"] == pytest.approx(0.504, abs=0.015)
    assert result["high"] == pytest.approx(0.696, abs=0.015)
    assert result == evaluate.win_rate([1.0] * 60 + [0.0] * 40, [0.5] * 100, seed=0)
    surely = evaluate.win_rate([1.0] * 5, [0.0] * 5, seed=0)
    assert (surely["low"], surely["win_rate"], surely["high"]) == (1, 1, 1)


# -- answers from files, judged by the exact judge -------------------------------------------------


def test_two_files_and_the_exact_judge(world, tmp_path, capsys):
    flags = ["--prompts", world / "prompts.jsonl", "--answers", world / "good.jsonl", "--baseline-answers",
             world / "bad.jsonl", "--judge", "world", "--out", tmp_path]
    results, answers, verdicts = run(*flags)
    judged = {side: [persona_world.judge(r["persona"], r["question"], r["answer"]) for r in rows]
              for side, rows in answers.items()}
    for side in ("model", "baseline"):
        for name in evaluate.DIMENSIONS:
            mean = sum(getattr(j, name) for j in judged[side]) / 6
            assert results[side][name]["mean"] == pytest.approx(mean)
        assert results[side]["reward"]["mean"] == pytest.approx(sum(j.score() for j in judged[side]) / 6)
        lengths = [len(row["answer"]) for row in answers[side]]
        assert results[side]["n_characters"]["mean"] == pytest.approx(sum(lengths) / 6)
        assert results[side]["n_tokens"]["mean"] is None  # no tokenizer anywhere
        assert results[side]["answers"] == 6 and results[side]["unjudged"] == 0
    wins = sum(a.score() > b.score() for a, b in zip(judged["model"], judged["baseline"]))
    ties = sum(a.score() == b.score() for a, b in zip(judged["model"], judged["baseline"]))
    assert wins >= 4  # else the comparison below says little
    assert results["win_rate"]["win_rate"] == pytest.approx((wins + ties / 2) / 6)
    assert [v["critique"] for v in verdicts[:6]] == [j.critique for j in judged["model"]]
    table = capsys.readouterr().out
    assert f"{results['model']['helpfulness']['mean']:.2f} ±" in table and f"{wins} won" in table


def test_recitals_are_counted(world, tmp_path):
    prompts = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    recital = [p | {"answer": " ".join(f"Your {k} is {p['persona'][k]}." for k in list(persona_world.ATTRIBUTES))}
               for p in prompts[:2]] + [p | {"answer": "Set the table."} for p in prompts[2:]]
    results, _, _ = run("--prompts", world / "prompts.jsonl", "--answers", write(tmp_path / "recital.jsonl", recital),
                        "--baseline-answers", world / "bad.jsonl", "--judge", "world", "--out", tmp_path / "out")
    assert results["model"]["recites_profile"]["mean"] == pytest.approx(2 / 6)


def test_equal_answers_tie(world, tmp_path):
    good = world / "good.jsonl"
    results, _, _ = run("--prompts", world / "prompts.jsonl", "--answers", good, "--baseline-answers", good,
                        "--judge", "world", "--out", tmp_path)
    assert results["win_rate"]["ties"] == 6 and results["win_rate"]["win_rate"] == 0.5


def test_a_grm_prefers_what_it_was_taught(tiny, tiny_grm, tmp_path):
    """Chosen against rejected answers by a GRM in process; the baseline is the prompts' own reference."""
    pairs = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    good = write(tmp_path / "good.jsonl", [p | {"answer": p["chosen"], "n_tokens": 7} for p in pairs])
    results, answers, _ = run(
        "--prompts", tiny / "prompts.jsonl", "--answers", good, "--baseline", "reference", "--n-prompts", 10,
        "--judge", tiny_grm / "model", "--grm-template", tiny / "grm.txt", "--max-judgement-length", 64,
        "--out", tmp_path / "out")
    assert len(answers["baseline"]) == 10 and answers["baseline"][0]["answer"] == answers["baseline"][0]["reference"]
    assert results["win_rate"]["win_rate"] > 0.8
    assert results["model"]["n_tokens"]["mean"] == 7  # as the file says
    assert results["model"]["recites_profile"]["mean"] is None  # only the world knows


# -- answers from models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """A second tiny model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "model"
    vocab_size = load_config(str(tiny / "checkpoint")).vocab_size
    save_pretrained(random_model(tiny_config(vocab_size=vocab_size), seed=7), str(folder), str(tiny / "tokenizer"))
    return folder


def model_flags(tiny, other):
    return ["--model", other, "--baseline", tiny / "checkpoint", "--prompts", tiny / "prompts.jsonl",
            "--answer-template", tiny / "answer.txt", "--grm-template", tiny / "grm.txt", "--n-prompts", 7,
            "--max-new-tokens", 12, "--max-judgement-length", 64]


def test_two_processes_write_what_one_writes(tiny, tiny_grm, other, tmp_path):
    flags = [*model_flags(tiny, other), "--judge", tiny_grm / "model", "--dtype", "fp32"]
    finish(launch("evaluate.py", *flags, "--out", tmp_path / "two", processes=2))
    results, answers, verdicts = run(*flags, "--out", tmp_path / "one")
    for side in ("model", "baseline"):
        assert len(answers[side]) == 7
        assert [a["truncated"] for a in answers[side]].count(True) == round(7 * results[side]["truncated"]["mean"])
    assert answers["model"] != answers["baseline"]
    of_two = written(tmp_path / "two")
    assert of_two[1:] == (answers, verdicts)
    assert of_two[0]["win_rate"] == results["win_rate"] and of_two[0]["model"] == results["model"]


def test_what_is_there_is_used_again(tiny, other, world, tmp_path, capsys, monkeypatch):
    shutil.copytree(other, tmp_path / "model")
    flags = ["--prompts", world / "prompts.jsonl", "--model", tmp_path / "model", "--baseline", tiny / "checkpoint",
             "--judge", "world", "--max-new-tokens", 12, "--out", tmp_path / "out"]
    flags += ["--answer-template", tiny / "answer.txt"]
    run(*flags, "--n-prompts", 4)
    capsys.readouterr()

    def counts():
        lines = [line for line in capsys.readouterr().out.splitlines() if " to make, " in line]
        return [int(line.split(": ")[1].split()[0]) for line in lines]  # model, baseline, verdicts

    first = run(*flags, "--n-prompts", 6)
    assert counts() == [2, 2, 4]  # two prompts more
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Engine", None)  # neither is needed any more
        patch.setattr(evaluate, "open_judge", None)
        assert run(*flags, "--n-prompts", 6) == first
    assert counts() == [0, 0, 0]
    run(*flags, "--n-prompts", 6, "--temperature", 0.5)
    assert counts()[:2] == [6, 6]
    run(*flags, "--n-prompts", 6, "--temperature", 0.5)
    counts()
    vocab_size = load_config(str(other)).vocab_size  # other weights under the same name
    save_pretrained(random_model(tiny_config(vocab_size=vocab_size), seed=8), str(tmp_path / "model"),
                    str(tiny / "tokenizer"))
    run(*flags, "--n-prompts", 6, "--temperature", 0.5)
    assert counts()[:2] == [6, 0]


# -- bad input -------------------------------------------------------------------------------------


def test_bad_answers(world, tmp_path, capsys):
    good = [json.loads(line) for line in (world / "good.jsonl").read_text().splitlines()]
    flags = ["--prompts", world / "prompts.jsonl", "--baseline-answers", world / "bad.jsonl", "--judge", "world",
             "--out", tmp_path / "out", "--answers"]

    def error(rows):
        return error_of(evaluate, capsys, *flags, write(tmp_path / "answers.jsonl", rows))

    first = good[0]["prompt_id"]
    assert "answers.jsonl: empty" in error([])
    assert f'answers.jsonl: prompt "{first}": no answer to it' in error(good[1:])
    assert f'answers.jsonl:7: a second answer to prompt "{first}"' in error([*good, good[0]])
    assert f'prompt "{first}": it has another question there' in error([good[0] | {"question": "?"}, *good[1:]])
    del good[2]["answer"]
    assert 'answers.jsonl:3: field "answer" is missing' in error(good)
    assert "no such file" in error_of(evaluate, capsys, *flags, tmp_path / "none.jsonl")
    assert not (tmp_path / "out").exists()


def test_bad_models_and_judges(tiny, world, tmp_path, capsys):
    flags = ["--prompts", world / "prompts.jsonl", "--baseline-answers", world / "bad.jsonl", "--out", tmp_path / "out"]
    model = ["--model", tiny / "checkpoint"]
    missing = tmp_path / "not/a/folder"
    assert f"{missing}" in error_of(evaluate, capsys, *flags, *model, "--judge", missing)
    assert "127.0.0.1:9" in error_of(evaluate, capsys, *flags, *model, "--judge", "http://127.0.0.1:9/v1")
    assert f"{missing}" in error_of(evaluate, capsys, *flags, "--judge", "world", "--model", missing)
    error = error_of(evaluate, capsys, *flags, *model, "--judge", "world")  # the default length, 512 positions
    assert "--max-new-tokens 2048" in error and "over the 512 positions" in error
    prompts = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    error = error_of(evaluate, capsys, "--prompts", world / "prompts.jsonl", "--answers", world / "good.jsonl",
                     "--baseline", "reference", "--judge", "world", "--out", tmp_path / "out")
    assert f'prompt "{prompts[0]["prompt_id"]}" has no reference' in error
    assert not (tmp_path / "out").exists()
