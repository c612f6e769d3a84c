"""The mathematics of ppo_cpe.py against numbers worked by hand."""

import math
from dataclasses import replace

import pytest
import torch

from ppo_cpe import (
    SMALLEST_SPREAD,
    Args,
    EditReward,
    compute_advantages,
    draw_edited,
    edit_loss,
    gae,
    gradient_weight,
    policy_loss,
    select_edits,
    should_edit,
    token_losses,
    value_loss,
)
from prompts import Judgement
from runtime.distributed import start
from trajectory import Prompt, Trajectory

P, Q, A = 0.2, 0.4, 3.0  # one token: p = pi_theta(y_e | x), q = pi_e(y_e | edit prompt), so r = 0.5


def run_edit_loss(kind, p, q, advantage, **options):
    """-> loss, and the weight of the token: -(d loss / d log p) / A."""
    logq = torch.tensor([math.log(q)], dtype=torch.float64)

    def loss_of(logprobs, advantages):
        return edit_loss(kind, logprobs, logq, advantages, **options)

    given = torch.tensor([[math.log(p)], [advantage]], dtype=torch.float64)
    return loss_of(*given).item(), gradient_weight(loss_of, *given).item()


# kind, p, q, A, options, loss, weight on grad log p; every number by hand from the table in docs/method.md 2
BY_HAND = [
    ("paper", 0.2, 0.4, 3.0, {}, -0.8 * 3.0, 0.0),  # r = 0.5 is held at 1 - 0.2 and gets no gradient
    ("paper", 0.44, 0.4, 3.0, {}, -1.1 * 3.0, 1.1),  # r = 1.1 is inside
    ("paper", 0.6, 0.4, -2.0, {}, 1.2 * 2.0, 0.0),  # r = 1.5 is held at 1 + 0.2
    ("unclipped", 0.2, 0.4, 3.0, dict(cap=10), -0.5 * 3.0, 0.5),
    ("unclipped", 0.6, 0.05, 3.0, dict(cap=10), -10 * 3.0, 0.0),  # r = 12 is over the cap
    ("tis", 0.2, 0.4, 3.0, dict(cap=2), -0.5 * 3.0 * math.log(0.2), 0.5),
    ("tis", 0.6, 0.05, 3.0, dict(cap=2), -2 * 3.0 * math.log(0.6), 2.0),  # still learns above the cap
    ("luffy", 0.1, 0.4, 3.0, dict(gamma=0.1), -3.0 * 0.5, 0.25),  # largest weight at p = gamma
    ("luffy", 0.4, 0.9, -1.0, dict(gamma=0.1), 0.8, 0.16),  # 0.1 * 0.4 / 0.5^2; q plays no part
    ("topr", 0.2, 0.4, 3.0, {}, -3.0 * math.log(0.2), 1.0),  # what was good is learned whole
    ("topr", 0.2, 0.4, -3.0, {}, 0.5 * 3.0 * math.log(0.2), 0.5),  # what was bad by r
    ("topr", 0.6, 0.4, -3.0, {}, 3.0 * math.log(0.6), 1.0),  # and at most once
    ("none", 0.2, 0.4, 3.0, {}, -3.0 * math.log(0.2), 1.0),
    ("released", 0.6, 0.05, 3.0, {}, -0.6 / (0.05 + 1e-6) * 3.0, 0.6 / (0.05 + 1e-6)),  # no bound
    ("released", 1e-5, 3e-6, 3.0, {}, -2.5 * 3.0, 2.5),  # and lower than r, which is 3.3
    ("novel", 0.003, 0.4, 3.0, {}, -3.0 * math.log(0.003), 1.0),  # r = 0.0075: learned whole
    ("novel", 0.005, 0.4, 3.0, {}, -0.8 * 3.0, 0.0),  # r = 0.0125: like paper from here on
    ("novel", 0.44, 0.4, 3.0, {}, -1.1 * 3.0, 1.1),
    ("novel", 0.003, 0.4, -3.0, {}, 0.8 * 3.0, 0.0),  # no edit unlearns what the policy never says
]


@pytest.mark.parametrize("kind,p,q,advantage,options,expected_loss,expected_weight", BY_HAND)
def test_edit_loss_by_hand(kind, p, q, advantage, options, expected_loss, expected_weight):
    loss, weight = run_edit_loss(kind, p, q, advantage, **options)
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    assert weight == pytest.approx(expected_weight, abs=1e-9)


def test_the_weight_of_a_loss_that_is_not_linear_in_the_advantage():
    """Its gradient is -weight A grad log p by definition, whatever the loss."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0])
    advantages = torch.tensor([2.0, -1.0, 0.0])
    weight = gradient_weight(lambda logprobs, advantages: -advantages.exp() * logprobs, logprobs, advantages)
    assert weight.tolist() == pytest.approx([math.exp(2) / 2, -math.exp(-1), math.e])  # a zero counts as 1
    assert gradient_weight(lambda logprobs, advantages: -advantages * logprobs, logprobs, advantages).tolist() == [
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    "kind,cap",
    [
        ("paper", None),
        ("unclipped", 10.0),
        ("tis", 2.0),
        ("luffy", None),
        ("topr", None),
        ("none", None),
        ("novel", None),
    ],
)
def test_edit_loss_stays_finite_on_outliers(kind, cap):
    logp = torch.tensor([-0.1, -200.0], requires_grad=True)
    loss = edit_loss(kind, logp, torch.tensor([-200.0, -0.1]), torch.tensor([1.0, 1.0]), cap=cap)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all()


def test_policy_loss_by_hand():
    old = torch.zeros(4)
    logprobs = torch.tensor([1.5, 1.5, 0.5, 1.1]).log()
    advantages = torch.tensor([2.0, -2.0, -2.0, 2.0])

    def loss_of(logprobs, advantages):
        return policy_loss(logprobs, old, advantages, 0.2, 0.2)

    loss = loss_of(logprobs, advantages)
    # A > 0, r too high: held at 1.2 | A < 0, r too high: not held | A < 0, r too low: held at 0.8 | inside
    assert loss.tolist() == pytest.approx([-2.4, 3.0, 1.6, -2.2])
    # a clipped token gets no gradient
    assert gradient_weight(loss_of, logprobs, advantages).tolist() == pytest.approx([0, 1.5, 0, 1.1])


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([2.0, 0.2]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.0])
    loss, clipped = value_loss(values, old, returns, 0.5)
    assert loss.tolist() == pytest.approx([0.5 * 1.5**2, 0.5 * 0.8**2])  # the first moved by more than 0.5
    assert clipped.tolist() == [True, False]


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 4.0], [0.0, 2.0, 0.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 9.0]])  # the 9 is padding
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert advantages.tolist() == [[3.0, 2.0, 1.0], [1.0, 1.0, 0.0]]
    assert returns.tolist() == [[4.0, 4.0, 4.0], [2.0, 2.0, 0.0]]
    advantages, _ = gae(rewards, values, mask, 0.5, 0.5)
    # deltas: 0 + .5*2 - 1 = 0; 0 + .5*3 - 2 = -.5; 4 - 3 = 1; then A_t = delta_t + .25 A_{t+1}
    assert advantages[0].tolist() == pytest.approx([0.25 * -0.25, -0.5 + 0.25, 1.0])


def trajectory(reward, n_tokens, parent=None, index=0):
    prompt = Prompt(index=index, row={"prompt_id": "p"}, ids=[1])
    sampled = dict(response_ids=[0] * n_tokens, engine_logprobs=[0.0] * n_tokens, answer="", truncated=False)
    origin = dict(prompt=prompt, sample_id=0, parent=parent, context_ids=[1])
    return Trajectory(**origin, **sampled, reward=reward, judgement=None)


def test_an_edit_of_an_edit_is_refused():
    """Keys, seeds, selection and rollout rows name an edit by its original."""
    edit = trajectory(1.0, 2, parent=trajectory(0.0, 2))
    with pytest.raises(ValueError, match="an edit of an edit"):
        trajectory(2.0, 2, parent=edit)


def advantages_of(batch, **flags):
    """With values of zero -> advantages, returns."""
    values = [torch.zeros(len(t.response_ids)) for t in batch]
    return compute_advantages(batch, values, Args(**flags), start("fp32"))


def test_advantages_of_the_two_baselines():
    originals = [trajectory(1.0, 2), trajectory(3.0, 1)]
    batch = [*originals, trajectory(4.0, 3, parent=originals[0])]
    advantages, _ = advantages_of(batch, edit_baseline="batch")
    raw = [1.0, 1.0, 3.0, 4.0, 4.0, 4.0]
    mean = sum(raw) / 6
    std = (sum((x - mean) ** 2 for x in raw) / 6) ** 0.5
    assert torch.cat(advantages).tolist() == pytest.approx([(x - mean) / std for x in raw], abs=1e-5)

    advantages, returns = advantages_of(batch, edit_baseline="original")
    mean, std = 5 / 3, (sum((x - 5 / 3) ** 2 for x in raw[:3]) / 3) ** 0.5  # over the originals' tokens
    assert advantages[1].tolist() == pytest.approx([(3 - mean) / std], abs=1e-5)
    assert advantages[2].tolist() == pytest.approx([(4 - 2) / std] * 3, abs=1e-5)  # originals' mean reward is 2
    assert returns[2].tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("reward", [1.0, 0.1, -4.95, 0.35 * 3 + 0.4 * 4 + 0.25 * 5])
def test_originals_that_are_scored_alike_bound_the_advantage_of_an_edit(reward):
    """Their spread is zero; divided by it (and 1e-8), a relative reward of 0.6 was an advantage of 6e7."""
    originals = [trajectory(reward, n) for n in (2, 3, 1)]
    better, worse = trajectory(reward + 0.6, 2, originals[0]), trajectory(reward - 2, 1, originals[1])
    advantages, _ = advantages_of([*originals, better, worse], edit_baseline="original")
    assert SMALLEST_SPREAD == 0.05
    assert advantages[3].tolist() == pytest.approx([0.6 / 0.05] * 2, rel=1e-4)
    assert advantages[4].tolist() == pytest.approx([-2 / 0.05], rel=1e-4)
    # rewards are equal, so nothing is learned from an original: not from the rounding of their mean, either
    assert torch.cat(advantages[:3]).abs().max() < 1e-3


def test_a_spread_below_the_smallest_does_not_blow_up_an_edit():
    originals = [trajectory(1.0, 1), trajectory(1.0 + 1e-4, 1)]
    advantages, _ = advantages_of([*originals, trajectory(2.0, 1, originals[0])], edit_baseline="original")
    assert advantages[2].tolist() == pytest.approx([(2 - 1 - 5e-5) / 0.05], rel=1e-4)


def test_an_unknown_loss_or_strategy_is_refused():
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="'papre': expected one of paper"):
        edit_loss("papre", x, x, x)
    with pytest.raises(ValueError, match="'best': expected one of random"):
        select_edits(EDITS, 0.5, "best", 0)


def test_caps_have_defaults():
    for kind, cap in (("unclipped", 10.0), ("tis", 2.0)):
        assert run_edit_loss(kind, 0.6, 0.005, 3.0) == run_edit_loss(kind, 0.6, 0.005, 3.0, cap=cap)


EDITS = [
    EditReward("a", 0, 5.0, 4.9),
    EditReward("a", 1, 4.0, 1.0),
    EditReward("a", 2, 3.0, 2.0),
    EditReward("a", 3, 2.0, 1.5),
    EditReward("b", 0, 1.0, -1.0),
    EditReward("b", 1, 0.0, -4.0),
    EditReward("b", 2, -1.0, -1.5),
    EditReward("b", 3, -2.0, 0.0),
]


def test_select_edits():
    assert select_edits(EDITS, 0.5, "reward_rank", 0) == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}
    assert select_edits(EDITS, 0.5, "conditional", 0) == {("a", 1), ("a", 2), ("b", 0), ("b", 1)}
    assert select_edits(EDITS, 0.5, "batch_rank", 0) == {("a", 0), ("a", 1), ("a", 2), ("a", 3)}
    for strategy in ("reward_rank", "conditional", "batch_rank"):
        chosen = select_edits(EDITS, 0.5, strategy, 7)
        assert len(chosen) == 4
        assert chosen == select_edits(EDITS[::-1], 0.5, strategy, 7)  # the order of the rows plays no part
        assert len(select_edits(EDITS, 1.0, strategy, 7)) == 8
        assert select_edits(EDITS, 0.0, strategy, 7) == set()
    assert len(select_edits(EDITS, 0.5, "random", 0)) == 8  # they were drawn before they were made


def test_originals_to_edit_are_drawn_beforehand():
    prompt = Prompt(index=0, row={"prompt_id": "p"}, ids=[1])
    args = Args(n_samples=4, edit_rate=0.4)
    draws = [draw_edited(prompt, args, step) for step in range(400)]
    assert draws[0] == draw_edited(prompt, args, 0)  # resumed runs draw alike
    assert {len(drawn) for drawn in draws} == {1, 2}
    # 1.6 on average, with a variance of .24 a draw: four standard errors are 0.1
    assert abs(sum(map(len, draws)) / 400 - 1.6) < 0.1
    for sample_id in range(4):  # each as often: 160 of 400, and four standard errors are 39
        assert abs(sum(("p", sample_id) in drawn for drawn in draws) - 160) < 39
    assert draw_edited(prompt, replace(args, edit_rate=0), 0) == set()
    ranked = replace(args, edit_strategy="reward_rank")
    assert len(draw_edited(prompt, ranked, 0)) == 4 and not draw_edited(prompt, replace(ranked, edit_rate=0), 0)


@pytest.mark.parametrize(
    "critique, reward, below, expected",
    [
        ("Say it shorter.", 4.0, None, True),
        ("Say it shorter.", 4.0, 4.0, False),
        ("Say it shorter.", 3.9, 4.0, True),
        ("Nothing to fix.", 1.0, None, False),
        (" nothing to fix\n", 1.0, None, False),
        ("", 1.0, None, False),
        ("Nothing to fix but the length.", 1.0, None, True),
    ],
)
def test_edits_are_made_where_there_is_something_to_fix(critique, reward, below, expected):
    original = replace(trajectory(reward, 1), judgement=Judgement(critique, 1, 1, 1))
    assert should_edit(original, Args(edit_below=below)) == expected


def test_a_rate_below_one_edit_per_prompt_is_right_on_average():
    counts = [len(select_edits(EDITS, 0.1, "reward_rank", seed)) for seed in range(400)]
    # 8 edits x 0.1 = 0.8; two draws of probability 0.4 have variance 0.48, so four standard errors are 0.14
    assert abs(sum(counts) / len(counts) - 0.8) < 0.14


def test_gamma_lambda_and_the_critics_values():
    rewards, values = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3), 0.5, 0.25)
    assert advantages[0].tolist() == pytest.approx([0.125 * -0.375, -0.375, 1])
    batch = [trajectory(2.0, 2)]
    args = Args(gamma=0.5, gae_lambda=0.25)
    advantages, returns = compute_advantages(batch, [torch.tensor([1.0, 3.0])], args, start("fp32"))
    assert returns[0].tolist() == pytest.approx([1.375, 2]) and advantages[0].tolist() == pytest.approx([1, -1])


def test_flags_of_the_loss_reach_their_tokens():
    """Two tokens of an original, two of an edit; ratios 1.5 and 0.5."""
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0])
    is_edit = torch.tensor([False, False, True, True])

    def losses(**flags):
        args = Args(eps_low=0.1, eps_high=0.3, **flags)
        return token_losses(logprobs, torch.zeros(4), advantages, is_edit, args).tolist()

    assert losses(edit_loss="paper") == pytest.approx([-1.3, 0.9, -1.3, -0.9])
    assert losses(edit_loss="unclipped", ratio_cap=1.25)[2:] == pytest.approx([-1.25, -0.5])
    assert losses(edit_loss="luffy", luffy_gamma=0.5)[2:] == pytest.approx([-0.75, -0.5])
