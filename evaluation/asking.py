"""Asks models for replies and judges for verdicts, each once, for evaluate.py (judges/journal.py).

    replies(name, spec, requests, ...)   a model's replies to messages, from the engine or a chat server
    verdicts_on(items, ...)              a judge's verdicts on answers

`args` are those of evaluate.py.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from chat import Chat
from judges import JudgeSettings, fingerprint, open_judge, parse_spec
from judges.asking import Asker, ServerBackend, ask_until_parsed, finish_of, open_engine
from judges.base import weights_fingerprint
from judges.chat_client import ChatServer, Failure, ServerDown, is_url
from judges.functions import FunctionJudge
from judges.journal import Record, made_once
from prompts import DIMENSIONS, Judgement
from runtime.digests import digest_of
from runtime.distributed import Ranks, all_gather, derive_seed
from runtime.rows import final_answer, read_rows
from weights import load_config, resolve


def draw_rows(args, kind: str = "prompt") -> list[dict]:
    """`n_prompts` rows of the file, drawn by the seed, in the file's order."""
    rows = read_rows(args.prompts, kind)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    return [rows[i] for i in sorted(order[: args.n_prompts or len(rows)].tolist())]


def make_stage(name: str, stage: str, digests: list[str], make: Callable, args, ranks: Ranks) -> list[dict | None]:
    """`made_once` for a part of an evaluation, which --stage may leave out.

    ValueError: it is left out, and an earlier run kept nothing of it.
    """
    reason = None if args.stage in ("all", stage) else f"--stage {args.stage} makes none"
    folder = args.journal or args.out
    found = made_once(name, digests, make, folder, ranks, reason)
    if reason and digests and not any(found):  # a table of nothing would take the place of a finished one
        raise ValueError(
            f"--stage {args.stage}: {folder}/journal holds none of the {len(digests)} {name} that these flags ask for; "
            f"run --stage {stage} first, or give the flags it had (model, judge, prompts, sampling, --dtype, --seed)"
        )
    return found


def check_replies(spec: str, found: list[dict | None], failures: list[tuple[str, str]]) -> None:
    """Raises ValueError if there is nothing, from earlier runs either, because no request got a reply.

    failures: (kind, reason) of all ranks.
    """
    if failures and not any(found) and all(kind == "request" for kind, _ in failures):
        raise ValueError(f"{spec}: none of {len(failures)} requests got a reply; the first reason: {failures[0][1]}")


# -- replies -----------------------------------------------------------------------------------------------------------


def replies(
    name: str, spec: str, requests: list[tuple[str, list[dict]]], temperature: float, args, ranks: Ranks
) -> list[dict | None]:
    """A model's replies to (prompt_id, messages) requests -> [{"answer", "truncated"} or None], each made once.

    ValueError: a prompt that leaves no room for the reply; the server refused every request.
    """
    settings = dict(temperature=temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens)
    prompts: list[Any] = [messages for _, messages in requests]  # a server gets messages, a model here ids
    server = None
    identity: tuple[str, str | None] = (spec, None)
    if is_url(spec):
        server = ChatServer(spec, ask=args.stage in ("all", "answers"), patience=args.judge_patience)
    else:
        chat = Chat(spec)
        prompts = [chat.messages(messages) for messages in prompts]
        limit = load_config(resolve(spec)).max_position_embeddings
        for (prompt_id, _), prompt in zip(requests, prompts):
            if len(prompt) + args.max_new_tokens > limit:
                raise ValueError(
                    f'prompt "{prompt_id}" has {len(prompt)} tokens: with --max-new-tokens '
                    f"{args.max_new_tokens} that is over the {limit} positions of {spec}"
                )
        identity = (weights_fingerprint(spec), str(ranks.dtype))
    digests = [
        digest_of(prompt_id, prompt, *identity, settings, args.seed)
        for (prompt_id, _), prompt in zip(requests, prompts)
    ]

    failures: list[tuple[str, str]] = []  # kind and reason

    def make(indices: list[int], record: Record) -> None:
        if server:
            asker = Asker(ServerBackend(server, args.concurrency))
        else:
            max_len = max(len(prompts[i]) for i in indices) + args.max_new_tokens
            asker = Asker(open_engine(spec, ranks, max_len, args.max_batch, args.kv_tokens))
        sampling = dict(temperature=temperature, top_p=args.top_p, max_tokens=args.max_new_tokens)
        for i in indices:
            prompt_id, messages = requests[i]
            seeds = [derive_seed(args.seed, prompt_id)]
            if server:
                seeds += [derive_seed(args.seed, prompt_id, attempt) for attempt in range(1, args.judge_attempts)]
            asker.submit(i, ask_until_parsed(messages, seeds, sampling, answer_in))
        while asker.under_way if asker.down else asker.busy:
            for i, reply in asker.poll():
                if reply.failure is None:
                    record(i, reply.value)
                elif reply.failure.kind == "not a number":
                    raise FloatingPointError(f'prompt "{requests[i][0]}": {reply.failure}')
                else:  # not kept, so the next run asks again
                    failures.append((reply.failure.kind, str(reply.failure)))
                    print(f'{spec}: no answer to prompt "{requests[i][0]}": {reply.failure}', file=sys.stderr)
        if asker.down:
            raise ServerDown(asker.down)

    found = make_stage(name, "answers", digests, make, args, ranks)
    check_replies(spec, found, all_gather(ranks, failures))
    return found


def answer_in(choice: dict) -> dict:
    """A reply as an answer, even if it is cut off at the limit. A refusal is the answer, too.

    Failure: the reply broke off, or a server's is empty.
    """
    message = choice["message"]
    text = message.get("content") or message.get("refusal")
    if "sample" in choice:  # from the engine: the model may well say nothing
        text = message["content"]
    elif isinstance(text, str) and text.strip():  # a reasoning model's server may show its thoughts
        text = final_answer(text)
    if not isinstance(text, str):
        raise Failure("a reply without an answer", "unparsable", retry=True)
    finish = finish_of(choice)
    if finish == "broken off":
        raise Failure(f"broken off (finish reason {choice.get('finish_reason')})", "unparsable", retry=True)
    return dict(answer=text, truncated=finish != "stop")


# -- verdicts ----------------------------------------------------------------------------------------------------------


def judge_settings(args) -> JudgeSettings:
    names = ("answer_template", "pair_template", "max_batch", "concurrency")
    return JudgeSettings.from_args(args, votes=args.judge_votes, **{name: getattr(args, name) for name in names})


def check_judge(args, ranks: Ranks) -> None:
    """Finds an absent judge before any answer is sampled."""
    settings = judge_settings(args)
    fingerprint(args.judge, settings)
    if is_url(parse_spec(args.judge)[1]) and args.stage in ("all", "verdicts"):
        open_judge(args.judge, settings, ranks)


def verdicts_on(items: list[tuple], args, ranks: Ranks) -> list[dict]:
    """items: (prompt row, answer), or (prompt row, (first, second)) for a judge that compares -> verdict rows.

    A verdict row: reward (a score, or P(first is better); None: no verdict), the judgement's scores and critique,
    method, error, failure. Both sides get the same random numbers for a prompt, so that equal answers tie. The journal
    keeps scores rather than their weighted sum: other --score-weights ask for nothing again. ValueError: the server
    refused every request.
    """
    settings = judge_settings(args)
    judge_parts = (
        fingerprint(args.judge, settings),
        settings.temperature,
        settings.attempts,
        settings.votes,
        settings.max_new_tokens,
        args.seed,
        str(ranks.dtype),
    )
    is_function = parse_spec(args.judge)[0] is FunctionJudge  # it may read all of a row

    def read(row: dict) -> Any:
        return row if is_function else [row["prompt_id"], row["persona"], row["question"]]

    digests = [digest_of(read(row), answer, *judge_parts) for row, answer in items]
    scores = (*DIMENSIONS, "critique")  # None if the judge writes none
    failed: dict[str, dict] = {}

    def make(indices: list[int], record: Record) -> None:
        judge = open_judge(args.judge, settings, ranks)
        for i in indices:
            row, answer = items[i]
            judge.submit(i, row, answer, derive_seed(args.seed, row["prompt_id"], "judge"))
        while judge.busy:
            for v in judge.poll():
                row = dict(reward=v.reward) | {name: getattr(v.judgement, name, None) for name in scores}
                row |= dict(method=v.method, error=v.error, failure=v.failure)
                if v.failure == "request":  # no reply arrived: not kept, so the next run asks again
                    failed[digests[v.key]] = row
                else:
                    record(v.key, row)
        if judge.down:
            raise ServerDown(judge.down)

    rows = make_stage("verdicts", "verdicts", digests, make, args, ranks)
    failed = dict(all_gather(ranks, failed.items()))
    check_replies(f"--judge {args.judge}", rows, [(row["failure"], row["error"]) for row in failed.values()])
    none = dict.fromkeys(("reward", *scores, "method")) | dict(error="not asked", failure="not asked")
    verdicts = [row or failed.get(digest, none) for row, digest in zip(rows, digests)]
    return [row | {"reward": weighted(row, settings.weights)} for row in verdicts]


def weighted(verdict: dict, weights: tuple[float, float, float]) -> float | None:
    """The reward of a verdict row: a judgement's scores by these weights, else the number that the judge gave."""
    if verdict["critique"] is None:
        return verdict["reward"]
    return Judgement(verdict["critique"], *(verdict[name] for name in DIMENSIONS)).score(weights)
