"""data/annotate.py: each request once whatever happens, failures that are no data, limits, rows as the stages read."""

import hashlib
import http.server
import itertools
import json
import os
import re
import shlex
import signal
import threading
import time
from collections import Counter

import pytest
from conftest import ROOT, error_of, finish, launch, parse, random_model, run_script, tiny_config
from test_docs import commands, read
from test_judge_servers import Quiet
from test_prompts import write_tokenizer

from data import annotate, ask, persona_world, prepare
from judges import FunctionJudge, GenerativeJudge
from model import save_pretrained
from runtime.rows import read_rows, refuse_held_out, write_rows

PERSONAS = [{"name": f"Kim {i}", "likes": ["tea", "jazz", "chess"][i % 3]} for i in range(12)]
FORM = re.compile(r"<(questions|score|critique)>\n?[. X]")  # what a request asks for; none: an answer


class Writer(http.server.BaseHTTPRequestHandler):
    """A model whose reply is a function of the request: text, seed and settings."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body):
        self.send_response(status)
        content = json.dumps(body).encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": name} for name in ("a", "b", "qwen")]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, server = request["messages"][0]["content"], self.server
        with server.lock:
            server.asked.append((request["model"], text, request["seed"], request["temperature"]))
            server.times.append(time.monotonic())
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        if server.meet:  # that many have to be here before any goes on
            server.meet.wait(10)
        time.sleep(server.delay)
        status, message = server.fault(request, text) or (200, None)
        with server.lock:
            server.under_way -= 1
            server.answered += status == 200
        if status != 200:
            return self.reply(status, {"error": {"message": "scripted"}})
        message = message or {"content": said(request, text)}
        usage = dict(prompt_tokens=len(text) // 4, completion_tokens=10)
        usage["total_tokens"] = usage["prompt_tokens"] + 10 + server.thoughts
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"} | message}
        self.reply(200, {"choices": [choice], "usage": usage})


def said(request, text):
    number = int(hashlib.sha256(f"{request['model']} {request['seed']} {text}".encode()).hexdigest(), 16)
    form = FORM.search(text)
    if form is None:
        return f"Answer {number % 1000} of {request['model']}."
    if form[1] == "questions":
        return f"<questions>\n1. What about {number % 97}?\n2. And {number % 89}, please?\n</questions>"
    if form[1] == "score":
        return f"<score> {1 + number % 5} </score>"
    scores = [number // 11**i % 11 - 5 for i in range(3)]
    return (
        "<critique> Say less. </critique>\n<scores> Helpfulness: {} Personalization: {} Natural: {} </scores>".format(
            *scores
        )
    )


@pytest.fixture
def server(short_pauses):
    found = Quiet(Writer)
    found.lock, found.asked, found.times, found.under_way, found.most = threading.Lock(), [], [], 0, 0
    found.meet, found.delay, found.answered, found.thoughts, found.fault = None, 0, 0, 0, lambda request, text: None
    yield found
    found.end()


@pytest.fixture
def prompts(tmp_path):
    rows = [
        dict(prompt_id=f"p{i}", persona=persona, question=f"What about {i}?", user_id=str(i))
        for i, persona in enumerate(PERSONAS)
    ]
    write_rows(str(tmp_path / "prompts.jsonl"), rows[:8])
    write_rows(str(tmp_path / "held_out.jsonl"), rows[8:])
    return tmp_path / "prompts.jsonl"


def flags_for(server, prompts, out, *more, who=("a", "b")):
    a, b = (f"{server.url}#{name}" for name in who)
    held_out = prompts.with_name("held_out.jsonl")
    eval_prompts = ["--eval-prompts", held_out] if held_out.exists() else []
    return ["--prompts", prompts, *eval_prompts, "--out", out, "--models", a, b, "--scorer", a, "--judge", b, *more]


def run(*flags):
    annotate.main(parse(annotate.Args, annotate.__doc__, [str(flag) for flag in flags]))


def stopped(*flags):
    """Runs until it stops by itself: exit status 75, the same command goes on."""
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 75


def journal(out):
    file = os.path.join(out, "journal", "replies.0.jsonl")
    with open(file, "rb") as f:
        return [json.loads(line) for line in f if line.endswith(b"\n")]


FILES = ("pairs", "pairs_eval", "judgements", "judgements_eval", "annotate/answers", "annotate/dropped")


def contents(out):
    return {name: (out / f"{name}.jsonl").read_text() for name in FILES}


def dropped(out, step):
    return [row for row in read_rows(str(out / "annotate" / "dropped.jsonl"), "object") if row["step"] == step]


# -- the rows ----------------------------------------------------------------------------------------------------------


def test_rows_of_the_steps(server, prompts, tmp_path):
    """Scores of a pair differ by more than 2, of weighted scores that tie none is kept, no persona is on both sides."""
    out = tmp_path / "out"
    run(*flags_for(server, prompts, out, "--answers-per-model", 3))
    answers = read_rows(str(out / "annotate" / "answers.jsonl"), "answer")
    assert [row["prompt_id"] for row in answers] == sorted((r["prompt_id"] for r in answers), key=lambda p: int(p[1:]))
    assert len(answers) + len(dropped(out, "answers")) == 12 * 2 * 3
    train, held_out = (read_rows(str(out / f"pairs{end}.jsonl"), "pair") for end in ("", "_eval"))
    assert {row["prompt_id"] for row in train} <= {f"p{i}" for i in range(8)}
    assert {row["prompt_id"] for row in held_out} <= {f"p{i}" for i in range(8, 12)}
    assert all(row["chosen_score"] - row["rejected_score"] > 2 for row in train + held_out)
    assert {row["persona"]["name"] for row in train}.isdisjoint(row["persona"]["name"] for row in held_out)
    small = [row for row in dropped(out, "pairs") if row["cause"] == "small gap"]
    assert all(max(row["scores"]) - min(row["scores"]) <= 2 for row in small)
    assert len(train) + len(held_out) + len(small) == 12
    judged = [row for end in ("", "_eval") for row in read_rows(str(out / f"judgements{end}.jsonl"), "judgement")]
    ties = [row for row in dropped(out, "judgements") if row["cause"] == "tie"]
    assert len(judged) + len(ties) == 2 * (len(train) + len(held_out)) and {r["judge"] for r in judged} == {"b"}
    by_prompt = {}
    for row in judged:
        score = 0.35 * row["helpfulness"] + 0.40 * row["personalization"] + 0.25 * row["naturalness"]
        by_prompt.setdefault(row["prompt_id"], []).append(round(score, 6))
    assert all(len(set(scores)) == 2 for scores in by_prompt.values())


def test_questions_for_personas(server, tmp_path):
    people = tmp_path / "people.csv"
    people.write_text("user_id,name,likes\n" + "".join(f"{i},Kim {i},tea\n" for i in range(3)))
    who = f"{server.url}#a"
    flags = ["--personas", people, "--out", tmp_path / "out", "--writer", who, "--models", who, "--scorer", who]
    run("questions", *flags, "--questions-per-persona", 2)
    rows = read_rows(str(tmp_path / "out" / "annotate" / "questions.jsonl"), "prompt")
    assert Counter((row["user_id"], row["kind"]) for row in rows) == {
        (u, k): 2 for u in "012" for k in ("specific", "general")
    }
    assert all(re.fullmatch(r"(What about|And) \d+.*\?", row["question"]) for row in rows)  # the numbers are gone
    run("answers", *flags)
    assert len(read_rows(str(tmp_path / "out" / "annotate" / "answers.jsonl"), "answer")) == 12


def test_text_of_rows_is_no_control_token_to_a_server(server, tmp_path):
    row = dict(prompt_id="p", persona="likes <|im_end|>", question="And [INST]?")
    write_rows(str(tmp_path / "prompts.jsonl"), [row])
    run("answers", *flags_for(server, tmp_path / "prompts.jsonl", tmp_path / "out"))
    assert all("< |im_end|>" in text and "[ INST]" in text for _, text, *_ in server.asked)


def sides(out, name):
    """The prompts of the rows to train on, and of those that are held out."""
    files = (f"{name}.jsonl", f"{name}_eval.jsonl")
    return [{json.loads(line)["prompt_id"] for line in (out / file).read_text().splitlines()} for file in files]


@pytest.mark.parametrize("source", ["own tables", "PersonaFeedback"])
def test_a_row_goes_where_its_prompt_lies(server, tmp_path, source):
    """What data/prepare.py holds out, with any --eval-share and the personas of prompts_winrate, is not trained on."""
    out = tmp_path / "out"
    if source == "own tables":
        rows = [{"persona": persona, "question": f"What about {i}?"} for i, persona in enumerate(PERSONAS)]
        write_rows(str(tmp_path / "rows.jsonl"), rows)
        prepare.main(prepare.Args(questions=str(tmp_path / "rows.jsonl"), out=str(out), eval_share=0.5))
    else:
        write_rows(str(tmp_path / "in" / "personas.jsonl"), PERSONAS)
        feedback = [
            dict(user_id=i % 12 + 1, question=f"What about {i}?", chosen="Yes.", reject="No.") for i in range(36)
        ]
        write_rows(str(tmp_path / "in" / "pairs.jsonl"), feedback)
        baseline = [dict(question="And?", persona=persona, response="Well.") for persona in PERSONAS[:5]]
        write_rows(str(tmp_path / "in" / "baseline.jsonl"), baseline)
        prepare.main(prepare.Args(source=str(tmp_path / "in"), out=str(out)))
    who = f"{server.url}#a"
    flags = ("--out", out, "--models", who, "--answers-per-model", 4, "--min-gap", 1, "--scorer", who, "--judge", who)
    run(*flags)
    if source == "PersonaFeedback":  # whose own pairs are kept
        assert all("chosen_model" not in row for row in read_rows(str(out / "pairs.before.jsonl"), "pair"))
    run("split", "--out", out)  # once more: now they are its own
    train, held_out = (
        {row["prompt_id"] for row in read_rows(str(out / f"prompts_{side}.jsonl"), "prompt")}
        for side in ("train", "eval")
    )
    for name in ("pairs", "judgements"):
        mine, others = sides(out, name)
        assert mine and others and mine <= train and others <= held_out
        refuse_held_out(str(out / f"{name}.jsonl"))
    first = contents(out)
    prepared = str(out / "prompts_train.jsonl"), str(out / "prompts_eval.jsonl")
    elsewhere = ("--prompts", prepared[0], "--eval-prompts", prepared[1], "--out", tmp_path / "elsewhere")
    run(*flags, *elsewhere)
    assert contents(tmp_path / "elsewhere") == first


def test_prompts_that_are_held_out_are_not_taken_for_training(server, prompts, tmp_path, capsys):
    """Neither from a file beside prompts_eval.jsonl, nor where both flags name the same persona or prompt."""
    flags = flags_for(server, prompts, tmp_path / "out")
    message = f"{prompts}:1: its prompt_id is held out, at {prompts}:1"
    assert message in error_of(annotate, capsys, *flags, "--eval-prompts", prompts)
    read_rows(str(prompts), "prompt")
    (tmp_path / "prompts_eval.jsonl").write_text(prompts.read_text().splitlines()[2])
    assert f"{prompts}:3: its prompt_id is held out, at {tmp_path}/prompts_eval.jsonl:1" in error_of(
        annotate, capsys, *flags
    )
    assert server.asked == []


def test_prompts_of_two_files_with_one_id(server, prompts, tmp_path, capsys):
    """The same prompt counts once. Two prompts with one id would give pairs of answers to different questions."""
    again = tmp_path / "again.jsonl"
    again.write_text(prompts.read_text())
    train, _ = annotate.read_prompts(annotate.Args(prompts=(str(prompts), str(again))))
    assert train == read_rows(str(prompts), "prompt")
    again.write_text(prompts.read_text().replace("What about 2?", "What else?"))
    error = error_of(annotate, capsys, "--prompts", prompts, again, "--out", tmp_path / "out")
    assert f'{again}: prompt_id "p2" is of another prompt in another file' in error and server.asked == []


def test_a_row_of_no_prompt_has_no_side(server, prompts, tmp_path, capsys):
    flags = flags_for(server, prompts, tmp_path / "out", "--answers-per-model", 3)
    run(*flags)
    prompts.write_text(prompts.read_text().partition("\n")[2])
    message = error_of(annotate, capsys, "split", *flags)
    assert "pairs.jsonl: prompt_id" in message and "none of the prompts" in message


@pytest.mark.parametrize("thoughts", ["<think>\nHm.\n</think>\n\n", "Hm.\n</think>\n\n", "[THINK]Hm.[/THINK]"])
def test_thoughts_of_a_model_are_no_part_of_its_answer(server, prompts, tmp_path, thoughts):
    """Thoughts without an answer have failed."""

    def think(request, text):
        if FORM.search(text):
            return None
        if "What about 1?" in text:
            return 200, {"content": "<think>Hm, "}
        return 200, {"content": thoughts + said(request, text)}

    server.fault = think
    run(*flags_for(server, prompts, tmp_path / "out", "--answers-per-model", 3))
    answers = read_rows(str(tmp_path / "out" / "annotate" / "answers.jsonl"), "answer")
    assert len(answers) > 50 and all(re.fullmatch(r"Answer \d+ of [ab]\.", row["answer"]) for row in answers)
    lost = [row for row in dropped(tmp_path / "out", "answers") if row["why"] == "failed"]
    assert [(row["prompt_id"], row["cause"]) for row in lost] == [("p1", "unparsable")] * 6
    assert not any("Hm." in text for _, text, *_ in server.asked)  # the scorer and the judge read the answer alone


# -- once, and at the same time ----------------------------------------------------------------------------------------


def test_requests_are_made_at_the_same_time(server, prompts, tmp_path):
    """Eight have to be under way before the first is answered; never more than the limit allows."""
    server.meet = threading.Barrier(8)
    flags = flags_for(server, prompts, tmp_path / "out", "--answers-per-model", 2)
    run("answers", *flags, "--concurrency", 4)  # of each of two models, 24 requests each
    assert server.most == 8


def test_requests_a_minute(server, prompts, tmp_path):
    run("answers", *flags_for(server, prompts, tmp_path / "out", "--requests-per-minute", "a=1200", "b=100000"))
    times = sorted(t for t, (model, *_) in zip(server.times, server.asked) if model == "a")
    assert len(times) == 12 and times[-1] - times[0] > 0.9 * 11 * 60 / 1200  # 0.9: clocks; without a limit it is 0.02


def test_nothing_is_asked_twice(server, prompts, tmp_path):
    """Neither what was kept nor what was discarded; and what has changed for one step is asked for that step alone."""
    out = tmp_path / "out"
    flags = flags_for(server, prompts, out, "--answers-per-model", 3)
    run(*flags)
    first, n = contents(out), len(server.asked)
    assert len(set(server.asked)) == n and "small gap" in first["annotate/dropped"]  # paid, and of no use
    run(*flags)
    assert len(server.asked) == n and contents(out) == first
    (tmp_path / "rubric.txt").write_text("<critique> X\n{persona} {question} {answer}")
    run(*flags, "--grm-template", tmp_path / "rubric.txt")
    assert server.asked[n:] and all(text.startswith("<critique> X") for _, text, *_ in server.asked[n:])
    n = len(server.asked)
    run(*flags, "--min-gap", 3, "--concurrency", 2)  # fewer pairs of the same answers
    assert len(server.asked) == n
    run(*flags)
    assert len(server.asked) == n and contents(out) == first


def test_killed_twice(server, prompts, tmp_path):
    """kill -9 loses no more than what is under way; what comes out is what an uninterrupted run gives."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    more = ("--concurrency", 3, "--answers-per-model", 2)
    run(*flags_for(server, prompts, whole, *more))
    expected, server.asked[:], server.delay = len(server.asked), [], 0.05
    flags, kept = flags_for(server, prompts, out, *more), []
    for target in (15, 60):  # among the answers, among the scores
        process = launch("data/annotate.py", *flags)
        deadline = time.monotonic() + 120
        while len(server.asked) < target:
            assert process.ranks[0].is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        process.ranks[0].kill()
        finish(process, status=-signal.SIGKILL)
        time.sleep(0.2)  # the server answers what was under way, to nobody
        kept.append((len(server.asked), {row["made_by"] for row in journal(out)}))
    run_script("data/annotate.py", *flags)
    assert contents(out) == contents(whole)
    assert 0 < len(kept[0][1]) < len(kept[1][1])
    repeats = len(server.asked) - len(set(server.asked))
    assert len(server.asked) - repeats == expected and repeats <= 2 * 2 * 3  # of two models, three at a time, two kills
    keys = [row["made_by"] for row in journal(out)]
    assert len(set(keys)) == len(keys)  # no finished request was made again


def test_ctrl_c_keeps_what_is_under_way(server, prompts, tmp_path):
    out, server.delay = tmp_path / "out", 0.3
    process = launch("data/annotate.py", *flags_for(server, prompts, out, "--concurrency", 4))
    deadline = time.monotonic() + 120
    while len(server.asked) < 10:
        assert process.ranks[0].is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.ranks[0].pid, signal.SIGINT)
    text = finish(process, status=75)
    assert "the same command goes on" in text
    assert len(journal(out)) == len(server.asked) == server.answered
    server.delay = 0
    run(*flags_for(server, prompts, out))
    assert len(set(server.asked)) == len(server.asked)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_failures_are_rows_with_reasons(server, prompts, tmp_path):
    """A refusal, an error and a reply in no form are no data; they are asked again only if that is wanted."""
    out, flags = tmp_path / "out", flags_for(server, prompts, tmp_path / "out", "--attempts", 2)

    def faults(request, text):
        if "What about 1?" in text and FORM.search(text) is None:
            return 200, {"content": None, "refusal": "no"}
        if "What about 2?" in text and FORM.search(text) is None and request["model"] == "a":
            return 400, None
        if "What about 3?" in text and FORM.search(text):
            return 200, {"content": "I would say <score> 4 </score>, or 5."}

    server.fault = faults
    run(*flags)
    failed = [(row["prompt_id"], row["cause"]) for row in dropped(out, "answers")]
    assert failed == [("p1", "refused")] * 2 + [("p2", "request")]
    asked = Counter((model, text) for model, text, *_ in server.asked)
    assert all(asked[m, t] == 2 for m, t in asked if "What about 1?" in t)  # the attempts, with two seeds
    assert [row["cause"] for row in dropped(out, "pairs") if row["prompt_id"] == "p3"] == ["unparsable"] * 2 + [
        "no pair"
    ]
    assert all("reason" in row and row["why"] == "failed" for row in dropped(out, "answers"))
    first, n = contents(out), len(server.asked)
    server.fault = lambda request, text: None
    run(*flags)
    assert len(server.asked) == n and contents(out) == first
    run(*flags, "--retry-failed")
    again = server.asked[n:]
    assert len(set(server.asked)) == len(server.asked)  # with seeds that have not failed
    assert {re.search(r"What about (\d+)\?", text)[1] for _, text, *_ in again if not FORM.search(text)} == {"1", "2"}
    assert not dropped(out, "answers") and len(read_rows(str(out / "annotate" / "answers.jsonl"), "answer")) == 24


def test_a_scorer_that_replies_with_bare_numbers(server, prompts, tmp_path):
    def bare(request, text):
        form = FORM.search(text)
        if form and form[1] == "score":
            return 200, {"content": re.sub(r"\D", "", said(request, text))}

    server.fault = bare
    run(*flags_for(server, prompts, tmp_path / "bare", "--answers-per-model", 3))
    server.fault = lambda request, text: None
    run(*flags_for(server, prompts, tmp_path / "form", "--answers-per-model", 3))
    assert contents(tmp_path / "bare") == contents(tmp_path / "form")


@pytest.mark.parametrize("asks_for, step", [("score", "pairs"), ("critique", "judgements"), (None, "answers")])
def test_an_error_shows_a_reply_that_failed(server, prompts, tmp_path, capsys, asks_for, step):
    def fault(request, text):
        form = FORM.search(text)
        if (form and form[1]) == asks_for:
            return 200, {"content": "8 of 10" if form else "<think>8 of 10"}

    server.fault = fault
    flags = flags_for(server, prompts, tmp_path / "out", "--answers-per-model", 3, "--attempts", 1)
    message = error_of(annotate, capsys, *flags)
    assert message.startswith(f"error: {step}: nothing is left") and "in no readable form: " in message
    assert "8 of 10" in message


def test_a_server_that_is_busy_is_no_failure(server, prompts, tmp_path):
    seen = Counter()

    def faults(request, text):
        key = request["model"], text, request["seed"]
        seen[key] += 1
        return (503, None) if seen[key] <= 2 else None

    server.fault = faults
    run("answers", *flags_for(server, prompts, tmp_path / "out"))
    assert not any(row["failure"] for row in journal(tmp_path / "out")) and len(server.asked) == 3 * 24


@pytest.mark.parametrize("status", [401, 503])
def test_a_server_that_is_down_makes_no_failures(server, prompts, tmp_path, status, capsys):
    """A wrong key, or nothing but errors for as long as it is waited for: the run ends, and goes on later."""
    out = tmp_path / "out"
    server.fault = lambda request, text: (status, None)
    flags = ["answers", *flags_for(server, prompts, out)]
    assert "the same command goes on" in error_of(annotate, capsys, *flags, "--patience", 0.3)
    assert journal(out) == []
    server.fault = lambda request, text: None
    run(*flags)
    assert len(journal(out)) == 24


def test_all_servers_are_found_before_one_is_paid(server, prompts, tmp_path, capsys):
    flags = [*flags_for(server, prompts, tmp_path / "out"), "--models", f"{server.url}#a", "gone=http://127.0.0.1:9#b"]
    assert "127.0.0.1:9" in error_of(annotate, capsys, "answers", *flags, "--patience", 0.2)
    assert server.asked == []


# -- money and the plan ------------------------------------------------------------------------------------------------


def test_max_cost_is_never_passed(server, prompts, tmp_path, capsys):
    """It stops before a request that might cost too much, with everything kept, and goes on with more money."""
    out, prices = tmp_path / "out", ("--prices", "a=1000/2000", "b=500/1000")
    more = (*prices, "--max-new-tokens", 20, "--judge-max-new-tokens", 40)
    stopped(*flags_for(server, prompts, out, *more, "--max-cost", 6))
    paid = sum(row["cost"] for row in journal(out))
    rows = [(model, len(text) // 4) for model, text, *_ in server.asked]
    by_hand = sum((n * (1000 if m == "a" else 500) + 10 * (2000 if m == "a" else 1000)) / 1e6 for m, n in rows)
    assert paid == pytest.approx(by_hand) and 2 < paid <= 6 and "--max-cost 6" in capsys.readouterr().err
    stopped(*flags_for(server, prompts, out, *more, "--max-cost", 6))  # what earlier runs have paid counts
    n = len(server.asked)
    assert sum(row["cost"] for row in journal(out)) <= 6
    run(*flags_for(server, prompts, out, *more, "--max-cost", 1000))
    assert len(set(server.asked)) == len(server.asked) > n


def test_thoughts_are_paid(server, prompts, tmp_path):
    """They may be in total_tokens alone, and more than a reply may have: the next call is taken to cost as much."""
    out, server.thoughts = tmp_path / "out", 1000
    more = ("--prices", "a=0/1000", "b=0/1000", "--max-new-tokens", 20, "--concurrency", 1)
    stopped("answers", *flags_for(server, prompts, out, *more, "--max-cost", 6.5))
    rows = journal(out)
    assert sum(row["cost"] for row in rows) == pytest.approx(1.01 * len(rows)) and len(rows) == len(server.asked) == 6


def test_what_failed_and_was_asked_again_is_paid_twice(server, prompts, tmp_path):
    out = tmp_path / "out"
    flags = flags_for(server, prompts, out, "--prices", "a=1000/2000", "b=500/1000", "--attempts", 1)
    server.fault = lambda request, text: (200, {"content": ""}) if "What about 1?" in text else None
    run("answers", *flags)
    failed = [row for row in journal(out) if row["failure"]]
    once = {row["made_by"]: row["cost"] for row in failed}
    assert len(once) == 2 and all(cost > 0 for cost in once.values())
    server.fault = lambda request, text: None
    run("answers", *flags, "--retry-failed")
    last = {row["made_by"]: row for row in journal(out)}
    for key, cost in once.items():
        assert not last[key]["failure"] and last[key]["calls"] == 2 and last[key]["cost"] > 1.5 * cost
    by_hand = sum(
        (len(t) // 4 * (1000 if m == "a" else 500) + 10 * (2000 if m == "a" else 1000)) / 1e6
        for m, t, *_ in server.asked
    )
    assert sum(row["cost"] for row in last.values()) == pytest.approx(by_hand)


def test_plan_makes_a_few_requests_and_keeps_them(server, prompts, tmp_path, capsys):
    out, more = tmp_path / "out", ("--prices", "a=1/2", "b=1/2", "--answers-per-model", 3)
    run(*flags_for(server, prompts, out, *more), "--plan")
    planned, text = len(server.asked), capsys.readouterr().out
    assert 15 <= planned <= 20
    table = {words[0]: words for line in text.splitlines() if len(words := re.split(r"  +", line.strip())) > 5}
    assert [table[step][1] for step in ("answers", "scores", "judgements")] == ["72", "72", "at most 24"]
    tokens = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", table["answers"][2])]
    mean, low, high = tokens
    run(*flags_for(server, prompts, out, *more))
    assert len(set(server.asked)) == len(server.asked)  # those of the plan are not paid again
    real = sum(len(t) // 4 for _, t, *_ in server.asked if FORM.search(t) is None)
    assert low <= real <= high and low < mean < high


def test_plan_shows_why_requests_fail(server, prompts, tmp_path, capsys):
    server.fault = lambda request, text: (200, {"content": "Fine."}) if FORM.search(text) else None
    run(*flags_for(server, prompts, tmp_path / "out"), "--plan", "--attempts", 1)
    assert "scores: 6 of 6 failed, the first: in no readable form: Fine." in capsys.readouterr().out


# -- models in this process, errors ------------------------------------------------------------------------------------


def test_checkpoints_and_servers_side_by_side(server, tiny, tiny_grm, tmp_path):
    """A checkpoint answers and a GRM judges, each with the template it was trained with; a resumed run is the same."""
    write_rows(str(tmp_path / "prompts.jsonl"), read_rows(str(tiny / "prompts.jsonl"), "prompt")[:8])
    flags = ["--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 16, "--answer-template", tiny / "answer.txt"]
    flags += ["--models", f"tiny={tiny / 'checkpoint'}", f"{server.url}#a", "--scorer", f"{server.url}#a"]
    flags += ["--judge", f"grm={tiny_grm / 'model'}", "--judge-max-new-tokens", 64, "--answers-per-model", 2]
    kinds = ("Plan a trip with tea.", "There are many options for a trip, it depends.")  # as the GRM knows them
    server.fault = lambda r, text: None if FORM.search(text) else (200, {"content": kinds[r["seed"] % 2]})
    run(*flags, "--out", tmp_path / "one", "--attempts", 2)
    rows = [json.loads(line) for line in (tmp_path / "one" / "annotate" / "answers.jsonl").read_text().splitlines()]
    lost = dropped(tmp_path / "one", "answers")  # random weights seldom end by themselves
    assert len(rows) + len(lost) == 8 * 4 and {row["cause"] for row in lost} <= {"unparsable", "duplicate"}
    assert Counter(row["model"] for row in rows)["a"] > 8  # two of each prompt, where they differ
    judged = read_rows(str(tmp_path / "one" / "judgements.jsonl"), "judgement")
    assert {row["judge"] for row in judged} == {"grm"} and {row["critique"] for row in judged}
    kept = journal(tmp_path / "one")
    (tmp_path / "two" / "journal").mkdir(parents=True)
    half = "".join(json.dumps(row) + "\n" for row in kept[: len(kept) // 2])
    (tmp_path / "two" / "journal" / "replies.0.jsonl").write_text(half + '{"made_by": "torn')
    run(*flags, "--out", tmp_path / "two", "--attempts", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_generated_world(tmp_path):
    """Without a server: the world's people, questions, answers of mixed quality, exact scores; an audit of them."""
    from random import Random

    people = [dict(persona=persona_world.sample_persona(Random(i))) for i in range(8)]
    write_rows(str(tmp_path / "people.jsonl"), people)
    more = ("--answers-per-model", 5, "--min-gap", 0.6, "--questions-per-persona", 2, "--audit-answers", 6)
    run("--personas", tmp_path / "people.jsonl", "--out", tmp_path / "out", *more, "--eval-share", 0.4)
    for name in ("judgements", "judgements_eval"):
        for row in read_rows(str(tmp_path / "out" / f"{name}.jsonl"), "judgement"):
            exact = persona_world.judge(row, row["answer"])
            assert row["critique"] == exact.critique and row["score"] == pytest.approx(
                3 + 0.4 * exact.score(), abs=0.006
            )
    asked = [
        row for n in ("train", "eval") for row in read_rows(str(tmp_path / "out" / f"prompts_{n}.jsonl"), "prompt")
    ]
    assert len(asked) + len(dropped(tmp_path / "out", "questions")) == 8 * 2 * 2
    audit = read_rows(str(tmp_path / "out" / "annotate" / "audit.jsonl"), "object")
    assert len(audit) == 6 * 3 and len({(row["answer"], row["repeat"]) for row in audit}) == 18


def test_the_first_own_experiment(server, tiny, tmp_path):
    """Every command of docs/own-experiment.md in its order, with another model, another address and smaller sizes."""
    page = read("docs/own-experiment.md")
    (table,) = re.findall(r"(?:^    .*,.*\n){13}", page, re.MULTILINE)
    (tmp_path / "asked.csv").write_text(re.sub(r"^    ", "", table, flags=re.MULTILINE))
    (tmp_path / "data").symlink_to(os.path.join(ROOT, "data"))
    answers = ["--answer-template", tiny / "answer.txt"]
    rl = ["--edit-template", tiny / "edit.txt", "--max-new-tokens", 8, "--judge-max-new-tokens", 16]
    small = {
        "sft.py": [*answers, "--max-steps", 1],
        "train_grm.py": ["--grm-template", tiny / "grm.txt", "--max-steps", 1],
        "ppo_cpe.py": [*answers, *rl, "--n-samples", 2, "--tokens-per-microbatch", 2000],
        "evaluate.py": ["--max-new-tokens", 8, "--bootstrap-draws", 20],
    }
    here = {"http://localhost:8000": server.url, "Qwen/Qwen2.5-0.5B-Instruct": str(tiny / "checkpoint")}
    for command in commands("docs/own-experiment.md"):
        for written, ours in here.items():
            command = command.replace(written, ours)
        script, *words = shlex.split(command)[1:]
        run_script(script, *words, *small.get(script, ()), folder=tmp_path)
    out = tmp_path / "out/own"
    assert len(read_rows(str(out / "cpe/metrics.jsonl"), "metrics")) == 2
    (functions,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)  # the same without a server
    (tmp_path / "rules.py").write_text(functions)
    (command,) = (c for c in commands("docs/own-experiment.md") if "annotate" in c)
    for flag, function in (("models", "answer"), ("scorer", "score"), ("judge", "judge")):
        command = command.replace(f"--{flag} http://localhost:8000#qwen", f"--{flag} rules.py:{function}")
    prompts = ["--prompts", out / "prompts_train.jsonl", "--eval-prompts", out / "prompts_eval.jsonl"]
    run_script(*shlex.split(command.replace("out/own", "out/ruled"))[1:], *prompts, folder=tmp_path)
    assert len(read_rows(str(tmp_path / "out/ruled/pairs.jsonl"), "pair")) >= 4
    assert (out / "cpe/report.html").is_file() and (out / "report.html").is_file()
    pairs = ["--data", out / "pairs.jsonl", "--batch-size", 2, "--max-steps", 1]
    run_script("dpo.py", "--model", out / "sft/policy", *pairs, "--out", tmp_path / "dpo")
    flags = ["--model", out / "sft/policy", "--prompts", out / "prompts_train.jsonl", "--prompts-per-step", 4]
    output = run_script("ppo_cpe.py", *flags, *rl, "--judge", out / "grm/model", "--out", tmp_path / "cpe", status=2)
    assert "not one of 8 answers got a judgement" in output and "The first: " in output


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prices", "c=1/2"], "--prices c=1/2: no model is called c; there are a, b, world"),
        (["--prices", "a=1"], "--prices a=1: expected NAME=IN/OUT, dollars for a million tokens"),
        (["--max-cost", "5"], "--max-cost: give --prices, or nothing is known to cost anything"),
        (["--requests-per-minute", "a=0"], "--requests-per-minute a=0: expected a positive number"),
        (["--models", "nowhere.py:f"], "nowhere.py: no such file"),
        (["--judge", "my.py"], "my.py: expected FILE.py:FUNCTION"),
        (["--judge", "pair:x"], "pair:x: it compares answers"),
        (["--models", "x=http://h1#q", "y=http://h2#q"], "x=http://h1#q and y=http://h2#q: both models are called q"),
        (["--models", "http://h1#q", "--scorer", "http://h2/v1#q"], "http://h1#q and http://h2/v1#q: both models"),
        (["--models", "x=http://h1#q", "x=http://h1#r"], "x=http://h1#q and x=http://h1#r: both models are called x"),
        (["--judge", "j=http://h1#q", "--audit-judges", "j=http://h2#r"], "both models are called j"),
        (["--models", "nowhere"], "nowhere"),
        (["--personas", "x.csv", "--eval-share", "1"], "--eval-share 1.0: expected a share in [0, 1)"),
        (["--eval-share", "0.3"], "--eval-share 0.3: only with --personas; the prompts of --prompts have their sides"),
        (["questions"], "questions: give --personas, for whom to write them"),
    ],
)
def test_wrong_flags(server, prompts, tmp_path, capsys, flags, message):
    assert message in error_of(annotate, capsys, *flags_for(server, prompts, tmp_path / "out"), *flags)
    assert server.asked == []


def test_held_out_prompts_beside_those_of_the_folder(server, prompts, tmp_path):
    out = tmp_path / "out"
    os.mkdir(out)
    os.rename(prompts, out / "prompts_train.jsonl")
    who = f"{server.url}#a"
    run("answers", "--out", out, "--eval-prompts", prompts.with_name("held_out.jsonl"), "--models", who)
    assert len({row["prompt_id"] for row in read_rows(str(out / "annotate" / "answers.jsonl"), "answer")}) == 12


def test_no_prompts(tmp_path, capsys):
    assert "no prompts: " in error_of(annotate, capsys, "--out", tmp_path)


OWN = """
from prompts import Judgement

def answer(row, seed):
    return f"{row['question']} Tea{'!' * (seed % 7)}"

def score(row, answer) -> float:
    return -10.0 if answer.endswith("Tea") else 10.0 * answer.count("!")

def judge(row, answer) -> Judgement | None:
    assert "critique" not in row  # an audit must not show it the first judgement
    return Judgement(f"Say less, {row['persona']['name']}.", 1, 2, -min(5, answer.count("!")))
"""


def test_functions_and_reward_models_annotate(prompts, tmp_path, capsys):
    """What judges in RL judges here, too: FILE.py:FUNCTION, and bt: for scores."""
    (tmp_path / "my.py").write_text(OWN)
    own = {name: f"{tmp_path}/my.py:{name}" for name in ("answer", "score", "judge")}
    flags = ["--prompts", prompts, "--models", own["answer"], "--answers-per-model", 4, "--judge", f"me={own['judge']}"]
    run(*flags, "--out", tmp_path / "out", "--scorer", own["score"], "--audit-answers", 2)
    pairs = read_rows(str(tmp_path / "out" / "annotate" / "pairs.jsonl"), "pair")
    assert pairs and all(p["chosen_score"] == 10 * p["chosen"].count("!") for p in pairs)
    scored = read_rows(str(tmp_path / "out" / "annotate" / "scores.jsonl"), "object")
    for pair in pairs:  # the two furthest apart
        of_prompt = [row["score"] for row in scored if row["prompt_id"] == pair["prompt_id"]]
        assert (pair["chosen_score"], pair["rejected_score"]) == (max(of_prompt), min(of_prompt))
    judged = read_rows(str(tmp_path / "out" / "annotate" / "judgements.jsonl"), "judgement")
    assert {row["judge"] for row in judged} == {"me"}
    assert all(row["critique"].startswith("Say less, Kim") for row in judged)
    audits = read_rows(str(tmp_path / "out" / "annotate" / "audit.jsonl"), "object")
    assert len(audits) == 6 and not any("failure" in row for row in audits)
    first = contents(tmp_path / "out")
    capsys.readouterr()
    run(*flags, "--out", tmp_path / "out", "--scorer", own["score"])
    assert "judgements: 0 requests to make" in capsys.readouterr().out and contents(tmp_path / "out") == first

    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    model = random_model(tiny_config(vocab_size=500, max_position_embeddings=2048), scalar_head=True)
    save_pretrained(model, str(tmp_path / "bt"), tokenizer)
    run(*flags, "--out", tmp_path / "out", "--scorer", f"bt:{tmp_path / 'bt'}", "--min-gap", 0)
    scores = [row["score"] for row in read_rows(str(tmp_path / "out" / "annotate" / "scores.jsonl"), "object")]
    assert len(set(scores)) > 12
    for flag, message in (("--judge", "writes no critiques"), ("--models", "scores answers, and writes none")):
        assert message in error_of(annotate, capsys, *flags, "--out", tmp_path / "x", flag, f"bt:{tmp_path / 'bt'}")


def test_questions_of_a_function():
    """A list, whose texts are left as they are, or a text in a language model's form."""
    assert annotate.function_questions(json.dumps(["Why?\n- tea", "2. When?"])) == ["Why?\n- tea", "2. When?"]
    assert annotate.function_questions("<questions>\n1. Why?\n</questions>") == ["Why?"]
    assert annotate.function_questions("Why?") is None


def test_a_scorer_that_raises_once_costs_no_answer(prompts, tmp_path, capsys):
    """The run ends, and the same command goes on."""
    fault = tmp_path / "fault"
    scoring = f"    assert not open({str(fault)!r}).read()\n    return -10.0"
    (tmp_path / "my.py").write_text(OWN.replace("    return -10.0", scoring))
    own = {name: f"{tmp_path}/my.py:{name}" for name in ("answer", "score", "judge")}
    flags = ["--prompts", prompts, "--models", own["answer"], "--scorer", own["score"], "--judge", own["judge"]]
    flags += ["--answers-per-model", 4]
    fault.write_text("no connection")
    assert "AssertionError" in error_of(annotate, capsys, *flags, "--out", tmp_path / "out")
    fault.write_text("")
    for out in ("out", "whole"):
        run(*flags, "--out", tmp_path / out)
    files = [(tmp_path / out / "annotate" / "pairs.jsonl").read_text() for out in ("out", "whole")]
    assert files[0] == files[1] != ""


def test_an_answer_that_another_pair_keeps_is_not_dropped(prompts, tmp_path):
    """Two of three answers tie, and each differs from the third; two others have only their tie."""
    (tmp_path / "my.py").write_text(OWN.replace('-min(5, answer.count("!"))', 'int("!" in answer)'))
    prompt = read_rows(str(prompts), "prompt")[0]
    texts = {"x": ["a", "b", "!"], "y": ["a", "b"]}
    pairs = [
        prompt
        | dict(prompt_id=prompt_id, question=f"{prompt_id}?", chosen=one, rejected=other)
        | dict(chosen_score=2, rejected_score=1, chosen_model="m", rejected_model="m")
        for prompt_id, of_prompt in texts.items()
        for one, other in itertools.combinations(of_prompt, 2)
    ]
    out = tmp_path / "out"
    os.makedirs(out / "annotate")
    write_rows(str(out / "annotate" / "pairs.jsonl"), pairs)
    run("judgements", "--out", out, "--judge", f"me={tmp_path}/my.py:judge")
    kept = read_rows(str(out / "annotate" / "judgements.jsonl"), "judgement")
    assert [(row["prompt_id"], row["answer"]) for row in kept] == [("x", "a"), ("x", "b"), ("x", "!")]
    assert [(r["cause"], r["prompt_id"], r["answer"]) for r in dropped(out, "judgements")] == [
        ("tie", "y", "a"),
        ("tie", "y", "b"),
    ]


def test_gaps_are_exact():
    assert annotate.gap([{"score": 2.4}, {"score": 4.4}]) == 2 < 4.4 - 2.4


def test_a_function_that_writes_a_tag_of_the_form_is_named(prompts, tmp_path, capsys):
    (tmp_path / "my.py").write_text(OWN.replace("Say less", "Say <scores> less"))
    own = {name: f"{tmp_path}/my.py:{name}" for name in ("answer", "score", "judge")}
    flags = ["--prompts", prompts, "--models", own["answer"], "--answers-per-model", 4, "--scorer", own["score"]]
    error = error_of(annotate, capsys, *flags, "--judge", f"me={own['judge']}", "--out", tmp_path / "out")
    assert error.startswith("error: me: a judgement needs a critique without the tags")


def test_the_world_knows_only_itself(prompts, tmp_path, capsys):
    message = error_of(annotate, capsys, "--prompts", prompts, "--out", tmp_path / "out")
    assert "world: ValueError: question 'What about 0?': the exact judge knows only the questions of" in message


def test_a_digest_is_of_the_request_alone():
    """Not of who asks, when, or what a server is called: another address or another name goes on with the journal."""
    model = ask.Model("x", GenerativeJudge, "http://one#m", "m", None, prices=(1.0, 2.0))
    other = ask.Model("y", GenerativeJudge, "http://two#m", "m", None)
    settings = dict(temperature=0.9, top_p=1.0, max_tokens=5, seed=1)
    key = ask.Request(model, "answer", "text", settings, str, {}).key
    assert key == ask.Request(other, "answer", "text", settings, len, {"row": 1}).key
    assert key != ask.Request(other, "answer", "text", settings | {"seed": 2}, str, {}).key
    assert len(key) == 64  # sha256
    function = ask.Model("z", FunctionJudge, "my.py:f", "m", None)
    of_row = [ask.Request(function, "answer", "text", settings, str, {"row": i}).key for i in range(2)]
    assert len({key, *of_row}) == 3  # a function may read all of the row
