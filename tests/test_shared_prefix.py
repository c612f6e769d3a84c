"""Prompts that are computed once for all of their responses give what computing them every time gives."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import finish, launch, random_model, tiny_config

import ppo_cpe
from attention import SharedPrefix
from kernels.gather_rows import gather_rows
from runtime import packing, training
from runtime.distributed import start
from trajectory import Batch, Prompt, Trajectory

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [5, 6, 7]]


def on_cpu():
    """The ranks of one process, also where there is a GPU."""
    return replace(start("fp32"), device=torch.device("cpu"))


def sequences(seed=0):
    """(prompt, response) pairs: groups of 3, 1 and 2 responses of 1 to 9 tokens."""
    rng = random.Random(seed)
    return [
        (p, [rng.randrange(300) for _ in range(rng.choice((1, 4, 9)))])
        for p, n in zip(PROMPTS, (3, 1, 2))
        for _ in range(n)
    ]


def both_packings(rows):
    flags = [[True] * len(r) for _, r in rows]
    shared = packing.pack_shared([p for p, _ in rows], [r for _, r in rows], flags, "cpu")
    apart = packing.pack([p + r for p, r in rows], [[False] * len(p) + f for (p, _), f in zip(rows, flags)], "cpu")
    return shared, apart


def run(model, batch):
    """-> results of the head [S], gradients of a loss that weighs every token differently."""
    model.zero_grad()
    out = training.forward(model, batch, 0.9)
    (out * torch.linspace(-1, 2, len(out), dtype=out.dtype, device=out.device)).sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()]


# A key or a position that is wrong changes results and gradients, which are of the order of 1, in the first digits.
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_results_and_gradients_equal_the_unshared_ones(dtype, bound, scalar_head, recompute):
    model = random_model(tiny_config(), scalar_head).to(dtype)
    model.checkpoint_activations = recompute
    shared, apart = both_packings(sequences())
    assert len(shared.input_ids) == len(apart.input_ids) - 2 * 7 - 1 * 3  # each prompt once
    assert torch.equal(shared.targets, apart.targets) and shared.counts == apart.counts
    (out, grads), (expected, expected_grads) = run(model, shared), run(model, apart)
    assert expected.std() > 0.05
    assert (out - expected).abs().max() < bound
    for (name, _), grad, wanted in zip(model.named_parameters(), grads, expected_grads):
        assert (grad - wanted).abs().max() < bound * max(1, wanted.abs().max()), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_through_the_varlen_kernels():
    model = random_model(tiny_config(hidden_size=128, intermediate_size=64)).cuda().bfloat16()
    exact = random_model(tiny_config(hidden_size=128, intermediate_size=64)).cuda()
    rows = sequences()
    flags = [[True] * len(r) for _, r in rows]
    shared = packing.pack_shared([p for p, _ in rows], [r for _, r in rows], flags, "cuda")
    for (name, _), grad, wanted in zip(model.named_parameters(), run(model, shared)[1], run(exact, shared)[1]):
        # bf16 keeps 8 bits through two layers; a segment that sees another's keys is off by its whole gradient
        assert (grad - wanted).norm() < 0.05 * wanted.norm() + 1e-3, name


def test_responses_of_a_prompt_do_not_see_each_other():
    model = random_model(tiny_config())
    rows = sequences()
    before, _ = both_packings(rows)
    rows[1] = (rows[1][0], [i + 1 for i in rows[1][1]])
    after, _ = both_packings(rows)
    old, new = (training.forward(model, batch, 1.0).split(batch.counts) for batch in (before, after))
    assert all(torch.equal(old[i], new[i]) for i in (0, 2, 3, 4, 5))
    assert (old[1] != new[1]).any()


def test_a_prefix_may_be_empty():
    context = SharedPrefix([(0, [2, 3]), (4, [1])])
    assert context.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4]
    assert context.attention_pairs == 3 + 6 + 15


def test_gradients_of_a_shared_row_add_up_in_fp32():
    x = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    index = torch.tensor([0] * 513 + [1])
    gather_rows(x, index).sum().backward()
    assert x.grad.tolist() == [[512.0], [1.0]]  # one by one in bf16 the sum would not get past 256


# -- micro-batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [10, 37, 1000])
def test_micro_batches_are_within_the_budget_and_even(budget):
    ranks = start("fp32")
    rng = random.Random(budget)
    sizes = [rng.randint(1, 40) for _ in range(60)]
    parts = packing.micro_batches(sizes, budget, ranks)
    assert sorted(i for part in parts for i in part) == list(range(60))
    filled = [sum(sizes[i] for i in part) for part in parts]
    assert all(f <= budget or len(part) == 1 for f, part in zip(filled, parts))
    if budget == 1000:  # 2 parts: as even as the smallest size allows
        assert len(parts) == -(-sum(sizes) // 1000) and max(filled) - min(filled) <= min(sizes)


def test_groups_stay_together_and_are_cut_only_over_the_budget():
    ranks = start("fp32")
    prefixes = [[1] * 5] * 4 + [[2] * 5] * 2
    suffixes = [[0] * 10] * 6
    assert packing.shared_micro_batches(prefixes, suffixes, 50, ranks) == [[0, 1, 2, 3], [4, 5]]
    assert packing.shared_micro_batches(prefixes, suffixes, 25, ranks) == [[0, 1], [2, 3], [4, 5]]
    assert packing.shared_micro_batches(prefixes, suffixes, 3, ranks) == [[0], [1], [2], [3], [4], [5]]


def test_ranks_get_equal_shares():
    sizes = [9, 1, 1, 1, 8, 7, 3, 2, 2, 6]
    bins = packing.balance(sizes, 4)
    assert sorted(i for b in bins for i in b) == list(range(10))
    assert [sum(sizes[i] for i in b) for b in bins] == [10, 10, 10, 10]


# -- the old log-probs -------------------------------------------------------------------------------------------------


def trajectories():
    """Two prompts, three originals each, edits of two; of prompt 0 (the first mini-batch) and 1."""
    rng = random.Random(1)
    batch = []

    def add(prompt, sample_id, context_ids, response_ids, parent=None):
        sampled = dict(response_ids=response_ids, engine_logprobs=[], answer="", truncated=False)
        origin = dict(prompt=prompt, sample_id=sample_id, context_ids=context_ids, parent=parent)
        batch.append(Trajectory(**origin, **sampled, reward=0.0, judgement=None))
        return batch[-1]

    for index in range(2):
        x = [rng.randrange(300) for _ in range(6)]
        prompt = Prompt(index=index, row={"prompt_id": f"p{index}"}, ids=x)
        for i in range(3):
            y = [rng.randrange(300) for _ in range(rng.randint(2, 6))]
            original = add(prompt, i, x, y)
            if i < 2:  # the second edit prompt does not go on from y_o (its text was encoded anew)
                context_ids = x + (y if i == 0 else y[1:]) + [7, 8, 9]
                add(prompt, i, context_ids, [11, 12, rng.randrange(300)], original)
    return batch


def test_old_logprobs_are_those_of_every_response_under_its_own_prompt():
    ranks, model, batch = on_cpu(), random_model(tiny_config()), trajectories()
    args = ppo_cpe.Args(mini_batch_prompts=1, tokens_per_microbatch=40, temperature=0.9)
    logprobs, flops = ppo_cpe.old_policy_logprobs(batch, model, args, ranks)
    assert flops > 0
    for t, found in zip(batch, logprobs, strict=True):
        if t.parent is None and t.prompt.index == 0:
            assert found is None  # the update's own pass has them
            continue
        flags = [False] * len(t.context_ids) + [True] * len(t.response_ids)
        alone = packing.pack([t.context_ids + t.response_ids], [flags], "cpu")
        assert (found - training.forward(model, alone, 0.9)).abs().max() < 1e-5


# -- one update, whatever the processes and the budget -----------------------------------------------------------------

SETTINGS = [(1, 10_000, None), (1, 60, None), (2, 10_000, None), (2, 45, None), (4, 100, None), (4, 100, 2)]


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """Weights before, less those after an update by SGD at rate 1: the gradients; by (processes, budget, shard)."""
    folder = tmp_path_factory.mktemp("updates")
    result = {}
    for processes, budget, shard_size in SETTINGS:
        file = folder / f"{processes}_{budget}_{shard_size}.pt"
        finish(launch("tests/update_once.py", file, budget, shard_size or processes, processes=processes))
        result[processes, budget, shard_size] = torch.load(file, weights_only=True)
    return result


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=str)
def test_the_update_depends_neither_on_processes_nor_on_the_budget(updates, setting):
    one, other = updates[SETTINGS[0]], updates[setting]
    assert other["passes"] > one["passes"] or setting[0] > 1
    for name, model in (("policy", "policy"), ("critic", "critic")):
        largest = max(g.abs().max() for g in one[model].values())
        assert largest > 1e-2  # a mean over another count, or a rank left out, changes the first digit
        for key, grad in one[model].items():
            assert (other[model][key] - grad).abs().max() < 1e-5 * max(1, largest), (name, key)


def test_an_update_is_a_step_down_the_methods_loss():
    """Each response under its prompt alone: -A log p (`none`), half the squared error of values; means over tokens."""
    ranks = on_cpu()
    batch = trajectories()
    settings = dict(prompts_per_step=2, mini_batch_prompts=2, temperature=0.9, edit_loss="none")
    args = ppo_cpe.Args(**settings, lr=1.0, critic_lr=1.0, max_grad_norm=1e9)
    models = {"policy": random_model(tiny_config()), "critic": random_model(tiny_config(), scalar_head=True)}
    advantages = [torch.full((len(t.response_ids),), 0.5 + i) for i, t in enumerate(batch)]
    n = sum(map(len, advantages))
    losses = {"policy": torch.zeros(()), "critic": torch.zeros(())}
    values = []
    for t, a in zip(batch, advantages):
        x, y = t.prompt.ids, t.response_ids
        alone = packing.pack([x + y], [[False] * len(x) + [True] * len(y)], "cpu")
        losses["policy"] = losses["policy"] - (a * training.forward(models["policy"], alone, 0.9)).sum() / n
        value = training.forward(models["critic"], alone)
        values.append(value.detach())
        losses["critic"] = losses["critic"] + 0.5 * (value - a).square().sum() / n
    expected = {}
    for name, model in models.items():
        losses[name].backward()
        expected[name] = {key: p.detach() - p.grad for key, p in model.named_parameters()}
        model.zero_grad()
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1.0) for name, model in models.items()}
    old_logprobs, _, _ = ppo_cpe.score(batch, models, args, 0, ranks)
    run = SimpleNamespace(ranks=ranks, args=args, step=0, out="")
    ppo_cpe.update(models, optimizers, Batch(batch, old_logprobs, values, advantages, advantages), args, run)
    for name, model in models.items():
        for key, p in model.named_parameters():
            assert torch.allclose(p, expected[name][key], rtol=1e-4, atol=1e-4), (name, key)
