"""recipes/real_english: the judge, the rows and the table; the recipe itself with a tiny model."""

import json
import re
from random import Random

import pytest

from recipes import real_english
from recipes.real_english import CONCERNS, POOL, QUESTIONS
from runtime.rows import read_rows, write_rows

GOOD = "Pack some food and meet your friends at the lake, then swim and rest in the sun until the evening comes."
ROW = {
    "prompt_id": "train0",
    "persona": "My name is Mia Adams. I hate getting wet in the rain.",
    "name": "Mia Adams",
    "concern": "rain",
    "question": "What should I do on Saturday?",
}


def test_no_target_is_ever_inserted_before_rl():
    """Rewrites of SFT insert clauses of the pool, which has no word that a critique of RL names."""
    words = [word for _, clauses in CONCERNS.values() for word in clauses]
    assert len(words) == len(set(words)) == len(real_english.CONCERN_OF)
    assert not real_english.words_in(" ".join(POOL)) & set(words)
    for _, clauses in CONCERNS.values():
        assert all(word in real_english.words_in(clause) for word, clause in clauses.items())
        for clause in clauses.values():  # and no clause serves another concern
            assert len(real_english.concerns_served(clause)) == 1, clause


def test_the_judge_dictates_the_target_and_scores_form():
    row = ROW | {"target": "forecast"}
    missing = real_english.judge(row, GOOD.replace("rest", "lie"))
    assert missing.critique == "Tell them to check the forecast."
    said = real_english.judge(row, "Check the forecast first. " + GOOD.replace("rest", "lie"))
    assert (said.critique, said.personalization) == ("Nothing to fix.", 5) and said.score() == 5
    assert real_english.judge(row, GOOD).personalization == missing.personalization - 2  # "rest" is for a bad back
    for answer, request in (
        (GOOD + " " + GOOD.replace("swim", "sing") * 2, "Cut it to 30 words"),
        ("Stay at home.", "Say a little more"),
        (GOOD[:-1], "End with a whole sentence."),
        ("- " + GOOD, "Write sentences, not a list."),
        ("Mia, " + GOOD, "Do not use the person's name."),
        ("Go to the lake and swim there. Go to the lake and swim there. Then go home.", "Say nothing twice."),
    ):
        judgement = real_english.judge(ROW, answer)
        assert request in judgement.critique and judgement.helpfulness < 5, answer


def test_rows_of_sft_rewrite_and_cut():
    answers = [ROW | {"text": GOOD.replace("sun", f"sun of day {i}")} for i in range(60)]
    answers += [ROW | {"text": f"{GOOD} {GOOD.replace('swim', 'sing')} And {i} more."} for i in range(5)]
    answers += [ROW | {"text": "No."}]
    rows = real_english.sft_rows(answers, seed=0)
    plain = [row["messages"] for row in rows if len(row["messages"]) == 2]
    rewrites = [row["messages"] for row in rows if len(row["messages"]) == 4]
    assert len(rows) == 60 and 20 < len(plain) < 40  # two such sentences are too long, so those can't be cut
    inserted = [turns for turns in rewrites if turns[2]["content"].startswith("Tell them to")]
    same = [turns for turns in rewrites if turns[2]["content"].startswith("Nothing to fix.")]
    assert len(inserted) > len(same) > 0 and len(inserted) + len(same) == len(rewrites)
    for turns in inserted:
        clause = re.match(r"Tell them to (.*?)\.", turns[2]["content"])[1]
        assert clause in POOL and clause in turns[3]["content"] and clause not in turns[1]["content"]
    assert all(turns[3] == turns[1] for turns in same)
    short = "Swim in the lake and lie in the sun until the evening."
    cut = real_english.sft_rows([ROW | {"text": f"{short} {short.replace('lake', 'sea')} {short}"}], seed=0)
    assert cut[0]["messages"][3]["content"] == f"{short} {short.replace('lake', 'sea')}"


def test_targets_are_chosen_by_their_rates():
    """Of a concern's words, the one said in 5 % of samples is common, in 1 % middle, never rare."""
    rng = Random(0)
    samples = []
    for row in real_english.question_rows(real_english.names_of(100)[0], 0, "train"):
        common, middle = list(CONCERNS[row["concern"]][1])[:2]
        text = common if rng.random() < 0.05 else middle if rng.random() < 0.01 else "nothing"
        samples.append(row | {"text": text})
    targets = real_english.choose_targets(samples, 0)
    for concern, kinds in targets.items():
        assert set(kinds) == set(QUESTIONS)
        assert {name for name, _ in kinds.values()} == set(real_english.BINS)
        assert len({word for _, word in kinds.values()}) == 3
        rare = next(word for name, word in kinds.values() if name == "rare")
        assert real_english.says([row for row in samples if row["concern"] == concern], rare) == 0
    by_kind = [kinds["out"][0] for kinds in targets.values()]
    assert set(by_kind) == set(real_english.BINS)  # no kind of question stands for a bin
    aimed = real_english.with_targets(samples, targets)
    assert all(row["target"] in CONCERNS[row["concern"]][1] for row in aimed)


def test_the_table_and_the_gate(tmp_path, capsys):
    rows = [ROW | {"target": word, "bin": name} for name, word in zip(real_english.BINS, CONCERNS["rain"][1])]
    for number, texts in enumerate((["weather", "no", "no"], ["weather", "umbrella", "dog leash"])):
        write_rows(f"{tmp_path}/{number}.jsonl", [row | {"text": text} for row, text in zip(rows, texts)])
    answers = (f"ppo={tmp_path}/0.jsonl", f"ppo={tmp_path}/1.jsonl", f"sft={tmp_path}/0.jsonl")
    real_english.main(real_english.Args("table", str(tmp_path / "out"), answers))
    table = (tmp_path / "out/real_english.md").read_text()
    assert "| ppo | 2 | 100.0 ± 0.0 | 50.0 ± 70.7 | 0.0 ± 0.0 | 16.7 ± 23.6 |" in table
    assert "| sft | 1 | 100.0 | 0.0 | 0.0 | 0.0 |" in table
    assert len(json.loads((tmp_path / "out/real_english.json").read_text())["ppo"]) == 2
    rollouts = [
        rows[0] | {"answer": "no", "edit": {"answer": "the weather"}},
        rows[0] | {"answer": "no", "edit": {"answer": "no"}},
        rows[2] | {"answer": "indoors", "edit": {"answer": "no"}},  # said before: the critique did not ask for it
        rows[2] | {"answer": "no", "edit": None},
    ]
    (tmp_path / "run/rollouts").mkdir(parents=True)
    write_rows(f"{tmp_path}/run/rollouts/step_000001.jsonl", rollouts)
    assert real_english.gate(str(tmp_path / "run")) == {"common": 0.5}


def test_people_of_training_and_dev_differ(tmp_path):
    train, dev = real_english.names_of(40)
    assert not set(train) & set(dev) and len(dev) == 10
    with pytest.raises(ValueError, match="--people 200"):
        real_english.names_of(200)
    real_english.main(real_english.Args("questions", str(tmp_path), people=3))
    assert len(read_rows(f"{tmp_path}/questions.jsonl", "prompt")) == 3 * len(CONCERNS)
