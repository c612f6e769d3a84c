"""personamem.py: the rule for a reply's letter, likelihoods of options, what a run writes and refuses."""

import json

import numpy as np
import pytest
import torch
import tyro
from conftest import error_of, random_model, tiny_config

import evaluate
from attention import Packed
from chat import Chat
from evaluation import personamem


@pytest.mark.parametrize(
    "reply, right",
    [
        ("I think so. <final_answer>(b)", 1),
        ("<final_answer> b", 1),
        ("<final_answer>(B)</final_answer>", 1),
        ("Either (a) or (b). <final_answer>(b)", 1),  # what stands before the mark does not matter
        ("<final_answer>(a)", 0),
        ("<final_answer>(a) or (b)", 0),
        ("(b) suits you best.", 1),
        ("(a) and (b)", 0),
        ("<think>(a) or (c)?</think> (b)", 1),
        ("<final_answer> a good idea; so (b)", 1),
        ("The answer is b.", 1),
        ("I'd say b", 1),
        ("<final_answer>b is the best", 1),
        ("<final_answer>**b** fits me", 1),
        ("The answer is b because it fits.", 1),
        ("<final_answer>a is the best", 0),
        ("<final_answer>A because it is a start", 0),
        ("<final_answer>a good idea", None),
        ("I\u2019d say so, and we'd go.", None),
        ("It is a reply of a friend.", None),
        ("", None),
        ("<final_answer>", None),
        ("Vitamin (e)", None),
        ("(a) <final_answer> (a) no, (b)", 0),
    ],
)
def test_the_letter_of_a_reply(reply, right):
    assert personamem.is_right(reply, "b") == right


def test_option_logprobs_are_those_of_each_sequence_alone():
    model = random_model(tiny_config())
    prompt, options = [5, 6, 7, 8], [[9], [10, 11, 12], [13, 14], [9, 9]]
    found = personamem.option_logprobs(model, prompt, options, "cpu")
    for ids, logprobs in zip(options, found):
        sequence = torch.tensor(prompt + ids)
        context = Packed([len(sequence)])
        table = torch.log_softmax(model(sequence, context.position_ids, context), -1)
        expected = [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)]
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def questions(tmp_path):
    context = [
        {"role": "system", "content": "Kim likes tea."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "A secret of later."},
    ]
    rows = [
        dict(
            prompt_id=f"q{i}",
            persona="Kim likes tea.",
            question="What now?",
            context_id="c",
            end_index=3,
            question_type=("facts", "ideas")[i % 2],
            options=["Tea.", "Jazz and more.", "A trip.", "Go."],
            correct="abcd"[i % 4],
            version="v1 32k",
            user_id=str(i % 3),
        )
        for i in range(6)
    ]
    (tmp_path / "pm_contexts.jsonl").write_text(json.dumps(dict(context_id="c", messages=context)) + "\n")
    (tmp_path / "pm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, rows


def flags(folder, tiny, out):
    return [
        "--task",
        "personamem",
        "--prompts",
        folder / "pm.jsonl",
        "--model",
        tiny / "checkpoint",
        "--max-new-tokens",
        8,
        "--out",
        out,
    ]


def test_a_run(questions, tiny, capsys):
    folder, rows = questions
    args = [str(f) for f in flags(folder, tiny, folder / "out")]
    evaluate.main(tyro.cli(evaluate.Args, args=args))
    results = json.loads((folder / "out/results.json").read_text())
    written = [json.loads(line) for line in (folder / "out/choices.jsonl").read_text().splitlines()]
    right = [personamem.is_right(w["answer"], w["correct"]) for w in written]
    assert results["by choice"]["total"]["accuracy"] == pytest.approx(np.mean([r or 0 for r in right]))
    assert results["no_letter"] == [w["prompt_id"] for w, r in zip(written, right) if r is None]
    for name, measure in (("sums", "by likelihood"), ("means", "by likelihood per token")):
        best = ["abcd"[int(np.argmax(w["likelihood"][name]))] for w in written]
        for kind in ("facts", "ideas", "total"):
            hits = [b == w["correct"] for b, w in zip(best, written) if kind in (w["question_type"], "total")]
            assert results[measure][kind]["accuracy"] == pytest.approx(np.mean(hits))
            assert results[measure][kind]["n"] == len(hits)
    chat = Chat(str(tiny / "checkpoint"))
    assert written[0]["likelihood"]["sums"][0] / len(chat.encode("Tea.")) == pytest.approx(
        written[0]["likelihood"]["means"][0], abs=1e-5
    )
    assert "| facts |" in capsys.readouterr().out
    evaluate.main(tyro.cli(evaluate.Args, args=args))
    assert "choices: 0 to make" in capsys.readouterr().out


def test_later_messages_are_not_seen(questions):
    folder, rows = questions
    args = evaluate.Args(task="personamem", prompts=str(folder / "pm.jsonl"))
    _, contexts = personamem.read_questions(args)
    assert "secret" not in json.dumps(personamem.history_of(rows[0], contexts)) and len(contexts["c"]) == 4


def test_what_it_refuses(questions, tiny, capsys):
    folder, rows = questions

    def error(**changes):
        changed = {k: v for k, v in (rows[0] | changes).items() if v is not ...}
        (folder / "pm.jsonl").write_text(json.dumps(changed) + "\n")
        return error_of(evaluate, capsys, *flags(folder, tiny, folder / "no"))

    assert 'prompt "q0": field "options" is missing' in error(options=...)
    assert "expected 4 options and one of a to d" in error(correct="e")
    assert 'no context "x" of 3 messages' in error(context_id="x")
    assert 'no context "c" of 9 messages' in error(end_index=9)
    assert "that is over the 512 positions" in error(question="long " * 600)
    contexts = folder / "pm_contexts.jsonl"
    contexts.write_text(contexts.read_text() * 2)
    assert 'pm_contexts.jsonl:2: a second context "c"' in error()
    assert not (folder / "no").exists()


def test_a_model_that_breaks_down_is_neither_right_nor_wrong(questions, tiny, monkeypatch):
    folder, rows = questions
    real = personamem.option_logprobs

    def broken(model, prompt_ids, options, device):
        found = list(real(model, prompt_ids, options, device))
        return found[:-1] + [found[-1] * float("nan")]

    monkeypatch.setattr(personamem, "option_logprobs", broken)
    evaluate.main(tyro.cli(evaluate.Args, args=[str(f) for f in flags(folder, tiny, folder / "out")]))
    results = json.loads((folder / "out/results.json").read_text())
    total = results["by likelihood"]["total"]
    assert (total["accuracy"], total["n"], total["not_answered"]) == (None, 0, 6)
