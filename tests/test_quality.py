"""data/quality.py: figures of the quality sheet by hand; report.py draws it."""

import json
from random import Random

import pytest
from browser import MISSING, Browser
from test_annotate import run
from test_report import data_of, made

from data import persona_world, quality
from prompts import Judgement
from runtime.rows import write_rows

WEIGHTS = (0.35, 0.40, 0.25)


def judged(prompt_id, judge, repeat, scores, answer="An answer."):
    names = ("helpfulness", "personalization", "naturalness")
    row = dict(prompt_id=prompt_id, answer=answer, judge=judge, repeat=repeat)
    return row | ({"failure": "unparsable"} if scores is None else {"critique": "Less.", **dict(zip(names, scores))})


def test_stability_is_over_repeats_of_the_same_answer():
    """Deviations by hand: of 1, 3 (n - 1) the root of 2; a judgement that failed is none, and no zero."""
    audit = [judged("p", "j", i, s) for i, s in enumerate([(1, 0, 2), (3, 0, 2), None])]
    audit += [judged("q", "j", i, (4, 4, 4)) for i in range(3)]
    audit += [judged("r", "j", i, s) for i, s in enumerate([(5, 5, 5), None, None])]  # once: says nothing of repeats
    figures = quality.stability(audit, WEIGHTS)["j"]
    assert (figures["answers"], figures["judgements"], figures["failed"]) == (2, 6, 3) and figures["same"] == 0.5
    assert figures["sd"]["helpfulness"] == pytest.approx(2**0.5 / 2)
    assert figures["sd"]["personalization"] == 0 and figures["sd"]["weighted"] == pytest.approx(0.35 * 2**0.5 / 2)


def test_agreement_of_judges_and_of_one_with_itself():
    """Quadratic kappa by hand, 1 - sum w observed / sum w by chance, for scores (0, 2, 4) against (0, 2, 2)."""
    audit = [judged(p, "a", 0, (s, s, 1)) for p, s in zip("pqr", (0, 2, 4))]
    audit += [judged(p, "a", 1, (s, s, 1)) for p, s in zip("pqr", (0, 2, 4))]
    audit += [judged(p, "b", 0, (s, s, 1)) for p, s in zip("pqr", (0, 2, 2))]
    twice, both = quality.agreement(audit, WEIGHTS)
    assert twice["judges"] == "a, twice" and twice["kappa"]["helpfulness"] == 1 and twice["pearson"] == pytest.approx(1)
    # observed: one pair differs by 2: 4 / 3; by chance: mean of (x - y)^2 over all nine: (0+4+4 + 4+0+0 + 16+4+4) / 9
    assert both["judges"] == "a and b" and both["answers"] == 3
    assert both["kappa"]["helpfulness"] == pytest.approx(1 - (4 / 3) / (36 / 9))
    assert both["kappa"]["naturalness"] is None  # both say 1 throughout: no agreement beyond chance to speak of
    assert both["spearman"] == pytest.approx(3**0.5 / 2)


def test_order_of_pairs_is_the_judges():
    """A judge that says p and q as the overall scores do, and r the other way round; of s one side was lost."""

    def pair(prompt_id, chosen, rejected):
        return dict(prompt_id=prompt_id, chosen="A", rejected="B", chosen_score=chosen, rejected_score=rejected)

    def all_equal(score):
        return Judgement("Less.", score, score, score)

    pairs = [pair("p", 9, 1), pair("q", 8, 2), pair("r", 7, 3), pair("s", 9, 1)]
    scores = dict(p=(5, 1), q=(4, 2), r=(2, 4), s=(5, None))
    judged = {(p, side): all_equal(x) for p, both in scores.items() for side, x in zip("AB", both) if x is not None}
    found = quality.order(pairs, judged, WEIGHTS)
    assert found["pairs"] == 3 and found["same"] == pytest.approx(2 / 3)
    # overall 9 1 8 2 7 3 against 5 1 4 2 2 4: sums of products of deviations 18, of squares 58 and 12
    assert found["pearson"] == pytest.approx(18 / (58 * 12) ** 0.5)
    assert quality.order([], judged, WEIGHTS) == dict(pairs=0, same=None, pearson=None, spearman=None)


def test_copies_and_leaks():
    def row(name, question):
        return dict(
            persona={"name": name, "note": "likes the sea, old trains and long evenings with friends"},
            question=question,
        )

    long = "How do I plan a weekend in the mountains with two small children and a dog?"
    train = [row("Ada", long), row("Ben", "What is tea?"), row("Cem", "Which bread keeps longest?")]
    held_out = [row("Ada", "What is  TEA?"), row("Dora", long.replace("two", "2")), row("Eve", "Who sells boats?")]
    found = quality.copies(train, held_out)
    assert found["questions"] == 6 and found["distinct_questions"] == 5
    assert found["similar_questions"] == pytest.approx(2 / 5)  # the weekend, twice
    assert found["personas_on_both_sides"] == 1
    assert found["held_out_questions_of_training"] == pytest.approx(1 / 3)
    assert found["similar_to_training"] == pytest.approx(1 / 2)  # of the weekend and the boats
    assert quality.copies(train, [])["personas_on_both_sides"] == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of the generated world, as data/annotate.py leaves it."""
    out = tmp_path_factory.mktemp("annotated")
    people = [dict(persona=persona_world.sample_persona(Random(i))) for i in range(6)]
    write_rows(str(out / "people.jsonl"), people)
    more = ("--answers-per-model", 5, "--min-gap", 0.6, "--audit-answers", 5, "--eval-share", 0.4)
    run("--personas", out / "people.jsonl", "--out", out, *more, "--questions-per-persona", 2)
    return out


def test_copies_in_large_data_are_not_missed(monkeypatch):
    """Each text has one near copy: whatever sample is compared, all of it is similar."""
    monkeypatch.setattr(quality, "DRAWN", 20)
    rng = Random(0)
    texts = [" ".join("".join(rng.choices("abcdefghijklmnopqrst", k=6)) for _ in range(8)) for _ in range(200)]
    assert quality.similar_fraction([*texts, *(f"{text}?" for text in texts)]) == 1
    assert quality.similar_fraction(texts) == 0 and quality.similar_fraction(texts, [f"{t}?" for t in texts]) == 1
    assert quality.similar_fraction(["one", "two"], ["three", "four"]) == 0 and quality.similar_fraction([]) is None


def test_report_draws_the_sheet(folder, tmp_path):
    """Tables, and pairs with their critiques."""
    (found,) = data_of(made([folder], tmp_path / "report.html"))["runs"]
    assert found["label"] == "Annotated data"
    summary = json.loads((folder / "annotation.json").read_text())
    kept = summary["steps"]["judgements"]["rows"]
    lines = found["table"].splitlines()
    assert f"| judgements | kept | {kept} |  |" in lines
    assert any(line.startswith("| world | 5 | 15 | 0 | 0.00 | 0.00 | 0.00 | 0.00 | 1.00 |") for line in lines)
    assert "| personas on both sides | 0 |" in lines
    assert len(found["rows"]) == 10 and {row["verdict"] for row in found["rows"]} == {"win"}  # by the same exact judge
    side = found["rows"][0]["sides"][0]
    assert side["critique"] and side["answer"] and side["title"].startswith("chosen, by world: ")


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_page_shows_sheet_and_pairs(folder, tmp_path):
    made([folder], tmp_path / "report.html")
    with Browser() as b:
        b.open(tmp_path / "report.html")
        assert "Stability of judgements" in b.text("#main") and "personas on both sides" in b.text("#main")
        b.open("/dev/null")
        b.open(tmp_path / "report.html", "#view=rows")
        assert "10 rows of 10" in b.text("#count") and "Critique" in b.text("#reader")
        assert b.errors() == []
