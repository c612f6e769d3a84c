"""The forks of docs/forking.md and docs/tournament.md, as they stand there: applied, planned, trained for two steps.
Then their mathematics."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics, run_script
from safetensors.torch import load_file
from test_layout import STAGES

import ppo_cpe
import replay
from chat import Chat
from judges import Judge, Verdict
from model import load_pretrained
from prompts import Judgement, answer_prompt, edit_prompt, load_templates, response_ids
from recipes import fork
from runtime import training
from runtime.distributed import start
from runtime.packing import pack, pack_shared
from runtime.rows import write_rows, write_text
from trajectory import Batch, Prompt, Rollout, Trajectory

JUDGE = """
from prompts import Judgement

def judge(row, answer) -> Judgement:
    return Judgement("Say it shorter.", 1, 2, min(5, len(answer) // 8))
"""


FORKS = fork.all_diffs()


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    """A folder with NAME.py for each fork of the pages."""
    folder = tmp_path_factory.mktemp("forks") / "exp"
    for name in FORKS:
        write_text(str(folder / f"{name}.py"), fork.code_of(name, FORKS))
    return folder


def flags_of(tiny, folder, judge=JUDGE):
    (folder / "judge.py").write_text(judge)
    return [
        *("--model", tiny / "checkpoint", "--prompts", tiny / "prompts.jsonl", "--out", folder / "run"),
        *("--answer-template", tiny / "answer.txt", "--edit-template", tiny / "edit.txt"),
        *("--prompts-per-step", 4, "--mini-batch-prompts", 2, "--n-samples", 2, "--max-new-tokens", 12),
        *("--temperature", 1, "--top-p", 1, "--lr", 1e-4, "--tokens-per-microbatch", 300, "--max-steps", 2),
        *("--judge", f"{folder / 'judge.py'}:judge"),
    ]


# What each fork is run with, besides the flags above
RUN_WITH = {
    "root": ("--edit-loss", "root"),
    "gain": ("--edit-strategy", "gain"),
    "grpo": (),
    "raft": (),
    "rltf_sd": (),
    "rltf_fm": (),
    "critique_grpo": ("--eps-low", 1, "--eps-high", 1e9),
    "golf": ("--inject-below", 2.5),
    "hinted": ("--hint-steps", 1, "--edit-rate", 1),
    "sdpo": ("--success-reward", 100, "--teacher-rate", 1),
    "srpo": ("--success-reward", 3, "--teacher-prompt", "edit"),
    "released_paper": (),
    "kl": ("--mini-batch-prompts", 4),  # one update a step: the first starts at the reference
    "entropy": (),
}


@pytest.fixture(scope="module")
def trained(tiny, exp, tmp_path_factory):
    """name -> the run folder of two steps of a fork; each is run once."""
    folders = {}

    def run_of(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            run_script(exp / f"{name}.py", *flags_of(tiny, folder), *RUN_WITH[name])
            folders[name] = folder / "run"
        return folders[name]

    return run_of


def rollouts(run, step):
    lines = (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_hunk_applies_where_its_lines_stand_once():
    diff = "--- a\n+++ exp/b.py\n@@ f\n one\n-two\n+three\n@@\n+zero\n \n four\n"
    assert fork.apply(diff, "one\ntwo\n\nfour\n") == "one\nthree\nzero\n\nfour\n"
    for text, times in (("one\n\nfour\n", 0), ("one\ntwo\none\ntwo\n\nfour\n", 2)):
        with pytest.raises(ValueError, match=f"found them {times} times:\none\ntwo\n"):
            fork.apply(diff, text)


def test_a_fork_is_written_once(tmp_path):
    """A file that may have been changed since is left as it is; so is the folder where the page has no such fork."""
    assert "expected one of root, gain" in run_script("recipes/fork.py", "foot", folder=tmp_path, status=2)
    run_script("recipes/fork.py", "root", folder=tmp_path)
    (tmp_path / "exp/root.py").write_text("mine")
    assert "exp/root.py is there already" in run_script("recipes/fork.py", "root", folder=tmp_path, status=2)
    assert (tmp_path / "exp/root.py").read_text() == "mine"


def test_a_diff_may_be_one_against_another_fork(tmp_path):
    run_script("recipes/fork.py", "raft", "--folder", "mine", folder=tmp_path)
    assert os.listdir(tmp_path / "mine") == ["raft.py"]
    code = (tmp_path / "mine" / "raft.py").read_text()
    assert "def best_of_prompts" in code and '"critic": training' not in code


def test_every_fork_has_its_command():
    pages = "".join(map(fork.read, fork.PAGES))
    for name in FORKS:
        assert f"python recipes/fork.py {name}" in pages and f"python exp/{name}.py" in pages
    assert RUN_WITH.keys() == FORKS.keys()


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_of_the_pages_trains(name, trained):
    steps = read_metrics(trained(name))
    assert len(steps) == 2 and all(step["grad_norm_policy"] > 0 for step in steps)


@pytest.mark.parametrize("name", ["sdpo", "srpo", "kl"])
def test_a_fork_with_another_model_trains_in_bf16(name, tiny, exp, tmp_path):
    """FSDP wraps the model then, and a pass without gradients leaves its root gathered."""
    run_script(exp / f"{name}.py", *flags_of(tiny, tmp_path), *RUN_WITH[name], "--dtype", "bf16")
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_loss_is_replayed_by_the_copys_own_code(tiny, exp, tmp_path):
    script = exp / "root.py"
    more = ("--edit-loss", "root", "--edit-rate", 1, "--save-batch", 1, "--max-steps", 1)
    run_script(script, *flags_of(tiny, tmp_path), *more)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["edit_loss"] == "root"
    gradients = replay.replay(str(tmp_path / "run" / "batch_000001"), str(script))
    assert gradients["root"].norm() > 0
    for name in ("tis", "none"):
        assert not torch.equal(gradients["root"], gradients[name])


def test_norms_and_cosines_of_a_large_models_gradients():
    """In fp32, dot and norm of as many terms are off by percents, in opposite directions."""
    g = torch.full((2 * replay.PIECE + 5,), 0.1)
    assert replay.dot(g, g) == pytest.approx(len(g) * 0.1**2, rel=1e-6)
    assert replay.dot(g, -g) == -replay.dot(g, g)


def test_a_batch_without_a_critic_is_kept(tiny, exp, tmp_path):
    run_script(exp / "grpo.py", *flags_of(tiny, tmp_path), "--save-batch", 1, "--max-steps", 1)
    assert (tmp_path / "run" / "batch_000001" / "batch.json").exists()
    assert read_metrics(tmp_path / "run")[0]["explained_variance"] is None


@pytest.mark.parametrize("place", ["batch", "beside", "relative"])
def test_a_batch_runs_no_script_of_its_own(place, tiny, tmp_path, monkeypatch):
    """A batch that somebody sent may name any file."""
    folder = tmp_path / "out" / "batch_000001"
    folder.mkdir(parents=True)
    file = {"batch": folder / "a.py", "beside": tmp_path / "a.py", "relative": tmp_path / "a.py"}[place]
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    named = "a.py" if place == "relative" else str(file)
    (folder / "batch.json").write_text(json.dumps(dict(script=named, args={}, trajectories=[])))
    with pytest.raises(ValueError, match="no script of this checkout; if you trust it: --script"):
        replay.replay(str(folder))
    assert not (tmp_path / "ran").exists()
    (folder / "batch.json").unlink()
    with pytest.raises(ValueError, match="expected a folder that --save-batch wrote to its end"):
        replay.replay(str(folder))


def test_grpo_has_no_critic(tiny, exp, trained, tmp_path):
    planned = run_script(exp / "grpo.py", *flags_of(tiny, tmp_path), "--plan", "--gpu-gib", 0)
    assert "policy" in planned and "critic" not in planned
    run = trained("grpo")
    assert "value_loss" not in read_metrics(run)[0] and not (run / "critic").exists()


# -- the mathematics of the forks: their functions on a few trajectories of the tiny model -----------------------------


@pytest.fixture(scope="module")
def world(tiny):
    """Ranks, chat, policy (fp32) and templates, for the functions of a fork."""
    ranks = start("fp32")
    folder = str(tiny / "checkpoint")
    templates = load_templates(None, *(str(tiny / f"{name}.txt") for name in ("answer", "edit", "grm")))
    policy = load_pretrained(folder, torch.float32, ranks.device)
    return SimpleNamespace(ranks=ranks, chat=Chat(folder), policy=policy, templates=templates)


@pytest.fixture
def module(exp):
    """name -> the fork as a module."""
    return lambda name: replay.load_script(str(exp / f"{name}.py"))


def prompt_of(world, index):
    row = {"prompt_id": f"p{index}", "persona": {"name": "Kim"}, "question": f"What to drink at {index}?"}
    return Prompt(index=index, row=row, ids=answer_prompt(world.chat, world.templates, row))


def answer_of(world, prompt, sample_id, reward, text="Green tea.", critique="Say it shorter.", parent=None):
    """A trajectory: an original, or the edit of `parent`."""
    context_ids = prompt.ids
    if parent:
        context_ids = edit_prompt(world.chat, world.templates, prompt.ids, parent.response_ids, parent.critique)
    ids = response_ids(world.chat, text)
    return Trajectory(
        prompt=prompt,
        sample_id=sample_id,
        parent=parent,
        context_ids=context_ids,
        response_ids=ids,
        engine_logprobs=[0.0] * len(ids),
        answer=text,
        truncated=False,
        reward=float(reward),
        judgement=Judgement(critique, 1, 1, 1),
    )


def two_prompts(world):
    """Prompt 0: originals 1, 3, edit 5 of the second. Prompt 1: originals 2, 2, edits 2.5 and 4. In a step's order."""
    batch = []
    for index, originals, edits in ((0, (1, 3), {1: 5}), (1, (2, 2), {0: 2.5, 1: 4})):
        prompt = prompt_of(world, index)
        for i, reward in enumerate(originals):
            batch.append(answer_of(world, prompt, i, reward))
            if i in edits:
                batch.append(answer_of(world, prompt, i, edits[i], "Tea, of course!", parent=batch[-1]))
    return batch


def batch_of(trajectories, advantages=None):
    """With old log-probs that are far from the policy's."""
    zeros = [torch.zeros(len(t.response_ids)) for t in trajectories]
    old = [torch.full_like(x, -3.0) for x in zeros]
    return Batch(trajectories, old, zeros, advantages or zeros, zeros)


def gradient_of(policy, loss):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def run_pass(script, world, batch, args, **more):
    """The loss and the gradient of a script's `policy_pass`."""
    prompts = [t.prompt.ids for t in batch.trajectories]
    responses = [t.response_ids for t in batch.trajectories]
    masks = [[True] * len(ids) for ids in responses]
    packed = pack_shared(prompts, responses, masks, world.ranks.device)
    loss, tokens = script.policy_pass(world.policy, packed, batch, args, **more)
    return gradient_of(world.policy, loss), tokens


def logprobs_alone(world, context, ids, temperature=1.0):
    """Log-probs of ids after a context, in a pass of their own."""
    packed = pack([context + ids], [[False] * len(context) + [True] * len(ids)], world.ranks.device)
    return training.forward(world.policy, packed, temperature)


def each(tensors):
    """The value of each tensor, which has it in all places."""
    assert all(bool((x == x[0]).all()) for x in tensors)
    return [x[0].item() for x in tensors]


def test_raft_is_sft_on_the_best_response_of_each_prompt(module, world):
    raft = module("raft")
    batch = two_prompts(world)
    best = raft.best_of_prompts(batch)
    assert [(t.prompt.index, t.reward) for t in best] == [(0, 5.0), (1, 4.0)]
    same = [answer_of(world, batch[0].prompt, i, 2) for i in range(2)]
    assert raft.best_of_prompts(same) == same[:1]
    ones = [torch.ones(len(t.response_ids)) for t in best]
    found, _ = run_pass(raft, world, batch_of(best, ones), raft.Args(temperature=1.0))
    sequences = []
    for t in best:
        sequences.append((t.prompt.ids + t.response_ids, [False] * len(t.prompt.ids) + [True] * len(t.response_ids)))
    loss, _, _ = training.nll(world.policy, sequences, world.ranks.device)
    assert torch.allclose(found, gradient_of(world.policy, loss), atol=1e-4, rtol=1e-4) and found.norm() > 1


def test_raft_trains_one_response_of_a_prompt(trained):
    assert [step["batch"] for step in read_metrics(trained("raft"))] == [4, 4]


def test_advantages_against_groups(module, world):
    """By hand, in the order of `two_prompts`: two originals and an edit, then each original with its edit."""
    batch = two_prompts(world)
    assert each(module("rltf_sd").group_advantages(batch)) == [-1, 1, 3, 0, 0.5, 0, 2]
    expected = [-2, 0, 2, -0.625, -0.125, -0.625, 1.375]  # the means are 3 and 2.625
    assert each(module("critique_grpo").group_advantages(batch)) == expected
    spread = 1.05
    expected = [-1 / spread, 1 / spread, 3 / spread, 0, 0.5, 0, 2]  # originals that are all alike have no spread
    assert each(module("grpo").group_advantages(batch)) == pytest.approx(expected)


def test_critique_grpo_shapes_the_probability_of_edits(module, world):
    script = module("critique_grpo")
    batch = two_prompts(world)[1:3]
    _, tokens = run_pass(script, world, batch_of(batch, script.group_advantages(batch)), script.Args(temperature=1.0))
    p = tokens.logprobs[tokens.is_edit].exp()
    assert torch.allclose(tokens.weight[tokens.is_edit], 0.1 * p / (p + 0.1).square(), rtol=1e-4)


def test_golf_trains_edits_under_their_own_prompts_and_injects_where_originals_fail(module, world):
    golf = module("golf")
    batch = two_prompts(world)
    trained_on = golf.golf_batch(batch, 2.0)  # means 2 and 2: neither fails
    own = [t for t in trained_on if t.sample_id < 0]
    assert [t.reward for t in own] == [5, 2.5, 4] and not any(t.parent for t in trained_on)
    edits = [t for t in batch if t.parent]
    for t, edit in zip(own, edits, strict=True):
        assert t.prompt.ids == edit.context_ids and edit.prompt.ids != edit.context_ids
    assert len({t.key for t in trained_on}) == len(trained_on) == 7
    injected = [t for t in golf.golf_batch(batch, 2.1) if t.parent]
    assert [t.reward for t in injected] == [5, 4] and all(t in edits for t in injected)
    found = dict(zip(map(id, trained_on), each(golf.group_advantages(trained_on))))
    # one refinement is no group; of two, the mean is 3.25 and the spread 0.75
    assert [found[id(t)] for t in own] == pytest.approx([0, -0.75 / 0.8, 0.75 / 0.8])
    with_injected = golf.golf_batch(batch, 2.1)
    found = each(golf.group_advantages(with_injected))
    against_originals = [a for t, a in zip(with_injected, found) if t.parent]
    assert against_originals == pytest.approx([3 / 1.05, 2])


def test_hints_fade_and_are_trained_under_the_hinted_prompt(module, world, trained):
    hinted = module("hinted")
    args = hinted.Args(hint_steps=4, edit_rate=0.5)
    assert [hinted.with_hint_rate(args, step).edit_rate for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0, 0]
    rollout = Rollout(2, two_prompts(world), [], (0, 0))
    batch, selected = hinted.select(rollout, args, 0, world.ranks)
    hints = [t for t in batch if t.sample_id < 0]
    assert [t.prompt.ids for t in hints] == [t.context_ids for t in rollout.judged if t.parent]
    assert len(selected) == len(hints) == 3 and not any(t.parent for t in batch)
    _, tokens = run_pass(hinted, world, batch_of(hints[:1]), hinted.Args(temperature=1.0))
    alone = logprobs_alone(world, rollout.judged[2].context_ids, hints[0].response_ids)
    assert torch.allclose(tokens.logprobs, alone, atol=1e-4)
    batch, _ = hinted.select(rollout, hinted.Args(hint_in_training=False), 0, world.ranks)
    assert sorted(map(id, batch)) == sorted(map(id, rollout.judged))  # edits under x
    assert any(row["edit"] for row in rollouts(trained("hinted"), 1))
    assert not any(row["edit"] for row in rollouts(trained("hinted"), 2))


def some_logits():
    return torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def test_k3_in_expectation(module):
    """Over all tokens, weighted by their probability: its value is KL(pi || reference), and as a loss it has the
    gradient of KL(reference || pi)."""
    k3 = module("kl").k3
    logits = some_logits()
    reference = some_logits().detach().flip(0).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    assert (p * k3(reference - logp)).sum().item() == pytest.approx((p * (logp - reference)).sum().item())
    (found,) = torch.autograd.grad((p * k3(reference - logp)).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((reference.exp() * (reference - logp)).sum(), logits)
    assert torch.allclose(found, expected) and found.norm() > 0.1
    assert k3(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_kl_term_is_added_for_originals(module, world):
    kl = module("kl")
    trajectories = two_prompts(world)[1:3]
    batch = batch_of(trajectories)  # without advantages: nothing but the term has a gradient
    reference = {t.key: torch.full((len(t.response_ids),), -2.0) for t in trajectories}
    found, tokens = run_pass(kl, world, batch, kl.Args(temperature=1.0, kl_beta=0.5), reference=reference)
    assert not tokens.loss[tokens.is_edit].any()
    original = trajectories[0]
    logprobs = logprobs_alone(world, original.prompt.ids, original.response_ids)
    loss = 0.5 * ((-2.0 - logprobs).exp() - 1 + 2.0 + logprobs).sum()
    assert torch.allclose(found, gradient_of(world.policy, loss), atol=1e-4, rtol=1e-4) and found.norm() > 0.1


def test_the_kl_is_zero_before_the_first_update(trained):
    first, second = (step["original/reference_kl"] for step in read_metrics(trained("kl")))
    assert first < 1e-9 < second


def test_the_entropy_term_in_expectation(module):
    logits = some_logits()
    logp = logits.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    term = module("entropy").entropy_term(logp, entropy.detach())
    (found,) = torch.autograd.grad((logp.exp().detach() * term).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(entropy, logits)
    assert torch.allclose(found, expected) and found.norm() > 0.1


def test_the_entropy_term_is_added_for_originals(module, world):
    script = module("entropy")
    batch = batch_of(two_prompts(world)[1:3])
    _, tokens = run_pass(script, world, batch, script.Args(temperature=1.0, entropy_bonus=0.5))
    expected = 0.5 * (tokens.logprobs + tokens.entropy) * tokens.logprobs
    assert torch.allclose(tokens.loss, torch.where(tokens.is_edit, 0.0, expected))
    assert not tokens.loss[tokens.is_edit].any() and tokens.loss.any()


@pytest.mark.parametrize("name", ["kl", "entropy"])
def test_a_term_of_weight_zero_changes_no_bit(name, module, world):
    trajectories = two_prompts(world)
    batch = batch_of(trajectories, [torch.full((len(t.response_ids),), t.reward) for t in trajectories])
    expected, _ = run_pass(ppo_cpe, world, batch, ppo_cpe.Args(temperature=0.9))
    script = module(name)
    if name == "kl":
        reference = {t.key: torch.full((len(t.response_ids),), -2.0) for t in trajectories}
        found, _ = run_pass(script, world, batch, script.Args(temperature=0.9, kl_beta=0), reference=reference)
    else:
        found, _ = run_pass(script, world, batch, script.Args(temperature=0.9, entropy_bonus=0))
    assert torch.equal(found, expected)


def test_rltf_fm_learns_critiques_after_the_answer_and_a_request(module, world):
    script = module("rltf_fm")
    batch = two_prompts(world)
    batch[0].judgement = Judgement("Name the tea, Kim.", 1, 1, 1)
    batch[1].judgement = Judgement(" ", 1, 1, 1)  # nothing to learn
    args = script.Args(feedback_weight=0.25)
    world.policy.zero_grad()
    script.feedback_backward(world.policy, batch_of(batch), (world.chat, world.templates), args, world.ranks)
    found = torch.cat([p.grad.flatten() for p in world.policy.parameters()])
    chat = world.chat
    sequences = []
    for t in (batch[0], batch[3], batch[5]):
        request = chat.turn("user", script.FEEDBACK_REQUEST)
        context = [*t.prompt.ids, *t.response_ids, *chat.after_turn, *request, *chat.header]
        critique = [*chat.encode(t.critique), chat.turn_end]
        sequences.append((context + critique, [False] * len(context) + [True] * len(critique)))
    loss, _, packed = training.nll(world.policy, sequences, world.ranks.device)
    expected = gradient_of(world.policy, 0.25 * loss / sum(packed.counts))
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4) and found.norm() > 0.01


class Said(Judge):
    """A judge that has these verdicts ready when it is told to."""

    lowest_reward = -5.0

    def submit(self, key, row, answer, seed):
        self.pending += 1

    def say(self, key, judgement):
        self.finish(Verdict(key, None if judgement is None else judgement.score(), judgement), failed=judgement is None)

    def advance(self):
        pass


def test_two_calls_of_the_judge(module):
    """The critique of one, the scores of the other; what does not parse is scored 0, and criticized as None."""
    critiques, scores = Said(), Said()
    judge = module("released_paper").TwoCalls(critiques, scores, (0.35, 0.4, 0.25))
    good = Judgement("Say tea.", 5, 5, 5)
    other = Judgement("Say coffee.", 1, 1, 1)
    for key in "abc":
        judge.submit(key, {}, "Tea.", 0)
    for key, critique, score in (("a", good, other), ("b", None, other)):
        critiques.say(key, critique)
        scores.say(key, score)
    critiques.say("c", good)
    a, b = judge.poll()
    assert judge.busy  # c waits for its scores
    scores.say("c", None)
    (c,) = judge.poll()
    found = [(v.key, v.reward, v.judgement.critique) for v in (a, b, c)]
    assert found == [("a", 1, "Say tea."), ("b", 1, "None"), ("c", 0, "Say tea.")]
    assert not judge.busy and judge.take_counts() == (6, 2) and judge.lowest_reward == -5


def test_sdpo_divergence(module):
    divergence = module("sdpo").divergence
    one = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    found = divergence(one, other)
    assert found[0] == 0 and torch.allclose(found, divergence(other, one))
    assert found[1].item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))  # by hand: m = (.5, .5)


def test_sdpo_learns_from_its_teacher_where_answers_fail(module, world):
    script = module("sdpo")
    trajectories = [t for t in two_prompts(world) if t.parent is None][:2]  # rewards 1 and 3
    args = script.Args(temperature=1.0, success_reward=2.0)
    told = {t.key: script.told_prompt(t, world.chat, world.templates, args) for t in trajectories}
    text = world.chat.decode(told[trajectories[0].key])
    assert text.count("user") == 1 and "What to drink at 0?" in text and "Say it shorter." in text
    more = dict(teacher=world.policy, told=told)
    found, tokens = run_pass(script, world, batch_of(trajectories), args, **more)
    n = len(trajectories[0].response_ids)
    assert tokens.loss[:n].all() and not tokens.loss[n:].any() and found.norm() > 0
    alone = logprobs_alone(world, trajectories[0].prompt.ids, trajectories[0].response_ids)
    assert torch.allclose(tokens.logprobs[:n], alone, atol=1e-4)
    same = {t.key: t.prompt.ids for t in trajectories}  # a teacher that knows no more than the policy
    _, tokens = run_pass(script, world, batch_of(trajectories), args, teacher=world.policy, told=same)
    assert tokens.loss.abs().max() < 1e-6


def test_srpo_divides_answers_between_two_losses(module, world):
    """The failed answer has SDPO's loss, with weights of mean 1, and the other one GRPO's."""
    sdpo, srpo = module("sdpo"), module("srpo")
    trajectories = [t for t in two_prompts(world) if t.parent is None][:2]  # rewards 1 and 3
    n = len(trajectories[0].response_ids)
    advantages = srpo.group_advantages(trajectories)
    batch = batch_of(trajectories, advantages)
    batch.old_logprobs = [None, None]
    args = dict(temperature=1.0, success_reward=2.0, teacher_prompt="edit")
    told = {t.key: srpo.told_prompt(t, world.chat, world.templates, srpo.Args(**args)) for t in trajectories}
    for t in trajectories:  # it reads the answer and the critique
        expected = edit_prompt(world.chat, world.templates, t.prompt.ids, t.response_ids, t.critique)
        assert told[t.key] == expected
    more = dict(teacher=world.policy, told=told)
    _, distilled = run_pass(sdpo, world, batch, sdpo.Args(**args), **more)
    found, tokens = run_pass(srpo, world, batch, srpo.Args(**args), **more)
    assert torch.allclose(tokens.loss[n:], -advantages[1])  # the ratio is 1
    weights = tokens.loss[:n] / distilled.loss[:n]
    assert weights.mean().item() == pytest.approx(1, abs=1e-5) and weights.std() > 0 and found.norm() > 0


def test_srpo_trusts_a_teacher_that_is_sure(module):
    sure, unsure = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    teacher = torch.stack([sure, unsure, unsure]).clamp(min=1e-30).log()
    found = module("srpo").confidence(teacher, [2, 1])
    assert torch.allclose(found, torch.tensor([4 / 3, 2 / 3, 1.0]))  # by hand: exp(-H) is 1, 1/2; an answer alone: 1


@pytest.mark.parametrize("name, n_answers", [("sdpo", 1), ("srpo", 2)])
def test_which_answers_tokens_the_mean_is_over(name, n_answers, module, world, monkeypatch):
    """SDPO's: of those that fail; SRPO trains the others as well."""
    script, divisors = module(name), []

    class Seen(Exception):
        pass

    def backward(model, one_pass, micro_batches, batch, n_tokens, args, ranks):
        divisors.append(n_tokens)
        raise Seen

    monkeypatch.setattr(script, "backward", backward)
    trajectories = [t for t in two_prompts(world) if t.parent is None][:2]  # rewards 1 and 3
    args = script.Args(success_reward=2.0, critic_warmup_steps=0)
    models = {"policy": world.policy, "teacher": world.policy}
    with pytest.raises(Seen):
        script.update(models, {}, batch_of(trajectories), {}, args, SimpleNamespace(ranks=world.ranks, step=1))
    assert divisors == [sum(len(t.response_ids) for t in trajectories[:n_answers])]


def test_sdpo_averages_its_teacher(trained):
    """With a rate of 1 it becomes the policy."""
    run = trained("sdpo")
    policy, teacher = (load_file(run / name / "model.safetensors") for name in ("policy", "teacher"))
    assert all(torch.equal(policy[name], teacher[name]) for name in policy)


def test_sdpo_continues_to_the_same_numbers(tiny, exp, tmp_path):
    """Its teacher is in the checkpoints."""
    flags = [*flags_of(tiny, tmp_path), "--success-reward", 100, "--lr", 1e-3]
    for out, steps in (("whole", 2), ("continued", 1), ("continued", 2)):
        run_script(exp / "sdpo.py", *flags, "--out", tmp_path / out, "--max-steps", steps)
    names = ("policy", "teacher")
    whole, continued = (
        [load_file(tmp_path / out / name / "model.safetensors") for name in names] for out in ("whole", "continued")
    )
    for expected, found in zip(whole, continued, strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(*(weights["model.norm.weight"] for weights in whole))


# -- rows from rollouts ------------------------------------------------------------------------------------------------


def test_pairs_of_edits_and_of_the_best(tmp_path):
    def row(name, sample_id, answer, reward, edit=None):
        cut = answer.startswith("cut")
        made = edit and dict(answer=edit[0], reward=edit[1], selected=True, truncated=edit[0].startswith("cut"))
        prompt = dict(prompt_id=name, persona={"drink": "tea"}, question="What?", reference="x")
        about = dict(answer=answer, reward=reward, truncated=cut, critique="Say tea.", edit=made)
        return dict(prompt, sample_id=sample_id, **about)

    steps = [
        [row("a", 0, "low", 1.0, ("lower", 0.5)), row("a", 1, "middle", 2.0, ("high", 3.0))],
        [row("a", 0, "again", 1.0), row("b", 0, "same", 1.0), row("b", 1, "as good", 1.0, ("also", 1.0))],
        [row("c", 0, " ", -1.0, ("words", 2.0))],
        [row("d", 0, "whole", 1.0, ("cut of", 5.0)), row("d", 1, "cut sho", 0.0)],
    ]
    for i, rows in enumerate(steps, 1):
        write_rows(str(tmp_path / "rollouts" / f"step_{i:06d}.jsonl"), rows)
    run_script("recipes/edit_pairs.py", tmp_path, "--out", tmp_path / "edits")
    found = {}
    for name in ("gained", "best", "best_original"):
        path = tmp_path / "edits" / f"{name}.jsonl"
        lines = path.read_text().splitlines()
        found[name] = [(r["prompt_id"], r["chosen"], r["rejected"]) for r in map(json.loads, lines)]
    assert found == {
        "gained": [("a", "high", "middle")],
        "best": [("a", "high", "lower")],
        "best_original": [("a", "middle", "low")],
    }
    assert "no rollouts there" in run_script("recipes/edit_pairs.py", tmp_path / "edits", status=2)


def test_edits_of_the_start_policy_train_dpo_and_sft(tiny, tmp_path):
    """A run that trains its critic alone leaves the policy as it is, and writes rollouts."""
    frozen = ("--critic-warmup-steps", 3, "--max-steps", 3, "--edit-rate", 1)
    run_script("ppo_cpe.py", *flags_of(tiny, tmp_path), *frozen)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny / "checkpoint", tmp_path / "run/policy")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    for file in (tmp_path / "run" / "rollouts").iterdir():  # as if the model, which is random, had come to an end
        file.write_text(file.read_text().replace('"truncated": true', '"truncated": false'))
    run_script("recipes/edit_pairs.py", tmp_path / "run", "--out", tmp_path / "edits")
    more = ("--model", tiny / "checkpoint", "--answer-template", tiny / "answer.txt", "--batch-size", 2)
    for script, name in (("dpo.py", "gained"), ("sft.py", "best"), ("sft.py", "best_original")):
        out = tmp_path / script.removesuffix(".py") / name
        data = tmp_path / "edits" / f"{name}.jsonl"
        run_script(script, *more, "--data", data, "--out", out, "--max-steps", 1)
        assert (out / "policy").exists()


def test_another_reward(tiny, tmp_path):
    """The function of the page is a judge for edits: its critique is followed by a second score."""
    (code,) = re.findall(r"```python\n(.*?)```", fork.read("docs/forking.md"), re.DOTALL)
    flags = flags_of(tiny, tmp_path, code)
    rows = [dict(prompt_id=f"p{i}", persona={"food": "soup"}, question=f"What to eat {i}?") for i in range(8)]
    write_rows(str(tmp_path / "prompts.jsonl"), rows)
    flags[flags.index("--prompts") + 1] = tmp_path / "prompts.jsonl"
    flags[-1] = f"{tmp_path / 'judge.py'}:brief"
    run_script("ppo_cpe.py", *flags)
    lines = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["edit"]]
    assert rows and all(row["critique"] == "Name one of these: soup." and row["edit"]["answer"] for row in rows)
    assert all(row["personalization"] == -5 for row in rows)


# -- a copy in a folder of one's own, however it is started ------------------------------------------------------------

STARTS = {
    "file": [sys.executable, "exp/mine.py"],
    "module": [sys.executable, "-m", "exp.mine"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "exp.mine"],
}


@pytest.mark.parametrize("start", STARTS)
def test_a_copy_in_a_folder_runs(start, tmp_path):
    """Started from the project's root: here a copy of it, whose modules are links."""
    for name in os.listdir(ROOT):
        if name not in ("exp", "out") and not name.startswith("."):
            (tmp_path / name).symlink_to(os.path.join(ROOT, name))
    (tmp_path / "exp").mkdir()
    shutil.copy(os.path.join(ROOT, "ppo_cpe.py"), tmp_path / "exp" / "mine.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [*STARTS[start], "--model", "nowhere", "--prompts", "nowhere.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # all is imported before the model is looked for
    assert done.returncode != 0 and "error: " in done.stderr and "nowhere" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_copy_of_any_stage_finds_the_modules(stage):
    with open(os.path.join(ROOT, f"{stage}.py"), encoding="utf-8") as f:
        before, _, _ = f.read().partition("\nfrom runtime import flags\n")
    assert "\nsys.path.append(os.getcwd())" in before
