"""What is counted in answers, on examples by hand."""

import pytest
import torch

from diagnostics import (
    Means,
    audit,
    describe_edits,
    describe_rollout,
    distinct,
    kept_tokens,
    leaves,
    recited,
    swap_personas,
    warn_of_lost,
    warn_of_no_gradient,
)
from judges import Verdict
from runtime.distributed import start
from trajectory import Prompt, Rollout, TokenArrays, Trajectory

PERSONA = {"name": "Ada Novak", "food": ["vegan", "green tea"], "age": 41, "city": {"now": "北京"}}


def test_values_of_a_profile():
    assert leaves(PERSONA) == ["Ada Novak", "vegan", "green tea", "41", "北京"]
    assert leaves("likes tea") == ["likes tea"]


@pytest.mark.parametrize(
    "answer, share",
    [
        ("", 0),
        ("Eat VEGAN, dear Ada-Novak.", 2 / 5),
        ("Drink tea that is green.", 0),
        ("Drink green tea!", 1 / 5),
        ("Not veganism, nor 411.", 0),
        ("我住在北京，四十一岁", 1 / 5),
        ("北 and 京 apart, 41", 1 / 5),
    ],
)
def test_recitation(answer, share):
    assert recited(PERSONA, answer) == pytest.approx(share)
    assert recited({}, answer) == 0
    assert recited("Ada drinks tea.", answer) is None


def test_distinct_pairs_of_words():
    assert distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab ba ab | ab: none across answers
    assert distinct(["A, b. a b"], 1) == pytest.approx(2 / 4)
    assert distinct(["a"], 2) == 0 and distinct([], 2) == 0


def test_a_loss_without_gradient_is_named(capsys):
    for clipfrac, said in ((1.0, True), (0.99, False)):
        warn_of_no_gradient({"edit/clipfrac": clipfrac}, 3)
        assert ("step 3: no token of an edit has a gradient" in capsys.readouterr().out) == said
    warn_of_no_gradient({}, 3)  # no edits


def test_kept_and_inserted_tokens():
    assert kept_tokens([1, 2, 3, 9], [1, 7, 2, 3, 8, 9]).tolist() == [True, False, True, True, False, True]
    assert kept_tokens([1, 2], [3, 4]).tolist() == [False, False] and kept_tokens([], [1]).tolist() == [False]
    assert kept_tokens([5, 6], [5, 6]).tolist() == [True, True] and kept_tokens([1], []).tolist() == []


def trajectory(response_ids, parent=None, index=0, sample_id=0, answer="", critique_ids=()):
    prompt = Prompt(index=index, row={"prompt_id": f"p{index}", "persona": PERSONA}, ids=[1])
    sampled = dict(response_ids=response_ids, engine_logprobs=[], answer=answer, truncated=False)
    context_ids = [1, *(parent.response_ids if parent else ()), *critique_ids]
    origin = dict(prompt=prompt, sample_id=sample_id, parent=parent, context_ids=context_ids)
    return Trajectory(**origin, **sampled, reward=0.0, judgement=None)


def test_ledger_of_edits():
    """An original; two edits: 1 7 8 | 2 of original 1 2, and 4 of original 3: kept are the tokens 1 and 2.

    The critique names 7, which is novel, and 2, which is kept. Nobody named the 8.
    """
    edits = [
        trajectory([1, 7, 8, 2], trajectory([1, 2]), critique_ids=[2, 7]),
        trajectory([4], trajectory([3]), critique_ids=[4]),
    ]
    ratio = torch.tensor([9.0, 1.0, 0.1, 0.3, 0.5, 3.0])
    weight = torch.tensor([9.0, 1.0, 0.1, 0.5, 0.0, 0.0])
    advantages = torch.tensor([9.0, 2.0, 2.0, 1.0, 2.0, -1.0])
    logprobs = torch.tensor([0.01, 0.5, 0.01, 0.01, 0.5, 0.5]).log()  # the 7 and the 8 are unlikely
    is_edit = torch.tensor([False, True, True, True, True, True])
    zeros = torch.zeros(6)
    tokens = TokenArrays(
        trajectories=[trajectory([1]), *edits],
        counts=[1, 4, 1],
        is_edit=is_edit,
        logprobs=logprobs,
        old_logprobs=logprobs - ratio.log(),
        advantages=advantages,
        entropy=zeros,
        loss=zeros,
        weight=weight,
    )
    means = Means()
    describe_edits(means, tokens, 0.2, 0.2)
    found = means.over_ranks(start("fp32"))
    want = {
        "edit/kept": 2 / 5,
        "edit/kept_ratio": 0.75,
        "edit/inserted_ratio": 3.4 / 3,
        "edit/kept_clipfrac": 1 / 2,
        "edit/inserted_clipfrac": 1 / 3,
        "edit/novel": 1 / 5,
        "edit/kept_weight": 0.5,
        "edit/inserted_weight": 0.2,
        "edit/novel_weight": 0.1,
        "edit/novel_ratio": 0.1,
        "edit/novel_clipfrac": 0,
        "edit/novel_gradient_mass": 0.2 / 5,
        "edit/kept_gradient_mass": 2 / 5,
        "edit/inserted_gradient_mass": 0.7 / 5,
        "edit/ratio": 4.9 / 5,
        "edit/ratio_low": 3 / 5,
        "edit/ratio_high": 1 / 5,
        "edit/weight": 1.6 / 5,
        "edit/clipfrac": 2 / 5,
        "edit/ratio_max": 3.0,
    }
    assert found == {name: pytest.approx(value) for name, value in want.items()}


def test_a_step_that_loses_many_says_so(capsys):
    counts = {"lost/originals": 20, "lost/edits": 0, "judged": 80}
    warn_of_lost(counts, 3)
    assert capsys.readouterr().out == ""
    warn_of_lost(counts | {"lost/edits": 1}, 3)
    assert "step 3: 21 of 101 responses got no judgement" in capsys.readouterr().out


def test_distinct_pairs_do_not_depend_on_the_number_of_samples():
    """Four and six samples of each of 16 prompts, all from the same distribution: the same 32 answers count."""

    def responses(n):
        return [
            trajectory([1], index=p, sample_id=i, answer=f"the answer to {p} and {i} ends here")
            for p in range(16)
            for i in range(n)
        ]

    found = []
    for n in (4, 6):
        means = Means()
        describe_rollout(means, Rollout(16, responses(n), [], (0, 0)))
        found.append(means.over_ranks(start("fp32"))["original/distinct_2"])
    assert found[0] == found[1]


class Recording:
    """A judge that gives the number of the answer, at once."""

    lowest_reward = -5.0

    def __init__(self):
        self.asked = []
        self.verdicts = []

    def submit(self, key, row, answer, seed):
        self.asked.append(answer)
        self.verdicts.append(Verdict(key, float(answer[-1])))

    @property
    def busy(self):
        return bool(self.verdicts)

    def poll(self):
        return [self.verdicts.pop()]


def test_rewards_that_were_replaced_are_not_audited():
    """--truncated min_score gives the lowest reward, which would be compared with the judge's."""
    answers = [trajectory([1], index=i, answer=f"answer {i}") for i in range(4)]
    for t in answers[1:3]:
        t.truncated, t.reward = True, -5.0
    for other in answers[2:]:
        other.prompt.row["persona"] = "somebody else"
    judge = Recording()
    ranks = start("fp32")
    assert [found["again"] for found in audit(answers, judge, None, 1.0, 0, 1, ranks).values()] in ([0, 3], [3, 0])
    assert swap_personas(Rollout(4, answers, [], (0, 0)), judge, ranks) == [0, -3]
    assert set(judge.asked) == {"answer 0", "answer 3"} and len(judge.asked) == 4
