"""evaluate.py --task win-rate: answers from files, models and servers, what it reuses, what it refuses."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest
import tyro
from conftest import error_of, finish, launch, parse, random_model, tiny_config
from test_judge_servers import GOOD, REFUSALS, PairServer, pair_server, server  # noqa: F401
from test_serve import Running

import evaluate
from data import persona_world
from evaluation import asking
from evaluation.answer_files import reference_answers
from evaluation.asking import answer_in
from judges import journal
from judges.chat_client import Failure, ServerDown
from model import save_pretrained
from prompts import judgement_text
from weights import load_config


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


def world_pairs(folder):
    rng = random.Random(2)
    pairs = list(persona_world.pair_rows(rng, "eval", 12))
    pairs[3] |= {"rejected": pairs[3]["chosen"] + " "}  # a tie for the exact judge
    tiers = [dict(kind=("general", "specific")[i % 2], tier=("easy", "mid", "hard")[i % 3]) for i in range(12)]
    return write(folder / "pairs.jsonl", [{**p, **t} for p, t in zip(pairs, tiers)]), pairs


# -- answers from files, judged by the exact judge -------------------------------------------------


def test_two_files_and_the_exact_judge(world, tmp_path, capsys):
    flags = [
        "--prompts",
        world / "prompts.jsonl",
        "--answers",
        world / "good.jsonl",
        "--baseline-answers",
        world / "bad.jsonl",
        "--judge",
        "world",
        "--out",
        tmp_path,
    ]
    results, answers, verdicts = run(*flags)
    judged = {side: [persona_world.judge(r, r["answer"]) for r in rows] for side, rows in answers.items()}
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
    assert [v["side"] for v in verdicts] == ["model"] * 6 + ["baseline"] * 6
    table = capsys.readouterr().out
    assert f"{results['model']['helpfulness']['mean']:.2f} ±" in table and f" | {wins} | {ties} | " in table


def test_recitals_are_counted(world, tmp_path):
    prompts = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    recital = [
        p | {"answer": " ".join(f"Your {k} is {p['persona'][k]}." for k in list(persona_world.ATTRIBUTES))}
        for p in prompts[:2]
    ] + [p | {"answer": "Set the table."} for p in prompts[2:]]
    results, _, _ = run(
        "--prompts",
        world / "prompts.jsonl",
        "--answers",
        write(tmp_path / "recital.jsonl", recital),
        "--baseline-answers",
        world / "bad.jsonl",
        "--judge",
        "world",
        "--out",
        tmp_path / "out",
    )
    assert results["model"]["recites_profile"]["mean"] == pytest.approx(2 / 6)


def test_equal_answers_tie(world, tmp_path):
    """Also if one file has an empty thought before each: it is no part of the answer, nor of its length."""
    good = world / "good.jsonl"
    rows = [json.loads(line) for line in good.read_text().splitlines()]
    thought = "<think>\n\n</think>\n\n"
    results, _, _ = run(
        "--prompts",
        world / "prompts.jsonl",
        "--answers",
        good,
        "--baseline-answers",
        write(tmp_path / "thought.jsonl", [row | {"answer": thought + row["answer"]} for row in rows]),
        "--judge",
        "world",
        "--out",
        tmp_path,
    )
    assert results["win_rate"]["ties"] == 6 and results["win_rate"]["win_rate"] == 0.5
    assert (
        results["characters"]["baseline"] == results["characters"]["model"] == sum(len(r["answer"]) for r in rows) / 6
    )
    (row,) = reference_answers("prompts.jsonl", [{"prompt_id": "a", "reference": f"{thought}Tea."}])
    assert row["answer"] == "Tea."


def test_two_sets_of_answers_under_one_name_are_refused(world, tmp_path, capsys):
    """A length-controlled rate of 50 "by construction" would be wrong, and the plots would show one side."""
    flags = ["--prompts", world / "prompts.jsonl", "--judge", "world", "--out", tmp_path / "out"]
    for side, flag in (("good", "--answers"), ("bad", "--baseline-answers")):
        rows = [json.loads(line) for line in (world / f"{side}.jsonl").read_text().splitlines()]
        flags += [flag, write(tmp_path / f"{side}.jsonl", [row | {"generator": "gpt"} for row in rows])]
    assert "the model and the baseline are both called gpt, and their answers differ" in error_of(
        evaluate, capsys, *flags
    )


def test_a_grm_prefers_what_it_was_taught(tiny, tiny_grm, tmp_path):
    """Chosen against rejected answers by a GRM in process; the baseline is the prompts' own reference."""
    pairs = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    good = write(tmp_path / "good.jsonl", [p | {"answer": p["chosen"], "n_tokens": 7} for p in pairs])
    results, answers, _ = run(
        "--prompts",
        tiny / "prompts.jsonl",
        "--answers",
        good,
        "--baseline",
        "reference",
        "--n-prompts",
        10,
        "--judge",
        tiny_grm / "model",
        "--grm-template",
        tiny / "grm.txt",
        "--judge-max-new-tokens",
        64,
        "--out",
        tmp_path / "out",
    )
    assert len(answers["baseline"]) == 10 and answers["baseline"][0]["answer"] == answers["baseline"][0]["reference"]
    assert results["win_rate"]["win_rate"] > 0.8
    assert results["model"]["n_tokens"]["mean"] == 7  # as the file says
    assert "recites_profile" not in results["model"]  # only the world knows


# -- answers from models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """A second tiny model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "model"
    vocab_size = load_config(str(tiny / "checkpoint")).vocab_size
    save_pretrained(random_model(tiny_config(vocab_size=vocab_size), seed=7), str(folder), str(tiny / "tokenizer"))
    return folder


def model_flags(tiny, other):
    return [
        "--model",
        other,
        "--baseline",
        tiny / "checkpoint",
        "--prompts",
        tiny / "prompts.jsonl",
        "--answer-template",
        tiny / "answer.txt",
        "--grm-template",
        tiny / "grm.txt",
        "--n-prompts",
        7,
        "--max-new-tokens",
        12,
        "--judge-max-new-tokens",
        64,
    ]


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
    flags = [
        "--prompts",
        world / "prompts.jsonl",
        "--model",
        tmp_path / "model",
        "--baseline",
        tiny / "checkpoint",
        "--judge",
        "world",
        "--max-new-tokens",
        12,
        "--out",
        tmp_path / "out",
    ]
    flags += ["--answer-template", tiny / "answer.txt"]
    run(*flags, "--n-prompts", 4)
    capsys.readouterr()

    def counts():
        lines = [line for line in capsys.readouterr().out.splitlines() if " to make, " in line]
        return [int(line.split(": ")[1].split()[0]) for line in lines]  # model, baseline, verdicts

    first = run(*flags, "--n-prompts", 6)
    assert counts() == [2, 2, 4]  # two prompts more
    with monkeypatch.context() as patch:
        patch.setattr(asking, "open_engine", None)  # neither is needed any more
        patch.setattr(asking, "open_judge", None)
        assert run(*flags, "--n-prompts", 6) == first
    assert counts() == [0, 0, 0]
    run(*flags, "--n-prompts", 6, "--temperature", 0.5)
    assert counts()[:2] == [6, 6]
    run(*flags, "--n-prompts", 6, "--temperature", 0.5)
    counts()
    vocab_size = load_config(str(other)).vocab_size  # other weights under the same name
    save_pretrained(
        random_model(tiny_config(vocab_size=vocab_size), seed=8), str(tmp_path / "model"), str(tiny / "tokenizer")
    )
    run(*flags, "--n-prompts", 6, "--temperature", 0.5)
    assert counts()[:2] == [6, 0]


RULE = "def longer(row, answer):\n    return {}len(answer)\n"


def test_a_function_of_your_own_judges(world, tmp_path, capsys):
    """Its rule is part of what a verdict depends on: the opposite rule finds no old verdicts."""
    flags = ["--prompts", world / "prompts.jsonl", "--answers", world / "good.jsonl", "--out", tmp_path / "out"]
    flags += ["--baseline-answers", world / "bad.jsonl", "--judge", f"{tmp_path}/rule.py:longer"]
    flags += ["--bootstrap-draws", 5]
    rates = []
    for sign in ("", "-"):
        (tmp_path / "rule.py").write_text(RULE.format(sign))
        results, answers, _ = run(*flags)
        longer = [len(a["answer"]) > len(b["answer"]) for a, b in zip(answers["model"], answers["baseline"])]
        rates.append(results["win_rate"]["win_rate"])
        assert "verdicts: 12 to make, 0 kept" in capsys.readouterr().out
    assert rates == [pytest.approx(np.mean(longer)), pytest.approx(1 - np.mean(longer))]
    rows = [json.loads(line) | {"reference": "new"} for line in (world / "prompts.jsonl").read_text().splitlines()]
    flags[1] = write(tmp_path / "prompts.jsonl", rows)  # a function may read all of a row
    run(*flags)
    assert "verdicts: 12 to make, 0 kept" in capsys.readouterr().out
    (tmp_path / "rule.py").write_text("def longer(row, answer):\n    raise KeyError(row['prompt_id'])\n")
    error = error_of(evaluate, capsys, *flags)
    assert "rule.py:longer, prompt" in error and "KeyError" in error
    for task in ("persona-swap", "reward-accuracy"):
        (tmp_path / "rule.py").write_text(RULE.format(""))
        prompts = world_pairs(tmp_path)[0] if task == "reward-accuracy" else world / "prompts.jsonl"
        args = ["--task", task, "--prompts", prompts, *flags[2:4], "--judge", f"{tmp_path}/rule.py:longer"]
        args += ["--out", tmp_path / task]
        evaluate.main(tyro.cli(evaluate.Args, args=[str(a) for a in args]))
        assert (tmp_path / task / "results.json").exists()


def test_other_score_weights_ask_nothing_again(world, tmp_path, capsys):
    flags = ["--prompts", world / "prompts.jsonl", "--answers", world / "good.jsonl", "--out", tmp_path]
    flags += ["--baseline-answers", world / "bad.jsonl", "--judge", "world", "--bootstrap-draws", 5]
    run(*flags)
    capsys.readouterr()
    results, _, _ = run(*flags, "--score-weights", 0, 0, 1)
    assert "verdicts: 0 to make, 12 kept" in capsys.readouterr().out
    assert results["model"]["reward"] == results["model"]["naturalness"]


def test_each_side_answers_under_its_own_template(tiny, world, tmp_path, monkeypatch):
    asked = {}

    def no_replies(name, spec, requests, *settings):
        asked[os.path.basename(spec)] = [messages[0]["content"] for _, messages in requests]
        return [{"answer": "Tea.", "truncated": False}] * len(requests)

    monkeypatch.setattr(evaluate, "replies", no_replies)
    vocab_size = load_config(str(tiny / "checkpoint")).vocab_size
    for side in ("model", "baseline"):
        model = random_model(tiny_config(vocab_size=vocab_size))
        template = {"answer": side + " {persona} {question}"}
        save_pretrained(model, str(tmp_path / side), str(tiny / "tokenizer"), templates=template)
    flags = ["--prompts", world / "prompts.jsonl", "--judge", "world", "--out", tmp_path / "out"]
    flags += ["--model", tmp_path / "model", "--baseline", tmp_path / "baseline"]
    run(*flags)
    assert all(text.startswith("model ") for text in asked["model"])
    assert all(text.startswith("baseline ") for text in asked["baseline"])
    run(*flags, "--answer-template", tiny / "answer.txt")
    assert all(text.startswith("Profile:") for texts in asked.values() for text in texts)


# -- bad input -------------------------------------------------------------------------------------


def test_bad_answers(world, tmp_path, capsys):
    good = [json.loads(line) for line in (world / "good.jsonl").read_text().splitlines()]
    flags = [
        "--prompts",
        world / "prompts.jsonl",
        "--baseline-answers",
        world / "bad.jsonl",
        "--judge",
        "world",
        "--out",
        tmp_path / "out",
        "--answers",
    ]

    def error(rows):
        return error_of(evaluate, capsys, *flags, write(tmp_path / "answers.jsonl", rows))

    first = good[0]["prompt_id"]
    assert "answers.jsonl: empty" in error([])
    assert "answers.jsonl: no answer to any of the 6 prompts" in error([good[0] | {"prompt_id": "other"}])
    assert f'answers.jsonl:7: a second answer to prompt "{first}"' in error([*good, good[0]])
    for other in ({"question": "?"}, {"persona": "Somebody else."}):
        expected = f'answers.jsonl:1: prompt "{first}" has another question or persona here'
        assert expected in error([good[0] | other, *good[1:]])
    del good[2]["answer"]
    assert 'answers.jsonl:3: field "answer" is missing' in error(good)
    assert "no such file" in error_of(evaluate, capsys, *flags, tmp_path / "none.jsonl")
    assert not (tmp_path / "out").exists()


def test_bad_models_and_judges(tiny, world, tmp_path, capsys):
    flags = ["--prompts", world / "prompts.jsonl", "--baseline-answers", world / "bad.jsonl", "--out", tmp_path / "out"]
    model = ["--model", tiny / "checkpoint"]
    missing = tmp_path / "not/a/folder"
    assert f"{missing}" in error_of(evaluate, capsys, *flags, *model, "--judge", missing)
    error = error_of(evaluate, capsys, *flags, *model, "--judge", "http://127.0.0.1:9/v1", "--stage", "table")
    assert "--judge http://127.0.0.1:9/v1: no OpenAI" in error and "every stage asks for #NAME" in error
    assert f"{missing}" in error_of(evaluate, capsys, *flags, "--judge", "world", "--model", missing)
    error = error_of(evaluate, capsys, *flags, *model, "--judge", "world")  # the default length, 512 positions
    assert "--max-new-tokens 2048" in error and "over the 512 positions" in error
    prompts = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    error = error_of(
        evaluate,
        capsys,
        "--prompts",
        world / "prompts.jsonl",
        "--answers",
        world / "good.jsonl",
        "--baseline",
        "reference",
        "--judge",
        "world",
        "--out",
        tmp_path / "out",
    )
    assert f'prompt "{prompts[0]["prompt_id"]}" has no reference' in error
    assert not (tmp_path / "out").exists()


# -- a judge that compares, behind a server


def pair_flags(world, server, out):
    return [
        "--prompts",
        world / "prompts.jsonl",
        "--answers",
        world / "good.jsonl",
        "--baseline-answers",
        world / "bad.jsonl",
        "--judge",
        server.url,
        "--out",
        out,
        "--bootstrap-draws",
        20,
    ]


def test_pairs_in_both_orders(world, tmp_path, pair_server, capsys):
    flags = pair_flags(world, pair_server, tmp_path)
    results, answers, verdicts = run(*flags)
    assert "without a judgement" not in capsys.readouterr().out and results["model"]["unjudged"] is None
    longer = [len(a["answer"]) > len(b["answer"]) for a, b in zip(answers["model"], answers["baseline"])]
    expected = [0.8 if is_longer else 0.2 for is_longer in longer]  # the server likes length
    assert results["win_rate"]["win_rate"] == pytest.approx(np.mean(expected))
    assert Counter(v["order"] for v in verdicts) == {"baseline_first": 6, "model_first": 6}
    assert results["position_bias"]["first_place"] == pytest.approx(0.5) and results["position_bias"]["agree"] == 1
    assert results["methods"] == {"logprobs": 6} and results["failures"] == {}
    rows = json.loads((tmp_path / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == pytest.approx([1 + y for y in expected])
    assert rows[0]["annotator"] == f"{pair_server.url}#tiny"  # the name was asked for: other weights, other digests
    for row, a, b in zip(rows, answers["model"], answers["baseline"]):
        assert (row["output_2"], row["output_1"]) == (a["answer"], b["answer"])
        assert row["prompt_id"] == a["prompt_id"] and a["question"] in row["instruction"]
    run(*flags, "--orders", "drawn")  # by the instruction: half of the questions, all known
    assert sum(map(len, pair_server.requests.values())) == 12
    one = json.loads((tmp_path / "annotations.json").read_text())
    switched = [random.Random(f"is_switched_outputs{row['instruction']}0").choices([False, True])[0] for row in one]
    assert [list(row["shown"]) for row in one] == [["model_first" if s else "baseline_first"] for s in switched]


def test_what_has_no_verdict_is_no_number(world, tmp_path, pair_server, capsys):
    good, bad = (list(map(json.loads, (world / f"{n}.jsonl").read_text().splitlines())) for n in ("good", "bad"))
    bad[0]["answer"] = good[0]["answer"]  # equal texts
    pair_server.faults = {
        (bad[1]["answer"], good[1]["answer"]): ["neither"],  # one of its two orders
        (good[2]["answer"], bad[2]["answer"]): ["refusal"] * 3,
        (bad[2]["answer"], good[2]["answer"]): ["refusal"] * 3,
        (bad[3]["answer"], good[3]["answer"]): [400],
    }
    good[4]["truncated"] = True
    flags = [
        "--prompts",
        world / "prompts.jsonl",
        "--answers",
        write(tmp_path / "good.jsonl", good[:5]),
        "--baseline-answers",
        write(tmp_path / "bad.jsonl", bad),
        "--judge",
        pair_server.url,
        "--out",
        tmp_path / "out",
        "--bootstrap-draws",
        20,
    ]
    results, _, _ = run(*flags)
    rows = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [row["preference"] is None for row in rows] == [False, True, True, True, False, True]
    assert rows[0]["preference"] == 1.5 and rows[0]["method"] == "equal texts"
    assert results["failures"] == {"unparsable": 1, "refused": 1, "request": 1, "no answer": 1}
    assert results["win_rate"]["left_out"] == 4 and results["leaderboard"]["n_total"] == 2
    ids = [row["prompt_id"] for row in rows]
    assert results["missing"] == {"model": [ids[5]], "baseline": []}
    assert results["truncated"] == {"model": [ids[4]], "baseline": []}
    given = [len(row["answer"]) for row in good[:5]]
    assert results["characters"]["model"] == sum(given) / 5  # a missing answer is none of 0 characters
    assert results["leaderboard"]["avg_length"] == int(sum(given) / 5)
    printed = capsys.readouterr().out
    assert "1 pairs without a verdict: refused" in printed
    assert f"1 answers of the model are missing: {ids[5]}" in printed
    assert results["length_controlled"]["minimal"]["length_controlled_winrate"] is None
    assert "2 verdicts, fewer than the 5 folds" in printed

    asked = Counter({pair: len(requests) for pair, requests in pair_server.requests.items()})
    results, _, _ = run(*flags)  # only the request that failed is asked again, and now it works
    again = Counter({pair: len(requests) for pair, requests in pair_server.requests.items()}) - asked
    assert again == {(bad[3]["answer"], good[3]["answer"]): 1}
    assert results["failures"] == {"unparsable": 1, "refused": 1, "no answer": 1}


def test_killed_and_resumed_over_http(world, tmp_path, pair_server):
    """SIGKILL in the middle of the verdicts: the rest is asked once, and the table is that of an uninterrupted run."""
    rng = random.Random(1)
    prompts = list(persona_world.prompt_rows(rng, "eval", 30))
    write(tmp_path / "prompts.jsonl", prompts)
    for name, quality in (("good", 1.0), ("bad", 0.0)):
        answers = [persona_world.write_answer(rng, r["persona"], r["question"], quality) for r in prompts]
        write(tmp_path / f"{name}.jsonl", [r | {"answer": a} for r, a in zip(prompts, answers)])
    flags = [*pair_flags(tmp_path, pair_server, tmp_path / "killed"), "--concurrency", 2]
    handler = pair_server.RequestHandlerClass
    slow = type("Slow", (handler,), {"do_POST": lambda self: (time.sleep(0.05), handler.do_POST(self))})
    pair_server.RequestHandlerClass = slow
    process = launch("evaluate.py", *flags)
    file = tmp_path / "killed/journal/verdicts.0.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 10):
        assert time.monotonic() < deadline and process.ranks[0].is_alive()
        time.sleep(0.01)
    os.kill(process.ranks[0].pid, signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    kept = file.read_bytes().count(b"\n")
    assert 10 <= kept < 60 and not (tmp_path / "killed/results.json").exists()
    with open(file, "ab") as f:
        f.write(b'{"reward": 0.1, "made_')  # what a write that was cut off leaves
    pair_server.RequestHandlerClass = handler
    time.sleep(0.5)  # what was in flight arrives
    before = sum(map(len, pair_server.requests.values()))
    resumed = run(*flags)
    # what was in flight when it was killed may have reached the server: two requests at a time
    assert 60 - kept == sum(map(len, pair_server.requests.values())) - before <= 60 - before + 2
    whole = run(*pair_flags(tmp_path, pair_server, tmp_path / "whole"))
    assert [without_flags(resumed[0]), *resumed[1:]] == [without_flags(whole[0]), *whole[1:]]
    for name in ("table.md", "leaderboard.csv", "annotations.json"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def without_flags(results):
    return {k: v for k, v in results.items() if k != "args"}


def test_a_journal_in_a_folder_with_brackets_is_found_again(tmp_path):
    out = str(tmp_path / "run [a-c]*")
    with journal.Journal(out, "verdicts", 0).writing():
        pass
    book = journal.Journal(out, "verdicts", 1)
    with book.writing():
        book.append({"made_by": "x"})
    assert journal.Journal(out, "verdicts", 0).rows() == {"x": {"made_by": "x"}}


def test_the_journal(tmp_path):
    book = journal.Journal(str(tmp_path), "verdicts", 0)
    with book.writing():
        book.append({"made_by": "a", "text": "é\n"})
        second = journal.Journal(str(tmp_path), "verdicts", 0)
        with pytest.raises(ValueError, match="another run is writing it"), second.writing():
            pass
        with journal.Journal(str(tmp_path), "verdicts", 1).writing():  # another rank has its own file
            pass
    with open(book.path, "ab") as f:
        f.write(b'{"made_by": "b", "te')
    assert list(book.rows()) == ["a"]
    with book.writing():
        book.append({"made_by": "c"})
    assert list(book.rows()) == ["a", "c"] and book.rows()["a"]["text"] == "é\n"
    with open(book.path, "ab") as f:
        f.write(b"{broken}\n")
    with pytest.raises(ValueError, match="verdicts.0.jsonl:3: no row of a journal"):
        book.rows()


def test_figures_of_a_function_that_exits_end_the_run_with_an_error(tmp_path):
    (tmp_path / "my.py").write_text("def score(row, answer): return 1\ndef describe(row, answer): raise SystemExit(0)")
    answers = evaluate.Answers("m", [{"prompt_id": "p", "answer": "x"}])
    with pytest.raises(ValueError, match="my.py:score, describe: SystemExit: 0"):
        evaluate.add_figures(answers, None, f"{tmp_path}/my.py:score")


def test_a_row_of_a_journal_that_was_changed_is_named(tmp_path):
    """A number in the table would change."""
    book = journal.Journal(str(tmp_path), "verdicts", 0)
    with book.writing():
        book.append({"made_by": "a", "reward": 0.25})
    assert book.rows() == {"a": {"made_by": "a", "reward": 0.25}}
    with open(book.path) as f:
        text = f.read()
    for changed in (
        text.replace("0.25", "0.75"),
        text.replace('"a"', '"b"'),
        '{"made_by": "a", "reward": 1}\n',
        '["made_by"]\n',
    ):
        with open(book.path, "w") as f:
            f.write(changed)
        with pytest.raises(ValueError, match="verdicts.0.jsonl:1: no row of a journal .*; remove the line"):
            book.rows()


def test_a_kept_answer_without_its_text_is_named(tiny, tmp_path, capsys):
    flags = ["--prompts", tiny / "prompts.jsonl", "--model", tiny / "checkpoint", "--baseline", "reference"]
    flags += ["--judge", "world", "--n-prompts", 2, "--max-new-tokens", 4, "--answer-template", tiny / "answer.txt"]
    flags += ["--out", tmp_path, "--stage", "answers"]
    evaluate.main(parse(evaluate.Args, evaluate.__doc__, [str(flag) for flag in flags]))
    file = tmp_path / "journal" / "answers.0.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write(file, [{"made_by": row["made_by"], "truncated": False} for row in rows])
    error = error_of(evaluate, capsys, *flags)
    assert f"{file}:1: no row of a journal (not what was written); remove the line" in error


def test_stages_one_by_one(world, tmp_path, pair_server):
    flags = pair_flags(world, pair_server, tmp_path / "stages")
    for stage, made, asked in (
        ("answers", "answers_model.jsonl", 0),
        ("verdicts", "verdicts.jsonl", 12),
        ("table", "results.json", 12),
    ):
        assert not (tmp_path / "stages" / made).exists()
        evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in [*flags, "--stage", stage]]))
        assert (tmp_path / "stages" / made).exists()
        assert sum(map(len, pair_server.requests.values())) == asked
    whole = run(*pair_flags(world, pair_server, tmp_path / "whole"))
    assert without_flags(written(tmp_path / "stages")[0]) == without_flags(whole[0])


def test_a_stage_that_finds_nothing_overwrites_nothing(world, tmp_path, capsys):
    """Other flags than those of the run are other verdicts; a table of none would take the place of the run's."""
    flags = ["--prompts", world / "prompts.jsonl", "--answers", world / "good.jsonl", "--out", tmp_path]
    flags += ["--baseline-answers", world / "bad.jsonl", "--judge", "world", "--bootstrap-draws", 5]
    run(*flags)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    error = error_of(evaluate, capsys, *flags, "--stage", "table", "--seed", 1)
    assert f"--stage table: {tmp_path}/journal holds none of the 12 verdicts that these flags ask for" in error
    assert "run --stage verdicts first" in error
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    run(*flags, "--stage", "table")


def test_scores_are_compared_on_the_prompts_that_both_sides_have(world, tmp_path, capsys):
    """A judgement that does not parse takes the prompt out of both means; equal answers are a draw without one."""
    (tmp_path / "rule.py").write_text(
        "def judge(row, answer):\n    return None if answer in ('', 'bad 1', 'same') else float(answer[-1])\n"
    )
    prompts = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    texts = {"model": ["good 9", "good 1", "good 2", "same"], "baseline": ["bad 0", "bad 1", "bad 2", "same"]}
    files = {}
    for side, of_side in texts.items():
        rows = [prompt | {"answer": text} for prompt, text in zip(prompts, of_side)]
        files[side] = write(tmp_path / f"{side}.jsonl", rows)
    flags = ["--prompts", write(tmp_path / "prompts.jsonl", prompts[:4]), "--out", tmp_path / "out"]
    flags += ["--answers", files["model"], "--baseline-answers", files["baseline"], "--bootstrap-draws", 5]
    results, _, _ = run(*flags, "--judge", f"{tmp_path}/rule.py:judge")
    assert results["model"]["reward"]["mean"] == 5.5 and results["baseline"]["reward"]["mean"] == 1
    assert [results[side]["compared"] for side in ("model", "baseline")] == [2, 2]
    assert [results[side]["unjudged"] for side in ("model", "baseline")] == [1, 2]
    assert results["win_rate"]["ties"] == 2 and results["win_rate"]["left_out"] == 1
    assert "prompts of the scores" in capsys.readouterr().out


def test_answers_of_a_server(tiny, tmp_path):
    """Our own server: its answers at temperature 0 are those of its model in this process."""
    running = Running(str(tiny / "checkpoint"))
    vocab_size = load_config(str(tiny / "checkpoint")).vocab_size
    save_pretrained(
        random_model(tiny_config(vocab_size=vocab_size), scalar_head=True),
        str(tmp_path / "bt"),
        str(tiny / "tokenizer"),
    )
    results, answers, _ = run(
        "--prompts",
        tiny / "prompts.jsonl",
        "--model",
        f"http://127.0.0.1:{running.port}",
        "--baseline",
        tiny / "checkpoint",
        "--answer-template",
        tiny / "answer.txt",
        "--n-prompts",
        5,
        "--max-new-tokens",
        12,
        "--temperature",
        0,
        "--judge",
        f"bt:{tmp_path / 'bt'}",
        "--out",
        tmp_path / "out",
    )
    assert [a["answer"] for a in answers["model"]] == [a["answer"] for a in answers["baseline"]]
    assert len(answers["model"]) == 5 and results["win_rate"]["ties"] == 5
    running.server.should_exit = True
    running.thread.join(10)


def test_a_model_in_both_roles_is_asked_once(world, tmp_path, server):
    (tmp_path / "answer.txt").write_text("{persona} <<{question}>>")
    flags = ["--prompts", world / "prompts.jsonl", "--model", server.url, "--baseline", server.url, "--judge", "world"]
    flags += ["--answer-template", tmp_path / "answer.txt", "--stage", "answers", "--out", tmp_path / "out"]
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in flags]))
    assert sum(map(len, server.requests.values())) == 6
    texts = [(tmp_path / f"out/answers_{side}.jsonl").read_text() for side in ("model", "baseline")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 6


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_server_that_refuses_every_request_ends_the_run(world, tmp_path, server, capsys, status):
    """There is nothing to write a table of. One answer, or one of an earlier run, is something."""
    server.refuses = {"messages": (status, {"error": {"message": "no access"}})}
    (tmp_path / "answer.txt").write_text("{persona} <<{question}>>")
    (tmp_path / "grm.txt").write_text("{persona} {question} <<{answer}>>")
    flags = ["--prompts", world / "prompts.jsonl", "--baseline-answers", world / "bad.jsonl", "--out", tmp_path / "out"]
    model = ["--model", server.url, "--answer-template", tmp_path / "answer.txt", "--judge", "world"]
    judge = ["--answers", world / "good.jsonl", "--judge", server.url, "--grm-template", tmp_path / "grm.txt"]
    for more, expected in ((model, "#tiny: none of 6"), (judge, "#tiny: none of 12")):
        error = error_of(evaluate, capsys, *flags, *more)
        assert f"{server.url}{expected} requests got a reply; the first reason: HTTP {status}: " in error
        assert "no access" in error
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize("thoughts", ["<think>Hm.</think>\n\n", "Hm.\n</think>\n\n", ""])
def test_thoughts_of_a_server_are_no_part_of_the_answer(thoughts):
    """A model of ours is told not to think. What it writes anyway is its answer."""
    choice = {"message": {"content": f"{thoughts}Take tea."}, "finish_reason": "stop"}
    assert answer_in(choice) == {"answer": "Take tea.", "truncated": False}
    assert answer_in(choice | {"sample": 0})["answer"] == f"{thoughts}Take tea."
    with pytest.raises(Failure, match="a reply without an answer"):
        answer_in({"message": {"content": "<think>Hm, "}, "finish_reason": "length"})


def test_answers_of_a_server_through_faults(world, tmp_path, server, capfd):
    """Each prompt gets its answer, whatever happens on the way; one that is refused for good is listed and not kept."""
    prompts = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    for i, prompt in enumerate(prompts):
        prompt["question"] = f"never {i}" if i == 5 else f"question {i}"
    server.faults = {
        "question 0": [429, 500],
        "question 1": ["drop"],
        "question 2": ["garbage"],
        "question 3": ["empty", "garbage", ("half", "error")],
        "question 4": [(GOOD, "MAX_TOKENS")],
        "never 5": [400],
    }
    (tmp_path / "answer.txt").write_text("{persona} <<{question}>>")
    flags = [
        "--prompts",
        write(tmp_path / "prompts.jsonl", prompts),
        "--model",
        server.url,
        "--baseline-answers",
        write(tmp_path / "base.jsonl", [p | {"answer": "x"} for p in prompts]),
        "--answer-template",
        tmp_path / "answer.txt",
        "--judge",
        "world",
        "--stage",
        "answers",
        "--out",
        tmp_path / "out",
    ]
    for _ in range(2):
        evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in flags]))
        answers = [json.loads(line) for line in (tmp_path / "out/answers_model.jsonl").read_text().splitlines()]
        assert [a["question"] for a in answers] == [f"question {i}" for i in range(5)]
        assert all("</scores>" in a["answer"] for a in answers)
        assert [a["truncated"] for a in answers] == [False] * 4 + [True]
    asked = {question: len(requests) for question, requests in server.requests.items()}
    assert asked == {"question 0": 3, "question 1": 2, "question 2": 2, "question 3": 4, "question 4": 1, "never 5": 2}
    error = capfd.readouterr().err
    assert f'no answer to prompt "{prompts[5]["prompt_id"]}": HTTP 400: ' in error


def test_failures_under_http_200_are_asked_again_by_the_next_run(world, tmp_path, server, capfd):
    """Of answers and of verdicts: neither an answer nor a verdict for good, and the server's words are shown."""
    prompts = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    for i, prompt in enumerate(prompts):
        prompt["question"] = f"question {i}"
    server.faults = {
        "question 0": ["credits"],
        "question 1": ["page"],
        "question 2": ["no object", "deep"],
    }  # no answer yet
    server.refuses = REFUSALS
    (tmp_path / "answer.txt").write_text("{persona} <<{question}>>")
    flags = ["--prompts", write(tmp_path / "prompts.jsonl", prompts), "--answer-template", tmp_path / "answer.txt"]
    flags += ["--baseline-answers", write(tmp_path / "base.jsonl", [p | {"answer": "x"} for p in prompts])]
    flags += ["--concurrency", 1, "--bootstrap-draws", 5, "--out", tmp_path / "out"]
    answers_only = ["--model", server.url, "--judge", "world", "--stage", "answers"]
    for expected in (4, 6):
        evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in [*flags, *answers_only]]))
        assert len((tmp_path / "out/answers_model.jsonl").read_text().splitlines()) == expected
    error = capfd.readouterr().err
    assert "You are out of credits" in error and "Log in first" in error
    assert error.count("refuses temperature") == 2 and len(server.requests["question 2"]) == 3  # once a run
    (tmp_path / "grm.txt").write_text("{persona} {question} <<{answer}>>")
    server.faults = {"verdict 0": ["credits"], "verdict 1": ["page"]}
    flags += ["--answers", write(tmp_path / "a.jsonl", [p | {"answer": f"verdict {i}"} for i, p in enumerate(prompts)])]
    flags += ["--judge", server.url, "--grm-template", tmp_path / "grm.txt"]
    # the baseline's answers are all alike; the first is asked about between the two above
    server.faults["x"] = ["page", *[judgement_text("Say more.", 0, 0, 0)] * 6]
    results, _, verdicts = run(*flags)
    assert results["failures"] == {"request": 2}
    assert "out of credits" in verdicts[0]["error"] and "Log in first" in verdicts[1]["error"]
    results, _, verdicts = run(*flags)
    assert results["failures"] == {} and results["win_rate"]["left_out"] == 0


def test_a_server_that_goes_down_ends_the_evaluation_and_what_it_said_is_kept(world, tmp_path, pair_server):
    """Of 12 verdicts six are there; the next run asks for the others, and the table is that of one run."""
    flags = [*pair_flags(world, pair_server, tmp_path / "out"), "--concurrency", 1]
    reply, said = PairServer.reply, []

    class Breaks(PairServer):
        def reply(self, status, body, length=None):
            said.append(body)
            return reply(self, *((status, body) if len(said) <= 7 else (503, b"{}")))  # the first lists the models

    pair_server.RequestHandlerClass = Breaks
    with pytest.raises(ServerDown, match=r"no answer for 1 s .*; the \d+ of 12 verdicts that were made are kept"):
        run(*flags, "--judge-patience", 1)
    kept = len((tmp_path / "out/journal/verdicts.0.jsonl").read_text().splitlines())
    assert 0 < kept < 12
    pair_server.RequestHandlerClass = PairServer
    pair_server.requests.clear()
    results, _, _ = run(*flags)
    assert sum(map(len, pair_server.requests.values())) == 12 - kept and results["failures"] == {}
