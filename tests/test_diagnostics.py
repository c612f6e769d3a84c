"""What is counted in answers, on examples by hand."""

import pytest

from diagnostics import distinct, leaves, recited

PERSONA = {"name": "Ada Novak", "food": ["vegan", "green tea"], "age": 41, "city": {"now": "北京"}}


def test_values_of_a_profile():
    assert leaves(PERSONA) == ["Ada Novak", "vegan", "green tea", "41", "北京"]
    assert leaves("likes tea") == ["likes tea"]


@pytest.mark.parametrize("answer, share", [
    ("", 0), ("Eat VEGAN, dear Ada-Novak.", 2 / 5), ("Drink tea that is green.", 0), ("Drink green tea!", 1 / 5),
    ("Not veganism, nor 411.", 0), ("我住在北京，四十一岁", 1 / 5), ("北 and 京 apart, 41", 1 / 5)])
def test_recitation(answer, share):
    assert recited(PERSONA, answer) == pytest.approx(share)
    assert recited({}, answer) == 0


def test_distinct_pairs_of_words():
    assert distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab ba ab | ab: none across answers
    assert distinct(["A, b. a b"], 1) == pytest.approx(2 / 4)
    assert distinct(["a"], 2) == 0 and distinct([], 2) == 0
