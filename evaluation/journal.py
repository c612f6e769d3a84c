"""What is asked of models and judges once, and kept: replies and verdicts, appended to disk as they come.

    replies(name, spec, requests, ...)   a model's replies to messages, by the engine or by a chat server
    verdicts_on(items, ...)              a judge's verdicts on answers (judges.py)

Each row carries `made_by`, a digest of all that it depends on, and stands in OUT/journal/. A row that is there is not
asked for again, whenever the run was killed. `args` are those of evaluate.py.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import sys

import openai
import torch
from tqdm import tqdm

from data import persona_world
from generate import Engine
from judges import Failure, open_client, open_judge, served_model, without_control_tokens
from model import load_config, load_pretrained, resolve
from prompts import DIMENSIONS, Chat
from runtime.distributed import all_gather, barrier, derive_seed, print0
from runtime.rows import read_rows


def draw_rows(args, kind="prompt"):
    """`n_prompts` rows of the file, in its order."""
    rows = read_rows(args.prompts, kind)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    return [rows[i] for i in sorted(order[: args.n_prompts or len(rows)].tolist())]


def is_url(spec):
    return spec.removeprefix("pair:").startswith(("http://", "https://"))


def with_name(spec):
    """A server's URL with the name of its model, which digests need: asks the server where the URL has none."""
    if not is_url(spec) or "#" in spec:
        return spec
    client, _ = open_client(spec.removeprefix("pair:"))
    return f"{spec}#{served_model(client, '')}"


def fingerprint(spec):
    """What a model or judge consists of: new weights under an old name count as another. Of a server URL and name."""
    if is_url(spec):
        return spec
    if spec == "world":
        files = [persona_world.__file__]
    else:
        folder = resolve(spec.removeprefix("bt:").removeprefix("pair:"))
        files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
        if not files:
            raise ValueError(f"{spec}: no *.safetensors there")
    return [(os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]


def digest(*parts):
    """Of everything that a row depends on; parts as JSON."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class Journal:
    """Rows as they were made, one a line, in OUT/journal/NAME.RANK.jsonl; a line is written at once or is torn.

    ValueError: another run is writing there, or a line in the middle is not JSON.
    """

    def __init__(self, out, name, rank):
        self.pattern = os.path.join(out, "journal", f"{name}.*.jsonl")
        self.path = self.pattern.replace("*", str(rank))

    def rows(self):
        """{made_by: row} of all ranks, without a torn last line."""
        found = {}
        for path in sorted(glob.glob(self.pattern)):
            with open(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if not line.endswith(b"\n"):
                        break
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}:{number}: not JSON ({error}); remove the line") from error
                    found[row["made_by"]] = row
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

    def append(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


def made_once(name, stage, digests, make, args, ranks):
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
    n_there = len(set(digests)) - len(missing)
    if args.stage not in ("all", stage):
        print0(f"{name}: {n_there} are there, {len(missing)} are not (--stage {args.stage} makes none)")
        return [kept.get(d) for d in digests]
    print0(f"{name}: {len(missing)} to make, {n_there} are there")
    mine, made = missing[ranks.rank :: ranks.world_size], {}
    if mine:
        with journal.writing(), tqdm(total=len(mine), desc=name, disable=ranks.rank > 0) as bar:

            def record(i, row):
                made[digests[i]] = row | {"made_by": digests[i]}
                journal.append(made[digests[i]])
                bar.update()

            make(mine, record)
    kept |= dict(all_gather(ranks, made.items()))
    return [kept.get(d) for d in digests]


# -- replies -----------------------------------------------------------------------------------------------------------


def replies(name, spec, requests, temperature, args, ranks):
    """A model's replies to (id, messages) requests -> [{"answer", "truncated"} or None], each made once.

    ValueError: a prompt that leaves no room for the reply.
    """
    settings = dict(temperature=temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)
    if is_url(spec):
        client, model = open_client(spec)
        model = served_model(client, model) if args.stage in ("all", "answers") else model
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
    what = fingerprint(spec), settings, args.seed, None if is_url(spec) else str(ranks.dtype)
    digests = [digest(prompt_id, ids, *what) for (prompt_id, _), ids in zip(requests, inputs)]
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
            messages = [m | {"content": without_control_tokens(m["content"])} for m in inputs[i]]
            for _ in range(args.judge_attempts):  # the client itself tries again where nothing arrived
                try:
                    choice = client.chat.completions.create(
                        model=model,
                        messages=messages,
                        seed=seeds[i] % 2**31,
                        temperature=temperature,
                        top_p=args.top_p,
                        max_tokens=args.max_new_tokens,
                    ).choices[0]
                except (json.JSONDecodeError, IndexError, TypeError) as error:  # cut off, or without a choice
                    reason = f"{type(error).__name__}: {error}"
                    continue
                text = choice.message.content or getattr(choice.message, "refusal", None)
                if text is not None:
                    return dict(answer=text, truncated=choice.finish_reason == "length")
                reason = "no text"
            raise Failure(f"{args.judge_attempts} replies could not be read ({reason})", "unparsable")

        with concurrent.futures.ThreadPoolExecutor(args.concurrency) as pool:
            futures = {pool.submit(ask, i): i for i in indices}
            for future in concurrent.futures.as_completed(futures):
                try:
                    record(futures[future], future.result())
                except (openai.APIError, Failure) as error:  # after all retries: not kept, asked again by the next run
                    print(
                        f'{name}: no answer to prompt "{requests[futures[future]][0]}": {type(error).__name__}: '
                        f"{error}",
                        file=sys.stderr,
                    )

    return made_once(name, "answers", digests, by_server if is_url(spec) else by_engine, args, ranks)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def judge_of(args, templates, ranks):
    return open_judge(
        args.judge,
        templates,
        ranks,
        attempts=args.judge_attempts,
        temperature=args.judge_temperature,
        max_batch=args.max_batch,
        max_new_tokens=args.max_judgement_length,
        concurrency=args.concurrency,
        votes=args.judge_votes,
    )


def check_judge(args, templates, ranks):
    """An absent judge is found before any answer is sampled."""
    fingerprint(args.judge)
    if is_url(args.judge) and args.stage in ("all", "verdicts"):
        judge_of(args, templates, ranks)


def verdicts_on(items, templates, args, ranks):
    """items: (prompt row, answer), or (prompt row, (first, second)) for a judge that compares -> verdict rows.

    A verdict row: reward (a score, or P(first is better); None: no verdict), the judgement's scores and critique,
    method, error, failure. Both sides get the judge's same random numbers for a prompt, so equal answers tie.
    """
    what = (
        fingerprint(args.judge),
        dataclasses.asdict(templates),
        args.judge_temperature,
        args.judge_attempts,
        args.judge_votes,
        args.max_judgement_length,
        args.seed,
        str(ranks.dtype),
    )
    digests = [digest(row["prompt_id"], row["persona"], row["question"], answer, *what) for row, answer in items]
    failed = {}

    def make(indices, record):
        judge = judge_of(args, templates, ranks)
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

    rows = made_once("verdicts", "verdicts", digests, make, args, ranks)
    failed = dict(all_gather(ranks, failed.items()))
    none = dict.fromkeys(("reward", *DIMENSIONS, "critique", "method")) | dict(error="not asked", failure="not asked")
    return [row or failed.get(d, none) for row, d in zip(rows, digests)]
