"""What is asked of models and judges once, and kept: replies and verdicts, appended to disk as they come.

    replies(name, spec, requests, ...)   a model's replies to messages, by the engine or by a chat server
    verdicts_on(items, ...)              a judge's verdicts on answers (judges/)

Each row carries `made_by`, a digest of all that it depends on, and stands in OUT/journal/. A row that is there is not
asked for again, whenever the run was killed. `args` are those of evaluate.py.
"""

import concurrent.futures
import contextlib
import fcntl
import glob
import json
import os
import sys
from collections.abc import Callable

import torch

from chat import Chat
from engine import Engine
from judges import JudgeSettings, fingerprint, open_judge, parse_spec
from judges.base import weights_fingerprint
from model import load_pretrained
from prompts import DIMENSIONS, Judgement
from runtime.chat_client import ChatServer, Failure, ServerDown, is_url
from runtime.digests import digest_of
from runtime.distributed import all_gather, barrier, derive_seed, print0
from runtime.progress import counting
from runtime.rows import read_rows
from weights import load_config, resolve


def draw_rows(args, kind: str = "prompt") -> list[dict]:
    """`n_prompts` rows of the file, in its order."""
    rows = read_rows(args.prompts, kind)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    return [rows[i] for i in sorted(order[: args.n_prompts or len(rows)].tolist())]


class Journal:
    """Rows as they were made, one a line, in OUT/journal/NAME.RANK.jsonl; a line is written whole or is torn.

    ValueError: another run is writing there, or a line in the middle is not JSON.
    """

    def __init__(self, out, name, rank):
        self.pattern = os.path.join(out, "journal", f"{name}.*.jsonl")
        self.path = self.pattern.replace("*", str(rank))

    def rows(self) -> dict[str, dict]:
        """{made_by: row} of all ranks, without a torn last line."""
        found = {}
        for path in sorted(glob.glob(self.pattern)):
            with open(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if not line.endswith(b"\n"):
                        break
                    try:
                        row = json.loads(line)
                        found[row["made_by"]] = row
                    except (ValueError, KeyError, TypeError, RecursionError) as error:
                        raise ValueError(f"{path}:{number}: no row of a journal ({error}); remove the line") from error
        return found

    @contextlib.contextmanager
    def writing(self):
        """The time in which this process, and no other, appends."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "a+b") as self.file:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{self.path}: another run is writing it") from error
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)  # without a torn last line
            yield

    def append(self, row: dict) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


def made_once(name: str, stage: str, digests: list[str], make: Callable, args, ranks) -> list[dict | None]:
    """Rows for `digests`, in order: what the journal holds, the rest from `make` on all ranks; None: not made.

    make(indices, record): this rank's indices into digests; calls record(index, row) for each that is done.
    """
    journal = Journal(args.out, name, ranks.rank)
    kept = journal.rows()
    barrier(ranks)  # no rank writes before all have read: they have to agree on what is missing
    missing, seen = [], set(kept)
    for i, d in enumerate(digests):  # equal ones are made once
        if d not in seen:
            missing.append(i)
            seen.add(d)
    n_kept = len(set(digests)) - len(missing)
    if args.stage not in ("all", stage):
        print0(f"{name}: {n_kept} kept, {len(missing)} missing (--stage {args.stage} makes none)")
        return [kept.get(d) for d in digests]
    print0(f"{name}: {len(missing)} to make, {n_kept} kept")
    mine, made = missing[ranks.rank :: ranks.world_size], {}
    if mine:
        with journal.writing(), counting(len(mine), name, ranks.rank > 0) as done:

            def record(i, row):
                made[digests[i]] = row | {"made_by": digests[i]}
                journal.append(made[digests[i]])
                done()

            try:
                make(mine, record)
            except ServerDown as error:
                raise ServerDown(
                    f"{error}; the {len(made)} of {len(mine)} {name} that were made are kept, the same command goes on"
                ) from error
    kept |= dict(all_gather(ranks, made.items()))
    return [kept.get(d) for d in digests]


# -- replies -----------------------------------------------------------------------------------------------------------


def replies(name: str, spec: str, requests: list[tuple], temperature: float, args, ranks) -> list[dict | None]:
    """A model's replies to (id, messages) requests -> [{"answer", "truncated"} or None], each made once.

    ValueError: a prompt that leaves no room for the reply.
    """
    settings = dict(temperature=temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)
    if is_url(spec):
        server = ChatServer(spec, ask=args.stage in ("all", "answers"), patience=args.judge_patience)
        inputs = [messages for _, messages in requests]
    else:
        chat, limit = Chat(spec), load_config(resolve(spec)).max_position_embeddings
        inputs = [chat.messages(messages) for _, messages in requests]
        for (prompt_id, _), prompt in zip(requests, inputs):
            if len(prompt) + args.max_new_tokens > limit:
                raise ValueError(
                    f'prompt "{prompt_id}" has {len(prompt)} tokens: with --max-new-tokens '
                    f"{args.max_new_tokens} that is over the {limit} positions of {spec}"
                )
    model_parts = (spec, None) if is_url(spec) else (weights_fingerprint(spec), str(ranks.dtype))
    digests = [
        digest_of(prompt_id, ids, *model_parts, settings, args.seed) for (prompt_id, _), ids in zip(requests, inputs)
    ]
    seeds = [derive_seed(args.seed, prompt_id) for prompt_id, _ in requests]

    def by_engine(indices, record):
        model = load_pretrained(spec, ranks.dtype, ranks.device)
        max_len = max(len(inputs[i]) for i in indices) + args.max_new_tokens
        engine = Engine(model, chat.stop_ids, max_len, args.max_batch, args.kv_tokens)
        for i in indices:
            engine.submit(inputs[i], key=i, seeds=[seeds[i]], **settings)
        while engine.busy:
            engine.step()
            for sample in engine.collect():
                record(sample.key, dict(answer=chat.decode(sample.ids), truncated=sample.finish_reason == "length"))

    def by_server(indices, record):
        def ask(i):
            for _ in range(args.judge_attempts):
                try:
                    choice = server.complete(
                        inputs[i],
                        seed=seeds[i] % 2**31,
                        temperature=temperature,
                        top_p=args.top_p,
                        max_tokens=args.max_new_tokens,
                    )
                    text = choice["message"].get("content") or choice["message"].get("refusal")
                    if isinstance(text, str):
                        return dict(answer=text, truncated=choice.get("finish_reason") == "length")
                    last = Failure("a reply without text", "unparsable", retry=True)
                except Failure as failure:
                    if not failure.retry:
                        raise
                    last = failure
            raise last

        with concurrent.futures.ThreadPoolExecutor(args.concurrency) as pool:
            futures = {pool.submit(ask, i): i for i in indices}
            for future in concurrent.futures.as_completed(futures):
                try:
                    record(futures[future], future.result())
                except Failure as failure:  # not kept, asked again by the next run
                    prompt_id = requests[futures[future]][0]
                    print(f'{name}: no answer to prompt "{prompt_id}": {failure}', file=sys.stderr)
                except ServerDown:  # nor would the others be answered
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    return made_once(name, "answers", digests, by_server if is_url(spec) else by_engine, args, ranks)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def check_judge(args, ranks) -> None:
    """An absent judge is found before any answer is sampled."""
    fingerprint(args.judge, JudgeSettings.from_args(args))
    if is_url(parse_spec(args.judge)[1]) and args.stage in ("all", "verdicts"):
        open_judge(args.judge, JudgeSettings.from_args(args), ranks)


def verdicts_on(items: list[tuple], args, ranks) -> list[dict]:
    """items: (prompt row, answer), or (prompt row, (first, second)) for a judge that compares -> verdict rows.

    A verdict row: reward (a score, or P(first is better); None: no verdict), the judgement's scores and critique,
    method, error, failure. Both sides get the judge's same random numbers for a prompt, so equal answers tie.
    Scores are kept, not their weighted sum: other --score-weights ask nothing again.
    """
    settings = JudgeSettings.from_args(args)
    judge_parts = (
        fingerprint(args.judge, settings),
        settings.temperature,
        settings.attempts,
        settings.votes,
        settings.max_new_tokens,
        args.seed,
        str(ranks.dtype),
    )
    digests = [
        digest_of(row["prompt_id"], row["persona"], row["question"], answer, *judge_parts) for row, answer in items
    ]
    failed = {}

    def make(indices, record):
        judge = open_judge(args.judge, settings, ranks)
        for i in indices:
            row, answer = items[i]
            judge.submit(i, row, answer, derive_seed(args.seed, row["prompt_id"], "judge"))
        while judge.busy:
            for v in judge.poll():
                names = (*DIMENSIONS, "critique")  # None where the judge writes none
                scores = {name: getattr(v.judgement, name, None) for name in names}
                row = dict(reward=v.reward, **scores, method=v.method, error=v.error, failure=v.failure)
                if v.failure == "request":  # never arrived: not kept, the next run asks again
                    failed[digests[v.key]] = row
                else:
                    record(v.key, row)
        if judge.down:
            raise ServerDown(judge.down)

    rows = made_once("verdicts", "verdicts", digests, make, args, ranks)
    failed = dict(all_gather(ranks, failed.items()))
    none = dict.fromkeys(("reward", *DIMENSIONS, "critique", "method")) | dict(error="not asked", failure="not asked")
    rows = [row or failed.get(d, none) for row, d in zip(rows, digests)]
    return [row | {"reward": weighted(row, settings.weights)} for row in rows]


def weighted(verdict: dict, weights) -> float | None:
    """The reward of a verdict row: of a judgement its scores by these weights, else as the judge gave it."""
    if verdict["critique"] is None:
        return verdict["reward"]
    return Judgement(verdict["critique"], *(verdict[name] for name in DIMENSIONS)).score(weights)
