"""ppo_cpe.py as a user runs it: every judge and loss, two processes, killed and continued, bad input."""

import json
import math
import random
import re
import shutil
import time
import zlib

import pytest
import torch
from conftest import finish, launch, read_metrics, run_script
from safetensors.torch import load_file
from test_judge_servers import FaultyServer, Quiet

import ppo_cpe
import replay
import report
from chat import Chat
from engine import Engine
from judges import Verdict
from model import load_pretrained
from prompts import Judgement, answer_prompt, judgement_text, load_templates
from reporting import figures
from runtime.distributed import start
from runtime.rows import write_rows
from trajectory import Prompt


def flags_of(tiny, judge):
    return [
        "--model",
        tiny / "checkpoint",
        "--judge",
        judge,
        "--prompts",
        tiny / "prompts.jsonl",
        "--answer-template",
        tiny / "answer.txt",
        "--edit-template",
        tiny / "edit.txt",
        "--grm-template",
        tiny / "grm.txt",
        "--prompts-per-step",
        4,
        "--mini-batch-prompts",
        2,
        "--n-samples",
        2,
        "--max-new-tokens",
        12,
        "--temperature",
        1,
        "--top-p",
        1,
        "--judge-max-new-tokens",
        64,
        "--lr",
        1e-4,
        "--critic-lr",
        1e-4,
        "--tokens-per-microbatch",
        300,
        "--save-every",
        2,
    ]


@pytest.fixture(scope="module")
def judge(tiny):
    """A judge that writes well-formed judgements, of random scores, on whatever a random policy says: tiny/judge."""
    rng, rows = random.Random(0), []
    words = " ".join((tiny / "pairs.jsonl").read_text().split()[:200]).replace('"', "").split()
    for i in range(256):
        scores = {name: rng.randint(-5, 5) for name in ("helpfulness", "personalization", "naturalness")}
        critique = rng.choice(["Name tea and drop the end.", "Keep it as it is.", "Say it shorter."])
        rows.append(
            dict(
                prompt_id=f"j{i}",
                persona={"name": f"Kim {i}"},
                question=rng.choice(words),
                answer=" ".join(rng.choices(words, k=rng.randint(1, 12))),
                critique=critique,
                **scores,
            )
        )
    write_rows(str(tiny / "random_judgements.jsonl"), rows)
    run_script(
        "train_grm.py",
        "--model",
        tiny / "checkpoint",
        "--data",
        tiny / "random_judgements.jsonl",
        "--grm-template",
        tiny / "grm.txt",
        "--batch-size",
        32,
        "--epochs",
        25,
        "--lr",
        5e-3,
        "--out",
        tiny / "judge",
    )
    return tiny / "judge" / "model"


@pytest.fixture(scope="module")
def whole(tiny, judge, tmp_path_factory):
    """An uninterrupted run of five steps."""
    out = tmp_path_factory.mktemp("ppo") / "run"
    run_script("ppo_cpe.py", *flags_of(tiny, judge), "--max-steps", 5, "--out", out)
    return out


def test_a_step_does_what_the_method_says(whole):
    metrics = read_metrics(whole)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    rows = [json.loads(line) for line in (whole / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    first = metrics[0]
    assert len(rows) + first["lost/originals"] == 4 * 2
    edits = [r["edit"] for r in rows if r["edit"]]
    # --edit-rate 0.5: one of the two originals of each prompt, unless it was dropped
    edited = [r["prompt_id"] for r in rows if r["edit"]]
    assert len(set(edited)) == len(edited) and 0 < len(edits) + first["lost/edits"] <= 4
    assert all(e["selected"] for e in edits)
    assert first["batch"] == len(rows) + len(edits)
    lost = whole / "lost" / "step_000001.jsonl"
    lost = [json.loads(line) for line in lost.read_text().splitlines()] if lost.exists() else []
    sampled = [*rows, *edits, *(row["edit"] or row for row in lost)]
    assert first["generated_tokens"] == sum(response["n_tokens"] for response in sampled)
    assert first["original/edited"] == pytest.approx(len(edits) / len(rows))
    assert first["edit/gain"] == pytest.approx(
        sum(r["edit"]["reward"] - r["reward"] for r in rows if r["edit"]) / len(edits), abs=1e-9
    )
    # the same weights in engine and trainer; 1e-4 is some hundred fp32 roundings of a log-prob near 5
    assert first["train_inference_mismatch_max"] < 1e-4
    assert first["policy_loss"] is not None and first["value_loss"] > 0 and first["grad_norm_policy"] > 0
    assert 0 <= first["weight_sync_error"] < 1e-4
    # a prompt counts once for each of its responses, and is computed once
    assert first["computed_tokens"] < first["trained_tokens"] < 4 * first["computed_tokens"]
    assert first["mfu"] is None  # a CPU's peak is not known
    kinds = [f"{kind}/{name}" for kind in ("original", "edit") for name in ("ratio", "ratio_max", "clipfrac")]
    assert all(first[name] is not None for name in [*kinds, "value_clipfrac", "explained_variance"])


def test_tokens_of_a_few_answers_are_kept(whole):
    """--log-tokens is 4 by default: of as many answers a step, and of their trained edits, what the update did."""
    found = [json.loads(line) for line in (whole / "tokens" / "step_000001.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (whole / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    rows = {(row["prompt_id"], row["sample_id"]): row for row in rows}
    assert len({(t["prompt_id"], t["sample_id"]) for t in found}) == sum(not t["edit"] for t in found) == 4
    trained = [key for key, row in rows.items() if row["edit"] and row["edit"]["selected"]]
    assert sum(t["edit"] for t in found) == min(4, len(trained)) > 0  # these come first
    for tokens in found:
        row = rows[tokens["prompt_id"], tokens["sample_id"]]
        response = row["edit"] if tokens["edit"] else row
        lists = {name: tokens[name] for name in ("text", "logp", "logq", "weight", "advantage")}
        assert {len(values) for values in lists.values()} == {response["n_tokens"]}
        assert "".join(tokens["text"]).removesuffix("<|im_end|>") == response["answer"]
        assert all(logp <= 0 for logp in tokens["logp"]) and ("kept" in tokens) == tokens["edit"]
        if tokens["edit"]:  # unclipped, far below the cap: the weight is r
            ratio = [math.exp(p - q) for p, q in zip(tokens["logp"], tokens["logq"])]
            assert tokens["weight"] == pytest.approx(ratio, rel=1e-2, abs=1e-4)  # four digits were kept
    first = [t for t in found if not t["edit"] and t["logp"] == t["logq"]]  # of the first mini-batch: r is 1
    assert first and all(set(t["weight"]) == {1.0} for t in first)


def test_mfu_of_a_peak_that_is_given(tiny, judge, tmp_path):
    flags = [*flags_of(tiny, judge), "--max-steps", 1, "--out", tmp_path / "run", "--peak-tflops", 0.05, "--offload"]
    run_script("ppo_cpe.py", *flags)
    (metrics,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # 4 + 2 passes' worth over some 1,000 tokens of a model of 100,000 weights: far from 0 and below 1 at 50 GFLOP/s
    assert 1e-5 < metrics["mfu"] < 1
    assert metrics["peak_memory_gib"] > 0.1 and metrics["trained_tokens_per_second"] > 0
    assert all(metrics[f"seconds/{phase}"] > 0 for phase in ("sync_weights", "rollout", "score", "update"))


@pytest.mark.parametrize("in_process", [False, True])
def test_who_waits_for_a_straggler(tiny, in_process):
    """One answer goes on for long after the others: their critiques and edits are finished before it, unless the judge
    waits for its turn."""
    events = []

    class Recorded(Engine):
        def submit(self, prompt_ids, key, **settings):
            super().submit(prompt_ids, key, **settings | {"max_new_tokens": 120 if key == 0 else 6})

        def collect(self):
            samples = super().collect()
            events.extend((s.key, s.index) for s in samples)
            return samples

    class AtOnce:
        pending = ()
        in_process = False
        busy = property(lambda self: bool(self.pending))

        def submit(self, key, row, answer, seed):
            self.pending += (Verdict(key, 1.0, Judgement("Say it shorter.", 1, 1, 1), 1, None),)

        def poll(self):
            verdicts, self.pending = self.pending, ()
            return verdicts

        def take_counts(self):
            return 16, 0

    chat, templates = (
        Chat(str(tiny / "checkpoint")),
        load_templates(None, *(str(tiny / f"{n}.txt") for n in ("answer", "edit", "grm"))),
    )
    rows = [json.loads(line) for line in (tiny / "prompts.jsonl").read_text().splitlines()[:4]]
    prompts = [Prompt(index=i, row=row, ids=answer_prompt(chat, templates, row)) for i, row in enumerate(rows)]
    engine = Recorded(load_pretrained(str(tiny / "checkpoint")), [], 400)
    args = ppo_cpe.Args(n_samples=2, edit_rate=1, temperature=1.0, top_p=1.0, max_new_tokens=120)
    judge = AtOnce()
    judge.in_process = in_process
    asked = dict(engine=engine, judge=judge, chat=chat, templates=templates, show=events.count)
    responses = ppo_cpe.rollout(prompts, args, 0, **asked)
    assert len(responses.judged) == 16 and not responses.dropped
    # 2 x 4 originals and their edits; the straggler is the first prompt's
    straggler = min(events.index((0, i)) for i in range(2))
    assert straggler == (6 if in_process else 12)
    edits = events[8:] if in_process else events[6:12]
    assert all(key[2] for key, _ in edits)


def test_one_endless_critique_costs_its_edit_alone(tiny, tmp_path):
    """Its edit prompt has no room in the engine. The run goes on, and says what became of it."""
    (tmp_path / "my.py").write_text(
        "from prompts import Judgement\n\n\ndef judge(row, answer) -> Judgement:\n"
        "    endless = row['prompt_id'] in ('p1', 'p2', 'p10')\n"
        "    return Judgement('Say it shorter. ' * (2000 if endless else 1), len(answer) % 6, 0, 0)\n"
    )
    flags = [*flags_of(tiny, f"{tmp_path}/my.py:judge"), "--edit-rate", 1, "--max-steps", 1, "--prompts-per-step", 16]
    run_script("ppo_cpe.py", *flags, "--out", tmp_path / "run")
    (metrics,) = read_metrics(tmp_path / "run")
    lost = [json.loads(line) for line in (tmp_path / "run/lost/step_000001.jsonl").read_text().splitlines()]
    assert len(lost) == metrics["lost/edits"] == 32 - metrics["original/edited"] * 32 > 0
    assert all("an edit prompt of " in row["edit"]["drop_reason"] for row in lost)
    assert metrics["lost/originals"] == 0 and metrics["grad_norm_policy"] > 0


@pytest.fixture(scope="module")
def watched(tiny, judge, tmp_path_factory):
    """The first three steps of `whole` with all diagnostics."""
    out = tmp_path_factory.mktemp("watched") / "run"
    run_script(
        "ppo_cpe.py",
        *flags_of(tiny, judge),
        "--max-steps",
        3,
        "--out",
        out,
        "--eval-data",
        tiny / "prompts_other.jsonl",
        "--eval-every",
        2,
        "--eval-n",
        5,
        "--audit-share",
        0.5,
        "--audit-judge",
        tiny / "judge" / "model",
        "--save-batch",
        2,
    )
    return out


def test_diagnostics_change_nothing_in_the_training(whole, watched):
    for plain, seen in zip(read_metrics(whole), read_metrics(watched)):
        for name in plain:
            assert seen[name] == (plain[name] if plain[name] is None else pytest.approx(plain[name], abs=1e-4)), name


def test_what_diagnostics_see(watched):
    metrics = read_metrics(watched)
    assert ["held_out/swap" in m for m in metrics] == [True, False, True]
    first = metrics[0]
    rows = [json.loads(line) for line in (watched / "held_out" / "step_000001.jsonl").read_text().splitlines()]
    assert 0 < len(rows) <= 5 and all(row["sample_id"] == 0 for row in rows)
    assert first["held_out/original/reward"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
    gains = [row["edit"]["reward"] - row["reward"] for row in rows if row["edit"]]
    assert first["held_out/edit/gain"] == pytest.approx(sum(gains) / len(gains))
    audited = [json.loads(line) for line in (watched / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    audited = [row for row in audited if "audit" in row and row["audit"]["again"] is not None]
    # half of the originals, less those whose second judgement did not parse; the same judge, with the same seeds
    assert 0 < len(audited) <= 4 and all(row["audit"]["again"] == row["audit"]["second"] for row in audited)
    assert first["audit/noise"] == pytest.approx(
        sum(abs(row["reward"] - row["audit"]["again"]) for row in audited) / len(audited)
    )
    assert (
        first["edit/kept_gradient_mass"] >= 0
        and first["edit/inserted_gradient_mass"] > 0
        and 0 <= first["edit/kept"] < 1
    )


@pytest.mark.parametrize("name", ["batch.json", "batch.safetensors", "policy/model.safetensors"])
def test_a_batch_that_was_changed_is_not_replayed(watched, tmp_path, name):
    """A number of it: the printed gradients would be those of no run."""
    shutil.copytree(watched / "batch_000002", tmp_path / "batch")
    file = tmp_path / "batch" / name
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    if name == "batch.json":
        content = re.sub(rb'"reward": [-\d.]+', b'"reward": 9.5', file.read_bytes(), count=1)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="batch: not what --save-batch wrote"):
        replay.load_batch(str(tmp_path / "batch"))


def test_replay_gives_the_gradients_of_the_update(watched, capsys):
    gradients = replay.replay(str(watched / "batch_000002"))
    script, args, batch = replay.load_batch(str(watched / "batch_000002"))
    policy = load_pretrained(str(watched / "batch_000002" / "policy"), torch.float32)
    n_tokens = sum(len(t.response_ids) for t in batch.trajectories)
    together, _ = replay.gradient(script, policy, batch, args, n_tokens, start("fp32"))
    # sums in another order: a wrong loss or count differs by tens of percent
    assert torch.allclose(gradients["originals"] + gradients["unclipped"], together, atol=1e-4 * together.abs().max())
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:]] == list(gradients)
    for name, g in gradients.items():
        assert f"{g.norm().item():.5f}" in printed, name


def test_figures_of_runs(whole, watched, tmp_path, capsys):
    figures.draw(report.read_runs([str(whole), str(watched)], 20), str(tmp_path))
    names = {f"by_{x}.{ending}" for x in ("step", "generated_tokens", "judge_calls") for ending in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "Held-out reward: originals, edits" in (tmp_path / "by_step.svg").read_text()


def test_policy_and_critic_are_saved_for_others(whole, tiny):
    start = load_file(tiny / "checkpoint" / "model.safetensors")
    policy, critic = (load_file(whole / name / "model.safetensors") for name in ("policy", "critic"))
    assert any(not torch.equal(policy[k], start[k]) for k in start)
    assert critic["score.weight"].abs().sum() > 0
    load_pretrained(str(whole / "policy"))
    load_pretrained(str(whole / "critic"), scalar_head=True)


def test_no_response_passes_the_positions_of_the_model(tiny, judge, tmp_path):
    """The tiny model has 512, and its prompts have more than one token."""
    flags = [*flags_of(tiny, judge), "--out", tmp_path / "out"]
    assert "expected fewer than the 512 of" in run_script("ppo_cpe.py", *flags, "--max-new-tokens", 512, status=2)
    text = run_script("ppo_cpe.py", *flags, "--max-new-tokens", 511, status=2)
    assert "0 prompts from" in text and "32 over 1 tokens left out" in text
    assert not (tmp_path / "out").exists()


def test_two_processes_give_the_losses_of_one(whole, tiny, judge, tmp_path):
    # with one held-out prompt: the second process has none
    held_out = ["--eval-data", tiny / "prompts_other.jsonl", "--eval-every", 2, "--eval-n", 1]
    finish(
        launch(
            "ppo_cpe.py", *flags_of(tiny, judge), "--max-steps", 3, "--out", tmp_path / "two", *held_out, processes=2
        )
    )
    for one, two in zip(read_metrics(whole), read_metrics(tmp_path / "two")):
        for name in ("policy_loss", "value_loss", "original/reward", "edit/reward", "entropy", "edit/ratio"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name
        assert two["batch"] == one["batch"] and two["generated_tokens"] == one["generated_tokens"]
    logged = []  # the same answers, as many as --log-tokens over both processes
    for folder in (whole, tmp_path / "two"):
        rows = map(json.loads, (folder / "tokens/step_000001.jsonl").read_text().splitlines())
        logged.append({(row["prompt_id"], row["sample_id"]) for row in rows})
    assert logged[0] == logged[1] and len(logged[0]) == 4


SAME_LOSSES = ("policy_loss", "value_loss", "original/reward", "edit/reward", "entropy", "edit/ratio", "batch")


def test_ranks_that_share_an_engine_give_the_losses_of_one(whole, tiny, judge, tmp_path):
    """The GRM is shared by two ranks like the policy. Held-out answers and audits are asked for by both alike."""
    checks = ["--eval-data", tiny / "prompts_other.jsonl", "--eval-every", 2, "--eval-n", 3, "--audit-share", 0.5]
    flags = [*flags_of(tiny, judge), "--max-steps", 3, *checks]
    one = launch("ppo_cpe.py", *flags, "--out", tmp_path / "one")
    two = launch("ppo_cpe.py", *flags, "--out", tmp_path / "two", "--tensor-parallel", 2, processes=2)
    finish(one)
    finish(two)
    names = [*SAME_LOSSES, "held_out/original/reward", "held_out/swap", "audit/noise", "judge_calls"]
    for ours, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert ours["weight_sync_error"] < 1e-4 and ours["train_inference_mismatch_max"] < 1e-4
        for name in names:
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4), name
        assert ours["generated_tokens"] == theirs["generated_tokens"]
    for ours in sorted((tmp_path / "two" / "rollouts").iterdir()):  # nothing is there twice
        theirs = tmp_path / "one" / "rollouts" / ours.name
        answers = [[json.loads(line)["answer"] for line in path.read_text().splitlines()] for path in (ours, theirs)]
        assert sorted(answers[0]) == sorted(answers[1])


DRAWN = """
import random
from prompts import Judgement

def judge(row, answer) -> Judgement:
    with open({asked!r}, "a") as f:
        f.write("once\\n")
    return Judgement("Say it shorter.", random.randint(-5, 5), 0, 0)
"""


def test_one_rank_of_each_engine_asks_a_function(tiny, judge, tmp_path):
    """Two engines of two ranks, and a judge that draws: all ranks of an engine get the same, or they would hang."""
    (tmp_path / "my.py").write_text(DRAWN.format(asked=str(tmp_path / "asked")))
    flags = [*flags_of(tiny, f"{tmp_path}/my.py:judge"), "--max-steps", 2, "--out", tmp_path / "run"]
    finish(launch("ppo_cpe.py", *flags, "--tensor-parallel", 2, processes=4))
    metrics = read_metrics(tmp_path / "run")
    assert [line["batch"] for line in metrics] == [12, 12]
    n_probed = 8
    assert (tmp_path / "asked").read_text().count("once") == n_probed + sum(line["judge_calls"] for line in metrics)


def test_a_killed_run_continues_bit_for_bit(whole, tiny, judge, tmp_path):
    out = tmp_path / "run"
    run = launch("ppo_cpe.py", *flags_of(tiny, judge), "--max-steps", 5, "--out", out)
    log, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 3:  # a checkpoint at 2, and a step beyond it
        assert run.ranks[0].is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    run.ranks[0].kill()
    run.ranks[0].join()
    assert (out / "checkpoints" / "step_000002").is_dir() and not (out / "checkpoints" / "step_000005").is_dir()
    assert "resumed from" in run_script("ppo_cpe.py", *flags_of(tiny, judge), "--max-steps", 5, "--out", out)
    assert read_metrics(out) == read_metrics(whole)
    for name in ("policy", "critic"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (out, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize(
    "changes",
    [
        ("--edit-loss", "paper", "--edit-strategy", "reward_rank"),
        ("--edit-loss", "tis", "--edit-strategy", "conditional", "--edit-baseline", "original"),
        ("--edit-loss", "luffy", "--edit-strategy", "batch_rank", "--truncated", "min_score"),
        ("--edit-loss", "none", "--edit-rate", 1, "--critic-warmup-steps", 1),
        ("--edit-rate", 0, "--n-samples", 3),
    ],
    ids=lambda c: " ".join(map(str, c)),
)
def test_every_option_runs(tiny, judge, tmp_path, changes):
    run_script("ppo_cpe.py", *flags_of(tiny, judge), "--max-steps", 2, "--out", tmp_path / "run", *changes)
    metrics = read_metrics(tmp_path / "run")
    if "--critic-warmup-steps" in changes:
        assert "policy_loss" not in metrics[0] and metrics[0]["value_loss"] > 0
    assert metrics[1]["grad_norm_policy"] > 0
    if "--n-samples" in changes:
        assert "edit/gain" not in metrics[1] and metrics[1]["batch"] <= 12


def test_a_second_epoch_compares_with_the_policy_that_sampled(tiny, judge, tmp_path):
    flags = [*flags_of(tiny, judge), "--edit-rate", 0, "--mini-batch-prompts", 4, "--max-steps", 1]
    for epochs in (1, 2):
        run_script("ppo_cpe.py", *flags, "--ppo-epochs", epochs, "--out", tmp_path / f"{epochs}")
    (once,), (twice,) = (read_metrics(tmp_path / f"{epochs}") for epochs in (1, 2))
    assert once["original/ratio_max"] == 1 and once["original/approx_kl"] == 0
    assert twice["original/ratio_max"] > 1.001 and twice["original/approx_kl"] > 1e-6


def test_truncated_responses_can_leave_the_batch(tiny, judge, tmp_path):
    # an untrained policy never ends its responses, so nothing is left
    assert "'lost/truncated': 8" in bad(tiny, judge, tmp_path, "--truncated", "drop")


def test_a_bradley_terry_judge(tiny, judge, tmp_path):
    bt = tmp_path / "bt"
    run_script(
        "train_grm.py",
        "--objective",
        "bt",
        "--model",
        tiny / "checkpoint",
        "--data",
        tiny / "pairs.jsonl",
        "--answer-template",
        tiny / "answer.txt",
        "--batch-size",
        8,
        "--max-steps",
        2,
        "--lr",
        1e-3,
        "--out",
        bt,
    )
    flags = [*flags_of(tiny, judge), "--judge", f"bt:{bt / 'model'}", "--max-steps", 1]
    assert "writes no critiques" in run_script("ppo_cpe.py", *flags, "--out", tmp_path / "no", status=2)
    flags += ["--edit-rate", 0, "--critic", bt / "model", "--out"]
    run_script("ppo_cpe.py", *flags, tmp_path / "yes")
    (metrics,) = read_metrics(tmp_path / "yes")
    assert metrics["original/reward"] is not None and metrics["batch"] == 8
    finish(launch("ppo_cpe.py", *flags, tmp_path / "shared", "--tensor-parallel", 2, processes=2))
    (shared,) = read_metrics(tmp_path / "shared")
    assert shared["original/reward"] == pytest.approx(metrics["original/reward"], abs=1e-4) and shared["batch"] == 8


REWARDS = """
from prompts import Judgement

def short(row, answer):
    return -len(answer) / 10

def critic(row, answer) -> Judgement:
    return Judgement("Say it shorter.", min(5, len(answer) % 6), 0, 0)

def content(row, answer) -> Judgement:
    return Judgement("", min(5, len(answer) % 6), 0, 0)
"""


def test_a_function_in_a_file_as_the_judge(tiny, judge, tmp_path):
    (tmp_path / "my.py").write_text(REWARDS)
    flags = [*flags_of(tiny, judge), "--max-steps", 1, "--judge"]
    run_script("ppo_cpe.py", *flags, f"{tmp_path}/my.py:short", "--edit-rate", 0, "--out", tmp_path / "ppo")
    (metrics,) = read_metrics(tmp_path / "ppo")
    rows = [json.loads(line) for line in (tmp_path / "ppo/rollouts/step_000001.jsonl").read_text().splitlines()]
    assert all(row["reward"] == -len(row["answer"]) / 10 for row in rows) and metrics["batch"] == 8
    run_script("ppo_cpe.py", *flags, f"{tmp_path}/my.py:critic", "--out", tmp_path / "cpe")
    (metrics,) = read_metrics(tmp_path / "cpe")
    assert metrics["batch"] == 12 and metrics["edit/gain"] is not None
    # an annotated one may have nothing to say of the first answers; else it is these that show
    run_script("ppo_cpe.py", *flags, f"{tmp_path}/my.py:content", "--out", tmp_path / "content")
    assert read_metrics(tmp_path / "content")[0]["batch"] == 8
    output = run_script("ppo_cpe.py", *flags, f"{tmp_path}/my.py:short", "--out", tmp_path / "no", status=2)
    assert (
        "my.py:short: no critique of 8 answers, which edits (--edit-rate > 0) need; --edit-rate 0 trains" in output
        and "Traceback" not in output
    )


def test_a_truncated_response_gets_the_lowest_reward_of_its_own_judge(tiny, judge, tmp_path):
    """Nothing of a function that returns numbers is known to be low: -5 would be the best of a batch."""
    (tmp_path / "my.py").write_text(REWARDS)
    flags = [*flags_of(tiny, judge), "--max-steps", 1, "--truncated", "min_score", "--judge"]
    output = run_script(
        "ppo_cpe.py", *flags, f"{tmp_path}/my.py:short", "--edit-rate", 0, "--out", tmp_path / "no", status=2
    )
    assert "my.py:short has no lowest reward, which --truncated min_score would give" in output
    weights = ("--score-weights", 2, 1, 1)
    run_script("ppo_cpe.py", *flags, f"{tmp_path}/my.py:critic", *weights, "--out", tmp_path / "yes")
    rows = [json.loads(line) for line in (tmp_path / "yes/rollouts/step_000001.jsonl").read_text().splitlines()]
    assert rows and all(row["reward"] == (-20 if row["truncated"] else 2 * (len(row["answer"]) % 6)) for row in rows)
    assert any(row["truncated"] for row in rows)


def bad(tiny, judge, tmp_path, *changes):
    output = run_script("ppo_cpe.py", *flags_of(tiny, judge), "--out", tmp_path / "run", *changes, status=2)
    assert "Traceback" not in output
    return output


def test_bad_input_ends_in_one_line(tiny, judge, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text((tiny / "prompts.jsonl").read_text().replace('"question"', '"questions"', 1))
    assert f'{broken}:1: field "question" is missing' in bad(tiny, judge, tmp_path, "--prompts", broken)
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: empty" in bad(tiny, judge, tmp_path, "--prompts", tmp_path / "empty.jsonl")
    short = bad(tiny, judge, tmp_path, "--max-prompt-length", 3)
    assert (
        "make less than one step of" in short and "set a smaller --batch-size (ppo_cpe.py: --prompts-per-step)" in short
    )
    assert "--edit-rate 1.5: it should be less than or equal to 1" in bad(tiny, judge, tmp_path, "--edit-rate", 1.5)
    assert "--save-batch 99: expected at most" in bad(tiny, judge, tmp_path, "--save-batch", 99)
    assert "an --audit-share above 0" in bad(tiny, judge, tmp_path, "--audit-judge", "world")
    assert "expected at least 512" in bad(tiny, judge, tmp_path, "--kv-tokens", 100)  # the positions of the model
    assert "--eval-every 0: it should be greater" in bad(tiny, judge, tmp_path, "--eval-every", 0)
    assert "127.0.0.1:9" in bad(tiny, judge, tmp_path, "--judge", "http://127.0.0.1:9/v1")
    assert "compares answers" in bad(tiny, judge, tmp_path, "--judge", f"pair:{tiny / 'checkpoint'}")
    (tmp_path / "my.py").write_text("def f(row, answer):\n    return row['nothing']\n")
    output = bad(tiny, judge, tmp_path, "--judge", f"{tmp_path}/my.py:f", "--edit-rate", 0)
    assert 'my.py:f, prompt "p' in output and "KeyError: 'nothing'" in output


def test_a_judge_that_never_parses_stops_the_run(tiny, judge, tmp_path):
    # a random model as the judge: nothing it writes is a judgement, and no score is made up for it
    assert "got a judgement; is it a reward model?" in bad(
        tiny, judge, tmp_path, "--judge", tiny / "checkpoint", "--max-steps", 1
    )


# -- a judge that goes down


class HashJudge(FaultyServer):
    """Scores each answer by a checksum; from request number `server.breaks_at` on it answers a page."""

    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        self.server.requests["all"].append(text)
        if len(self.server.requests["all"]) >= self.server.breaks_at:
            return self.reply(200, b"<html>Bad gateway</html>")
        scores = [zlib.crc32(f"{text}{i}".encode()) % 11 - 5 for i in range(3)]
        message = {"content": judgement_text("Say it in fewer words.", *scores)}
        self.reply(200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode())


@pytest.mark.parametrize(("processes", "sharing"), [(1, 1), (2, 1), (2, 2)])
def test_a_judge_that_goes_down_loses_no_step(tiny, tmp_path, processes, sharing):
    """It is waited for, then the run is saved where it is, between two checkpoints; and goes on to the same numbers."""
    server = Quiet(HashJudge)
    flags = [*flags_of(tiny, server.url), "--save-every", 100, "--max-steps", 3]
    flags += ["--tensor-parallel", sharing, "--out"]
    try:
        server.breaks_at = math.inf
        finish(launch("ppo_cpe.py", *flags, tmp_path / "whole", processes=processes))
        expected = read_metrics(tmp_path / "whole")
        after_two = len(server.requests["all"]) - expected[2]["judge_calls"]
        server.requests.clear()
        server.breaks_at = after_two + 2
        run = launch("ppo_cpe.py", *flags, tmp_path / "down", "--judge-patience", 2, processes=processes)
        said = finish(run, 2)
        assert "step 3: http://127.0.0.1:" in said and "has given no answer for 2 s (--judge-patience)" in said
        assert "Bad gateway" in said and "what is done is saved, the same command goes on" in said
        assert (tmp_path / "down/checkpoints/step_000002/state.json").exists()
        assert [line["step"] for line in read_metrics(tmp_path / "down")] == [1, 2]
        server.breaks_at = math.inf
        finish(launch("ppo_cpe.py", *flags, tmp_path / "down", processes=processes))
        found = read_metrics(tmp_path / "down")
        for name in ("reward", "original/reward", "edit/reward", "trained_tokens", "judge_calls"):
            # what runs together depends on when judgements arrive, and with it the rounding of log-probs, but not these
            assert [line.get(name) for line in found] == [line.get(name) for line in expected], name
    finally:
        server.end()
