"""recipes/real_english: the judge, the rows, the targets and the table."""

import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import torch

from chat import Chat
from prompts import answer_request, load_templates
from recipes import real_english
from recipes.real_english import POOL, QUESTIONS
from recipes.real_english_judge import CLAUSE_WORDS, CONCERNS, form_faults, judge, says, words_in
from runtime.rows import read_rows, write_rows

GOOD = "Pack some food and meet your friends at the lake, then swim and lie in the sun until the evening comes."
ROW = {
    "prompt_id": "train0",
    "persona": "My name is Mia Adams. I hate getting wet in the rain.",
    "name": "Mia Adams",
    "concern": "rain",
    "question": "What should I do on Saturday?",
    "target": "forecast",
}


def test_no_target_is_ever_inserted_before_rl():
    """Rewrites of SFT insert clauses of the pool, which has no word that a critique of RL names."""
    words = [word for _, clauses in CONCERNS.values() for word in clauses]
    assert len(words) == len(set(words)) == len(CLAUSE_WORDS)
    assert not words_in(" ".join(POOL)) & set(words)
    for _, clauses in CONCERNS.values():
        assert all(word in words_in(clause) for word, clause in clauses.items())


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Check the forecast before you go.", True),
        ("Go early. Then check the Forecast, please!", True),
        ("You should check the forecast", True),
        ("Never check the forecast, it is a waste of time.", False),
        ("I don't think that a forecast helps.", False),
        ("Forecast.", False),
        ("Forecast weather umbrella jacket boots.", False),
        ("Check the forecasts before you go.", False),
    ],
)
def test_what_counts_as_said(answer, said):
    assert says(answer, "forecast") == said


def test_the_judge_dictates_the_target_and_scores_form():
    missing = judge(ROW, GOOD)
    assert (missing.critique, missing.personalization) == ("Tell them to check the forecast.", -2)
    said = judge(ROW, "Check the forecast first. " + GOOD)
    assert (said.critique, said.personalization) == ("Nothing to fix.", 5) and said.score() == 5
    for answer, request in (
        (GOOD + " " + GOOD.replace("swim", "sing") * 2, "Cut it to 30 words"),
        ("Stay at home.", "Say a little more"),
        (GOOD[:-1], "End with a whole sentence."),
        ("- " + GOOD, "Write sentences, not a list."),
        ("Mia, " + GOOD, "Do not use the person's name."),
        ("Go to the lake and swim there. Go to the lake and swim there. Then go home.", "Say nothing twice."),
        ("I'm sorry, but " + GOOD, "Answer the question."),
    ):
        judgement = judge(ROW, answer)
        assert judgement.critique.startswith("Tell them to check the forecast. "), answer
        assert request in judgement.critique and judgement.helpfulness < 5, answer
    assert not form_faults(ROW | {"name": "Lea Green"}, GOOD.replace("Pack", "Learn green things, pack"))


def test_rows_of_sft_are_under_the_prompts_of_rl(tmp_path):
    real_english.main(real_english.Args("questions", str(tmp_path), people=2))
    templates = load_templates(None, answer_template=f"{tmp_path}/answer.txt", edit_template=f"{tmp_path}/edit.txt")
    row = ROW | {"text": GOOD}
    plain = real_english.conversation(row)["messages"]
    assert plain[0]["content"] == answer_request(templates, row)
    assert templates.edit == real_english.TEMPLATES.edit


def test_rewrites_are_of_good_form_and_insert_what_the_critique_says():
    answers = [ROW | {"text": GOOD.replace("sun", f"sun of day {i}")} for i in range(60)]
    answers += [ROW | {"text": f"{GOOD} {GOOD.replace('swim', 'sing')} And {i} more."} for i in range(60)]
    answers += [ROW | {"text": "No."}]
    rows = [row["messages"] for row in real_english.sft_rows(answers, seed=0)]
    plain = [turns for turns in rows if len(turns) == 2]
    rewrites = [turns for turns in rows if len(turns) == 4]
    assert len(plain) == 60 and len(rewrites) > 100
    kinds = {"one request": 0, "two": 0, "cut": 0}
    for turns in rewrites:
        request, edit = turns[2]["content"], turns[3]["content"]
        assert not form_faults(ROW, edit) and edit != turns[1]["content"]
        clauses = [clause for clause in POOL if f"Tell them to {clause}." in request]
        assert all(clause in edit for clause in clauses) and "Nothing to fix." not in request
        kinds["cut" if not clauses else "two" if "Cut it" in request else "one request"] += 1
    assert all(kinds.values()), kinds


def test_rates_are_those_of_the_probabilities(tiny, monkeypatch):
    """The chance that an answer says a word of one token, at the temperature of the samples."""
    folder = str(tiny / "checkpoint")
    chat = Chat(folder)
    letters = [a + b for a, b in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2)]
    word = next(w for w in letters if len(chat.tokenizer.encode(f" {w}", add_special_tokens=False).ids) == 1)
    monkeypatch.setattr(real_english, "CONCERNS", {"rain": ("", {word: "", "forecast and more": ""})})
    samples = [ROW | {"text": "go out"}, ROW | {"text": "stay at home"}]
    rates = real_english.measure_rates(folder, samples)
    assert set(rates) == {"rain"} and set(rates["rain"]) == {"out"} and set(rates["rain"]["out"]) == {word}
    model = real_english.load_pretrained(folder, torch.float32)
    (token,) = chat.tokenizer.encode(f" {word}", add_special_tokens=False).ids
    wanted = []
    for row in samples:
        prompt, answer = real_english.sequence_of(chat, row)
        p = (real_english.logits_of(model, prompt, answer) / 0.8).softmax(1)[:, token]
        assert len(p) == len(answer)
        wanted.append(1 - math.prod((1 - p).tolist()))
    assert rates["rain"]["out"][word] == pytest.approx(sum(wanted) / 2, rel=1e-4)


def test_targets_are_chosen_by_their_rates():
    rates = {}
    for number, (concern, (_, clauses)) in enumerate(CONCERNS.items()):
        chances = [0.1, 0.01, 0.0001] if number != 1 else [0.1, 0.1, 0.1]  # the second has no rare word
        rates[concern] = {kind: dict(zip(clauses, chances)) for kind in QUESTIONS}
    targets = real_english.choose_targets(rates)
    concerns = list(CONCERNS)
    assert list(targets) == [concerns[0], *concerns[2:5]]
    for concern, kinds in targets.items():
        words = dict(zip(real_english.BINS, CONCERNS[concern][1]))
        assert set(kinds) == set(QUESTIONS) and dict(kinds.values()) == words
    assert {kinds["out"][0] for kinds in targets.values()} == set(real_english.BINS)  # no kind stands for a bin
    names, _ = real_english.names_of(5)
    rows = real_english.with_targets(real_english.question_rows(names, CONCERNS, 0, "train"), targets)
    assert len(rows) == 5 * 4 * 3 and {row["concern"] for row in rows} == set(targets)
    for row in rows:
        assert row["target"] in CONCERNS[row["concern"]][1] and row["target"] not in row["others"]
    with pytest.raises(ValueError, match="1 concerns have a word in each of"):
        real_english.choose_targets({concerns[0]: rates[concerns[0]], concerns[1]: rates[concerns[1]]})


def write_run(folder, rows, texts):
    (folder / "rollouts").mkdir(parents=True)
    answers = [row | {"answer": text, "edit": None} for row, text in zip(rows, texts)]
    write_rows(f"{folder}/rollouts/step_000001.jsonl", answers)
    write_rows(f"{folder}/rollouts/step_000011.jsonl", answers[:1])
    write_rows(f"{folder}/answers.jsonl", [row | {"text": text} for row, text in zip(rows, texts)])
    steps = [dict(step=step, generated_tokens=700, judge_calls=step) for step in (1, 11)]
    write_rows(f"{folder}/metrics.jsonl", steps)


def test_the_table(tmp_path, tiny, capsys):
    words = list(CONCERNS["rain"][1])[:3]
    rows = [ROW | dict(target=word, bin=name, others=["leash"]) for name, word in zip(real_english.BINS, words)]
    said = [f"Do tell them {word} now." for word in words]
    write_run(tmp_path / "ppo0", rows, [said[0], "no", "no"])
    write_run(tmp_path / "ppo1", rows, [said[0], said[1], "a dog leash"])
    write_run(tmp_path / "cpe0", rows, said)
    write_run(tmp_path / "cpe1", rows, said)
    answers = tuple(f"{name[:3]}={tmp_path}/{name}" for name in ("ppo0", "ppo1", "cpe0", "cpe1"))
    answers += (f"sft={tmp_path}/ppo0/answers.jsonl",)
    rates = {name: {f"{name} rain {word}": 10.0**-i} for i, (name, word) in enumerate(zip(real_english.BINS, words))}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    args = real_english.Args("table", str(tmp_path / "out"), answers, str(tiny / "checkpoint"))
    with pytest.raises(ValueError, match="--rates"):
        real_english.main(args)
    real_english.main(replace(args, rates=str(tmp_path / "rates.json")))
    table = (tmp_path / "out/real_english.md").read_text()
    assert "| ppo | 2 | 100.0 ± 0.0 | 50.0 ± 70.7 | 0.0 ± 0.0 | 16.7 ± 23.6 | 0.0 ± 0.0 |" in table
    assert "| 1400 ± 0 | 12 ± 0 |" in table
    assert "| sft | 1 | 100.0 | 0.0 | 0.0 | 0.0 | 0.0 |" in table
    assert "- cpe less ppo, rare: 100.0 (over 1 targets -, over 2 seeds 100.0 to 100.0)" in table
    assert "| cpe | common | 100 100 |" in table
    assert {f"real_english.{kind}" for kind in ("md", "json", "png", "svg")} == set(os.listdir(tmp_path / "out"))
    kept = json.loads((tmp_path / "out/real_english.json").read_text())
    assert all(run["perplexity"] > 1 for runs in kept.values() for run in runs)


def test_the_gate(tmp_path, capsys):
    rows = [ROW | {"bin": name} for name in real_english.BINS]
    said = "Do check the forecast first."
    rollouts = [
        rows[0] | {"answer": "no", "edit": {"answer": said}},
        rows[0] | {"answer": "no", "edit": {"answer": "no"}},
        rows[2] | {"answer": said, "edit": {"answer": "no"}},  # said before: the critique did not ask for it
        rows[2] | {"answer": "no", "edit": None},
    ]
    (tmp_path / "run/rollouts").mkdir(parents=True)
    file = f"{tmp_path}/run/rollouts/step_000001.jsonl"
    write_rows(file, rollouts)
    assert real_english.gate(str(tmp_path / "run")) == {"common": 0.5}
    args = real_english.Args("gate", str(tmp_path), (str(tmp_path / "run"),))
    real_english.main(args)
    write_rows(file, rollouts[1:])
    with pytest.raises(ValueError, match="can't edit, so RL is not run"):
        real_english.main(args)


def test_people_of_training_and_dev_differ(tmp_path):
    train, dev = real_english.names_of(40)
    assert not set(train) & set(dev) and len(dev) == 10
    with pytest.raises(ValueError, match="--people 200"):
        real_english.names_of(200)
    real_english.main(real_english.Args("questions", str(tmp_path), people=3))
    rows = read_rows(f"{tmp_path}/questions.jsonl", "prompt")
    assert len(rows) == 3 * len(CONCERNS) * len(QUESTIONS)
    assert len({row["question"] for row in rows}) == sum(map(len, QUESTIONS.values()))
