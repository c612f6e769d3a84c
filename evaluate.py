"""Stage 4: the answers of a model against those of a baseline, by a judge (METHOD 4).

1. Draw `n_prompts` of the prompts and get both sides' answers: sampled from a model, or read from a
   file (--answers, --baseline-answers), or the prompts' own references (--baseline reference).
2. The judge scores every answer by itself: a generative reward model, a server, a Bradley-Terry
   model or the exact judge of the generated world (judges.py).
3. The side with the higher score wins a prompt, equal scores are half a win. A prompt of which an
   answer got no judgement is left out and counted.
4. One table: mean scores with their standard errors, win rate with a bootstrap interval, lengths.

OUT/answers_model.jsonl, answers_baseline.jsonl and verdicts.jsonl hold what was made, and
OUT/results.json the table's numbers. Each row carries `made_by`, a digest of all that it depends
on: a row with an unchanged digest is used again, so a repeated command does only what is missing.

Departure: the paper's judge sees both answers and names the better one; here each is scored alone.

    python evaluate.py                               # out/ppo_cpe/policy against out/sft/policy
    torchrun --nproc_per_node=8 evaluate.py --judge https://api.example.com/v1#NAME
    python evaluate.py --answers a.jsonl --baseline-answers b.jsonl --judge world
"""

import dataclasses
import glob
import json
import os
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from tqdm import tqdm

import common
from common import derive_seed, print0
from data import persona_world
from generate import Engine
from judges import open_judge
from model import load_config, load_pretrained, resolve
from prompts import Chat, answer_prompt, load_templates

DIMENSIONS = ("helpfulness", "personalization", "naturalness")


@dataclass
class Args:
    # -- who is compared, on what
    model: str = "out/ppo_cpe/policy"
    """Folder or hub id of the model."""
    answers: str | None = None
    """File of rows with `prompt_id, persona, question, answer`, instead of --model."""
    baseline: str = "out/sft/policy"
    """Folder or hub id | reference: the answers that the prompts bring along."""
    baseline_answers: str | None = None
    """File of answers, instead of --baseline."""
    prompts: str = "out/data/prompts_eval.jsonl"
    """Prompt rows."""
    n_prompts: int = 300
    """Drawn at random by the seed where the file has more."""
    out: str = "out/evaluate"
    """Folder of answers, verdicts and results.json."""
    answer_template: str | None = None
    """File that replaces the built-in prompt of the policy."""
    grm_template: str | None = None
    """File that replaces the built-in rubric of the judge."""

    # -- sampling of answers (METHOD 4; the length limit is that of RL)
    temperature: float = 0.8
    """Of the answers."""
    top_p: float = 0.9
    """Nucleus."""
    max_new_tokens: int = 2048
    """Tokens of an answer; what is cut off is judged as it stands, and counted."""
    seed: int = 0
    """Choice of prompts, answers, judgements, bootstrap."""

    # -- the judge
    judge: str = "out/grm/model"
    """PATH of a generative reward model | http(s)://... | bt:PATH | world (judges.py)."""
    judge_temperature: float = 0.0
    """0: its most likely judgement. Above 0, one that does not parse is asked again."""
    judge_attempts: int = 3
    """Judgements asked for before an answer is given up."""
    max_judgement_length: int = 512
    """Tokens of a judgement; what is cut off does not parse."""

    # -- the machine
    max_batch: int = 256
    """Sequences that are generated at once, per rank."""
    dtype: str = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""


# -- numbers ---------------------------------------------------------------------------------------


def mean_and_error(values):
    """{"mean", "standard_error"} of the values that are not None; None where those are too few."""
    values = [v for v in values if v is not None]
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)) if values else None, "standard_error": error}


def win_rate(rewards, baseline_rewards, seed, draws=10_000):
    """Share of prompts won, ties half, with a 95% bootstrap interval over the prompts.

    Rewards by prompt, None where there is no judgement: such a prompt is left out and counted.
    """
    pairs = [p for p in zip(rewards, baseline_rewards, strict=True) if None not in p]
    won = np.array([0.5 if ours == theirs else float(ours > theirs) for ours, theirs in pairs])
    result = dict(win_rate=None, low=None, high=None, wins=int((won == 1).sum()),
                  ties=int((won == 0.5).sum()), losses=int((won == 0).sum()),
                  left_out=len(rewards) - len(pairs))
    if pairs:
        rng = np.random.default_rng(seed)
        means = won[rng.integers(len(won), size=(draws, len(won)))].mean(1)  # [draws]
        low, high = np.quantile(means, [0.025, 0.975])
        result |= dict(win_rate=float(won.mean()), low=float(low), high=float(high))
    return result


def summarize(answers, verdicts):
    """One side's numbers, from its answer rows (`measured`) and verdict rows (`verdicts_on`)."""
    judged = {name: mean_and_error([v[name] for v in verdicts]) for name in (*DIMENSIONS, "reward")}
    names = ("n_characters", "n_tokens", "truncated", "recites_profile")
    counted = {name: mean_and_error([a[name] for a in answers]) for name in names}
    unjudged = sum(v["reward"] is None for v in verdicts)
    return judged | counted | dict(answers=len(answers), unjudged=unjudged)


def table(results):
    """The numbers of results.json as text."""
    labels = {**{name: name for name in DIMENSIONS}, "reward": "weighted score",
              "n_characters": "length, characters", "n_tokens": "length, tokens",
              "truncated": "truncated, %", "recites_profile": "recites the profile, %",
              "answers": "answers", "unjudged": "without a judgement"}

    def cell(value, scale):
        if not isinstance(value, dict):
            return str(value)
        mean, error = value["mean"], value["standard_error"]
        text = "-" if mean is None else f"{scale * mean:.2f}"
        return text if error is None else f"{text} ± {scale * error:.2f}"

    lines = [f"{'':24}{'model':>18}{'baseline':>18}"]
    for name, label in labels.items():
        scale = 100 if label.endswith("%") else 1
        cells = [cell(results[side][name], scale) for side in ("model", "baseline")]
        lines.append(f"{label:24}{cells[0]:>18}{cells[1]:>18}")
    won, rate = results["win_rate"], "none, for no prompt has two judgements"
    if won["win_rate"] is not None:
        low, mean, high = (f"{100 * won[name]:.1f}" for name in ("low", "win_rate", "high"))
        rate = f"{mean} % (95% interval {low} to {high})"
    counts = (f"{won['wins']} won, {won['ties']} tied, {won['losses']} lost, "
              f"{won['left_out']} left out")
    return "\n".join([*lines, f"win rate of the model: {rate}; {counts}"])


# -- what is made once and kept --------------------------------------------------------------------


def fingerprint(spec):
    """What a model or judge consists of: new weights under an old name count as another."""
    if spec.startswith(("http://", "https://")):
        return spec
    if spec == "world":
        files = [persona_world.__file__]
    else:
        folder = resolve(spec.removeprefix("bt:"))
        files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
        if not files:
            raise ValueError(f"{spec}: no *.safetensors there")
    return [(os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]


def make_missing(path, digests, make, ranks):
    """Rows for `digests`, in order: those that `path` holds, the rest from `make` on all ranks.

    make: indices into digests, this rank's -> {index: row}. Rows with an `error` are made again.
    """
    kept = common.read_rows(path, "object") if os.path.isfile(path) else []
    kept = {row.get("made_by"): row for row in kept if row.get("error") is None}
    missing = [i for i, digest in enumerate(digests) if digest not in kept]
    print0(f"{path}: {len(missing)} to make, {len(digests) - len(missing)} are there")
    mine = missing[ranks.rank :: ranks.world_size]
    made = dict(common.all_gather(ranks, make(mine).items() if mine else []))
    rows = [made[i] | {"made_by": d} if i in made else kept[d] for i, d in enumerate(digests)]
    if ranks.rank == 0 and missing:
        common.write_rows(path, rows)
    return rows


# -- answers: prompt rows with `answer` and, where it is known, `truncated` ------------------------


def sampled_answers(path, side, rows, templates, args, ranks):
    """Answers of a model. ValueError: a prompt that leaves no room for the answer."""
    chat, limit = Chat(path), load_config(resolve(path)).max_position_embeddings
    prompts = [answer_prompt(chat, templates, row) for row in rows]
    for row, prompt in zip(rows, prompts):
        if len(prompt) + args.max_new_tokens > limit:
            raise ValueError(
                f'prompt "{row["prompt_id"]}" has {len(prompt)} tokens: with --max-new-tokens '
                f"{args.max_new_tokens} that is over the {limit} positions of {path}")
    what = fingerprint(path), args.temperature, args.top_p, args.max_new_tokens, args.seed
    digests = [derive_seed(json.dumps(row), ids, *what) for row, ids in zip(rows, prompts)]

    def make(indices):
        model = load_pretrained(path, ranks.dtype, ranks.device)
        max_len = max(len(prompts[i]) for i in indices) + args.max_new_tokens
        engine = Engine(model, chat.stop_ids, max_len, args.max_batch)
        for i in indices:
            engine.submit(prompts[i], key=i, seeds=[derive_seed(args.seed, rows[i]["prompt_id"])],
                          max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                          top_p=args.top_p)
        made = {}
        with tqdm(total=len(indices), desc=f"answers of the {side}", disable=ranks.rank > 0) as bar:
            while engine.busy:
                engine.step()
                for sample in engine.collect():
                    truncated = sample.finish_reason == "length"
                    made[sample.key] = {**rows[sample.key], "answer": chat.decode(sample.ids),
                                        "truncated": truncated}
                    bar.update()
        return made

    return make_missing(os.path.join(args.out, f"answers_{side}.jsonl"), digests, make, ranks)


def given_answers(file, rows):
    """Answers from a file, by prompt_id. ValueError: a prompt has none, two, another question."""
    found = {}
    for line, row in enumerate(common.read_rows(file, "answer"), 1):
        if row["prompt_id"] in found:
            raise ValueError(f'{file}:{line}: a second answer to prompt "{row["prompt_id"]}"')
        found[row["prompt_id"]] = row
    for row in rows:
        given = found.get(row["prompt_id"])
        if given is None or given["question"] != row["question"]:
            problem = "no answer to it" if given is None else "it has another question there"
            raise ValueError(f'{file}: prompt "{row["prompt_id"]}": {problem}')
    return [found[row["prompt_id"]] for row in rows]


def reference_answers(file, rows):
    """The answers that prompts bring along. ValueError: a prompt without one."""
    for row in rows:
        if not isinstance(row.get("reference"), str):
            raise ValueError(f'{file}: prompt "{row["prompt_id"]}" has no reference; give '
                             "--baseline FOLDER or --baseline-answers FILE")
    return [{**row, "answer": row["reference"]} for row in rows]


def measured(rows, chat, judge):
    """Answer rows with what is counted in them; None where it is unknown.

    Tokens are those of one tokenizer (chat) for both sides; without one, what a row says.
    """
    result = []
    for row in rows:
        persona, answer = row["persona"], row["answer"]
        recites = persona_world.recites_profile(persona, answer) if judge == "world" else None
        n_tokens = len(chat.encode(answer)) if chat else row.get("n_tokens")
        result.append({**row, "n_characters": len(answer), "n_tokens": n_tokens,
                       "truncated": row.get("truncated"), "recites_profile": recites})
    return result


# -- verdicts --------------------------------------------------------------------------------------


def judge_of(args, templates, ranks):
    return open_judge(args.judge, templates, ranks, attempts=args.judge_attempts,
                      temperature=args.judge_temperature, max_batch=args.max_batch,
                      max_new_tokens=args.max_judgement_length)


def verdicts_on(answers, templates, args, ranks):
    """answers: {side: rows} -> {side: verdict rows}, in the same order.

    Both sides get the judge's same random numbers for a prompt: equal answers are a tie.
    """
    items = [(side, row) for side, rows in answers.items() for row in rows]
    what = (fingerprint(args.judge), templates, args.judge_temperature, args.judge_attempts,
            args.max_judgement_length, args.seed)
    texts = [[json.dumps(row[k]) for k in ("prompt_id", "persona", "question", "answer")]
             for _, row in items]
    digests = [derive_seed(side, *text, *what) for (side, _), text in zip(items, texts)]

    def make(indices):
        judge = judge_of(args, templates, ranks)
        for i in indices:
            _, row = items[i]
            judge.submit(i, row, row["answer"], derive_seed(args.seed, row["prompt_id"], "judge"))
        made = {}
        with tqdm(total=len(indices), desc="verdicts", disable=ranks.rank > 0) as bar:
            while judge.busy:
                for verdict in judge.poll():
                    side, row = items[verdict.key]
                    names = (*DIMENSIONS, "critique")  # None where the judge writes none
                    scores = {name: getattr(verdict.judgement, name, None) for name in names}
                    made[verdict.key] = dict(side=side, prompt_id=row["prompt_id"],
                                             reward=verdict.reward, **scores, error=verdict.error)
                    bar.update()
        return made

    rows = make_missing(os.path.join(args.out, "verdicts.jsonl"), digests, make, ranks)
    return {side: [row for row in rows if row["side"] == side] for side in answers}


def main(args):
    ranks = common.start(args.dtype)
    templates = load_templates(answer_template=args.answer_template, grm_template=args.grm_template)
    rows = common.read_rows(args.prompts, "prompt")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    rows = [rows[i] for i in sorted(order[: args.n_prompts].tolist())]

    # what is quick to refuse comes before any sampling: an absent judge, answers from files
    fingerprint(args.judge)
    if "://" in args.judge:
        judge_of(args, templates, ranks)
    folder, answers = {"model": args.model, "baseline": args.baseline}, {}
    for side, file in (("model", args.answers), ("baseline", args.baseline_answers)):
        if file is not None:
            answers[side] = given_answers(file, rows)
        elif folder[side] == "reference":
            answers[side] = reference_answers(args.prompts, rows)
    to_sample = [side for side in folder if side not in answers]
    chat = Chat(folder[to_sample[0]]) if to_sample else None
    for side in to_sample:
        answers[side] = sampled_answers(folder[side], side, rows, templates, args, ranks)
    answers = {side: measured(answers[side], chat, args.judge) for side in folder}
    if ranks.rank == 0:
        for side in folder:
            common.write_rows(os.path.join(args.out, f"answers_{side}.jsonl"), answers[side])

    verdicts = verdicts_on(answers, templates, args, ranks)
    results = {side: summarize(answers[side], verdicts[side]) for side in folder}
    rewards = [[verdict["reward"] for verdict in verdicts[side]] for side in folder]
    results["win_rate"] = win_rate(*rewards, args.seed)
    if ranks.rank == 0:
        with open(os.path.join(args.out, "results.json"), "w") as f:
            json.dump(results | {"args": dataclasses.asdict(args)}, f, indent=2)
    print0(table(results))
    print0(f"written: {args.out}/ (answers_*.jsonl, verdicts.jsonl, results.json)")


if __name__ == "__main__":
    with common.user_errors():
        main(tyro.cli(Args))
