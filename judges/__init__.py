"""Who scores an answer. All judges are fed and polled alike, so that judging overlaps sampling:

    judge.submit(key, row, answer, seed)   an answer (text) to a prompt row; the key is the caller's
    judge.poll() -> [Verdict, ...]         a little work, then whatever has finished
    judge.busy                             something submitted has no verdict yet
    judge.take_counts() -> (asked, failed) judgements asked for, and those of them that were none

`open_judge(spec, settings, ranks)` makes one of five. `parse_spec` is the only place that reads a spec:

    PATH               a generative reward model (docs/method.md 1.4) in this process, on the generation engine
    http://HOST        the same prompt to an OpenAI-compatible server; http://HOST#NAME names its model
    bt:PATH            a Bradley-Terry reward model (docs/method.md 1.5): a scalar, no critique
    FILE.py:FUNCTION   a reward of your own: FUNCTION(row, answer) gives a number, a prompts.Judgement (scores and a
                       critique, which edits need) or None (no judgement). It is called once for each answer, in turn;
                       an exception in it stops the run. `world` is short for data/persona_world.py:judge, the exact
                       judge of the generated world.
    pair:PATH or pair:http://HOST#NAME
                       a language model that sees two answers and names the better one: `answer` is then
                       the two texts, and the reward is the probability that the first one is better

Each class of judge says what an evaluation has to know of it before it is opened: `fingerprint` (what its verdicts
depend on), `planned_memory` (what it will hold), `writes_critiques`, `compares`.

A judgement that does not parse is asked again with another seed, a bounded number of times. After
that, or where none can be had, the verdict has no reward and says why: no score is ever made up.
"""

import collections
import importlib.util
import itertools
import math
import numbers
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from chat import Chat
from engine import Engine
from engine.kv_cache import likely_tokens
from judges.base import Judge, JudgeSettings, Verdict, share_of_first
from judges.servers import PairServerJudge, ServerJudge
from model import Packed, load_pretrained
from prompts import DIMENSIONS, PAIR_NAMES, Judgement, Templates, bt_ids, grm_prompt, pair_request, parse_judgement
from runtime import plan
from runtime.chat_client import ChatServer, is_url
from runtime.digests import file_digest
from runtime.distributed import derive_seed
from runtime.rows import without_surrogates

FUNCTION_SPEC = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def parse_spec(spec: str) -> tuple[type[Judge], str]:
    """The value of a --judge flag -> the class of judge, and its folder, hub id, URL or FILE.py:FUNCTION."""
    name = spec.removeprefix("pair:")
    if name != spec:
        return (PairServerJudge if is_url(name) else PairJudge), name
    if spec == "world":  # short for the exact judge of the generated world
        spec = "data/persona_world.py:judge"
    if is_url(spec):
        return ServerJudge, spec
    if spec.startswith("bt:"):
        return BradleyTerryJudge, spec.removeprefix("bt:")
    if FUNCTION_SPEC.fullmatch(spec):
        return FunctionJudge, spec
    if spec.endswith(".py"):
        raise ValueError(f"--judge {spec}: expected FILE.py:FUNCTION")
    return GenerativeJudge, spec


def open_judge(spec: str, settings: JudgeSettings, ranks) -> Judge:
    """The judge of a --judge value; see the top of this file. ranks: device and dtype of a model in this process.

    ValueError: it cannot judge.
    """
    kind, target = parse_spec(spec)
    try:
        return kind.open(target, settings, ranks)
    except ValueError as error:
        raise ValueError(f"--judge {spec}: {error}") from error


def fingerprint(spec: str, settings: JudgeSettings) -> list:
    """What a judge is made of, as JSON: new weights, templates or code under an old name count as another judge."""
    kind, target = parse_spec(spec)
    try:
        return kind.fingerprint(target, settings)
    except ValueError as error:
        raise ValueError(f"--judge {spec}: {error}") from error


def planned_memory(spec: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
    """{part: bytes per rank} that a judge will hold, for --plan; of a model only its config.json is read."""
    kind, target = parse_spec(spec)
    return kind.planned_memory(target, settings, machine)


def named_server(spec: str) -> str:
    """A judge or model behind a server, with the name of the server's model, which the spec may leave out."""
    url = spec.removeprefix("pair:")
    return f"{spec}#{ChatServer(url).model}" if is_url(url) and "#" not in url else spec


def ask_all(judge: Judge, asked: list[tuple[dict, Any, int]]) -> list[Verdict]:
    """Asks about (row, answer, seed) each, where nothing else is under way -> a Verdict each, in their order."""
    verdicts = [None] * len(asked)
    for i, (row, answer, seed) in enumerate(asked):
        judge.submit(i, row, answer, seed)
    while judge.busy:
        for verdict in judge.poll():
            verdicts[verdict.key] = verdict
    return verdicts


# -- models in this process --------------------------------------------------------------------------------------------


class EngineJudge(Judge):
    """A language model on an engine, which requests join and leave at every step."""

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks) -> Judge:
        templates, chat = cls.templates(target, settings), Chat(target)
        model = load_pretrained(target, ranks.dtype, ranks.device)
        max_len = min(settings.max_len, model.config.max_position_embeddings)
        return cls(Engine(model, chat.stop_ids, max_len, settings.max_batch), chat, templates, settings)

    def forget(self) -> None:
        self.engine.reset_prefix_cache()

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        config = plan.config_of(target)
        max_len = min(settings.max_len, config.max_position_embeddings)
        weights, cache = plan.inference(config, machine, likely_tokens(max_len, settings.max_batch))
        return {"weights": weights, "KV cache": cache}

    def __init__(self, engine: Engine, chat: Chat, templates: Templates, settings: JudgeSettings):
        super().__init__()
        self.engine, self.chat, self.filled = engine, chat, templates
        self.numbers, self.running = itertools.count(), {}


@dataclass
class Request:
    """A judgement that the engine of a GenerativeJudge is writing."""

    key: Any
    prompt_ids: list[int]
    seed: int
    attempt: int


class GenerativeJudge(EngineJudge):
    """A generative reward model: critique and scores."""

    template = "grm"

    def __init__(self, engine: Engine, chat: Chat, templates: Templates, settings: JudgeSettings):
        super().__init__(engine, chat, templates, settings)
        self.weights = settings.weights
        # at temperature 0 another seed gives the same text
        self.attempts = settings.attempts if settings.temperature > 0 else 1
        self.sampling = dict(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens)

    def submit(self, key, row, answer, seed):
        self.pending += 1
        self.ask(Request(key, grm_prompt(self.chat, self.filled, row, answer), seed, attempt=1))

    def ask(self, request):
        number = next(self.numbers)
        seeds = [derive_seed(request.seed, request.attempt)]
        try:
            self.engine.submit(request.prompt_ids, key=number, seeds=seeds, **self.sampling)
        except ValueError as error:  # longer than the engine's sequences
            self.finish(request.key, None, None, request.attempt - 1, str(error), "too long")
            return
        self.asked += 1
        self.running[number] = request

    def advance(self):
        if self.engine.busy:
            self.engine.step()
        for sample in self.engine.collect(errors=True):
            request = self.running.pop(sample.key)
            if sample.error:  # another seed would not make numbers of these logits
                self.failed += 1
                self.finish(request.key, None, None, request.attempt, sample.error, "not a number")
                continue
            # what is cut off may end inside a quotation: not a judgement
            ended = sample.finish_reason == "stop"
            judgement = parse_judgement(self.chat.decode(sample.ids)) if ended else None
            self.failed += judgement is None
            if judgement is not None:
                self.finish(request.key, judgement.score(self.weights), judgement, request.attempt)
            elif request.attempt < self.attempts:
                self.ask(Request(request.key, request.prompt_ids, request.seed, request.attempt + 1))
            else:
                reason = "none parsed" if ended else "cut off at the limit"
                error = f"{reason}, {request.attempt} judgements"
                self.finish(request.key, None, None, request.attempt, error, "unparsable")


class PairJudge(EngineJudge):
    """A language model that names the better of two answers: the odds of its first token.

    A verdict needs one of the names among the likely tokens. The other is read however unlikely it is: where a server's
    cut-off would make it 0, the order of the answers decides many a pair.
    """

    writes_critiques = False
    compares = True
    template = "pair"
    likely = 20  # as many as servers list

    def __init__(self, engine: Engine, chat: Chat, templates: Templates, settings: JudgeSettings):
        super().__init__(engine, chat, templates, settings)
        encoded = [chat.encode(name) for name in PAIR_NAMES]
        if any(len(ids) != 1 for ids in encoded):
            raise ValueError(f"its tokenizer has no single token for each of the names {PAIR_NAMES}")
        self.name_ids = [token for [token] in encoded]

    def submit(self, key, row, answers, seed):
        self.pending += 1
        self.asked += 1
        request = pair_request(self.filled, row, *answers)
        number, prompt_ids = next(self.numbers), self.chat.messages([{"role": "user", "content": request}])
        try:
            self.engine.submit(
                prompt_ids,
                key=number,
                seeds=[seed],
                max_new_tokens=1,
                temperature=0,
                top_logprobs=self.likely,
                extra_logprob_ids=self.name_ids,
            )
        except ValueError as error:  # longer than the engine's sequences
            self.failed += 1
            self.finish(key, None, error=str(error), failure="too long")
            return
        self.running[number] = key

    def advance(self):
        if self.engine.busy:
            self.engine.step()
        for sample in self.engine.collect(errors=True):
            key, share = self.running.pop(sample.key), None
            if sample.error:
                self.failed += 1
                self.finish(key, None, error=sample.error, failure="not a number")
                continue
            top = sample.top_logprobs[0]  # most likely first
            if any(i in self.name_ids for i, _ in top[: self.likely]):
                logprobs = dict(top)
                share = share_of_first([(name, logprobs[i]) for name, i in zip(PAIR_NAMES, self.name_ids)])
            if share is not None:
                self.finish(key, share, method="logprobs")
            else:
                self.failed += 1
                error = f"neither name among the {self.likely} most likely first tokens"
                self.finish(key, None, error=error, failure="unparsable")


class BradleyTerryJudge(Judge):
    """A scalar at the last token of prompt and answer, over packed sequences. No critique."""

    writes_critiques = False
    template = "answer"
    tokens_per_batch = 16384  # of one poll

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks) -> Judge:
        templates, chat = cls.templates(target, settings), Chat(target)
        model = load_pretrained(target, ranks.dtype, ranks.device, scalar_head=True)
        if not model.score.weight.any():  # what a language model's folder gives
            raise ValueError(f"{target} has no score.weight: it is no Bradley-Terry model")
        return cls(model, chat, templates)

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        weights, _ = plan.inference(plan.config_of(target), machine, 0, scalar_head=True)
        return {"weights": weights}

    def __init__(self, model, chat: Chat, templates: Templates):
        super().__init__()
        self.model, self.chat, self.filled, self.waiting = model, chat, templates, []

    def submit(self, key, row, answer, seed):
        self.pending += 1
        self.asked += 1
        ids = bt_ids(self.chat, self.filled, row, answer)
        limit = self.model.config.max_position_embeddings
        if len(ids) > limit:
            self.failed += 1
            error = f"{len(ids)} tokens, more than the {limit} of the model"
            self.finish(key, None, error=error, failure="too long")
        else:
            self.waiting.append((key, ids))

    def advance(self):
        sizes = itertools.accumulate(len(ids) for _, ids in self.waiting)
        n = max(1, sum(size <= self.tokens_per_batch for size in sizes))
        batch = self.waiting[:n]
        if batch:
            rewards = scalar_rewards(self.model, [ids for _, ids in batch])
            self.waiting = self.waiting[n:]
            for (key, _), reward in zip(batch, rewards):
                if math.isfinite(reward):
                    self.finish(key, reward)
                else:
                    self.failed += 1
                    self.finish(key, None, error=f"the model's reward is {reward}", failure="not a number")


@torch.no_grad()
def scalar_rewards(model, sequences: list[list[int]]) -> list[float]:
    """Lists of ids -> the scalar head's value at the last token of each, one float a sequence."""
    device = model.score.weight.device
    context = Packed([len(ids) for ids in sequences], device)
    input_ids = torch.tensor([i for ids in sequences for i in ids], device=device)  # [T]
    last = context.cu_seqlens[1:].long() - 1
    return model(input_ids, context.position_ids, context, index=last).tolist()


# -- functions of row and answer ---------------------------------------------------------------------------------------


class FunctionJudge(Judge):
    """FILE.py:FUNCTION: FUNCTION(row, answer) -> a number, a Judgement, or None (no judgement).

    What the function may give is read off its return annotation where it has one: with `-> Judgement` it is known
    to write critiques, with `-> float` not to. ValueError, which stops a run: the function raises, or gives what is no
    finite number.
    """

    answers_per_poll = 16  # a slow function holds up neither sampling nor what is written down of its verdicts

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks) -> Judge:
        function = load_function(target)
        return cls(target, function, settings.weights, annotated_critiques(function))

    @classmethod
    def fingerprint(cls, target: str, settings: JudgeSettings) -> list:
        """The file's content; not that of what it imports."""
        load_function(target)
        file, name = FUNCTION_SPEC.fullmatch(target).groups()
        return [file_digest(file), name]

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        load_function(target)
        return {}

    def __init__(self, name: str, function: Callable, weights, writes_critiques: bool | None):
        super().__init__()
        self.name, self.function, self.weights = name, function, weights
        self.writes_critiques, self.waiting = writes_critiques, collections.deque()

    def submit(self, key, row, answer, seed):
        self.pending += 1
        self.waiting.append((key, row, answer))

    def advance(self):
        for _ in range(min(len(self.waiting), self.answers_per_poll)):
            key, row, answer = self.waiting[0]
            reward, judgement = self.judge(row, answer)
            self.waiting.popleft()
            self.asked += 1
            if reward is None:
                self.failed += 1
                self.finish(key, None, error=f"{self.name} gave None", failure="no judgement")
            else:
                self.finish(key, reward, judgement)

    def judge(self, row: dict, answer: str) -> tuple[float | None, Judgement | None]:
        where = f'{self.name}, prompt "{row["prompt_id"]}"'
        try:
            value = self.function(row, answer)
        except Exception as error:  # whatever a function of the user's raises
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        if value is None:
            return None, None
        if isinstance(value, Judgement):
            scores = [getattr(value, name) for name in DIMENSIONS]
            if not isinstance(value.critique, str) or any(type(s) is not int or not -5 <= s <= 5 for s in scores):
                raise ValueError(f"{where}: it gave {value}, expected a text as critique and integers from -5 to 5")
            # it has come from a model, perhaps, and goes into prompts and files
            return value.score(self.weights), replace(value, critique=without_surrogates(value.critique))
        try:
            reward = float(value) if isinstance(value, numbers.Real) else math.nan
        except OverflowError:
            reward = math.inf
        if not math.isfinite(reward):
            kind = type(value).__name__
            raise ValueError(f"{where}: it gave {kind} {value!r:.80}, expected a finite number, a Judgement or None")
        return reward, None


def load_function(target: str) -> Callable:
    """FILE.py:FUNCTION -> the function. ValueError: there is none, or the file does not run."""
    file, name = FUNCTION_SPEC.fullmatch(target).groups()
    if not os.path.isfile(file):
        raise ValueError(f"{file}: no such file")
    module_name = f"judge_function_{file_digest(file)}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # where dataclasses look for the module of their class
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a file of the user's raises
            del sys.modules[module_name]
            raise ValueError(f"{file} does not run: {type(error).__name__}: {error}") from error
    function = getattr(sys.modules[module_name], name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name}")
    return function


def describing_function(spec: str) -> Callable[[dict, str], dict[str, float]] | None:
    """The function `describe(row, answer)` in the file of a judge, if there is one: figures of an answer besides its
    scores, by name.
    """
    kind, target = parse_spec(spec)
    if kind is not FunctionJudge:
        return None
    load_function(target)
    file, _ = FUNCTION_SPEC.fullmatch(target).groups()
    return getattr(sys.modules[f"judge_function_{file_digest(file)}"], "describe", None)


def annotated_critiques(function: Callable) -> bool | None:
    """Whether a function's return annotation promises critiques: None where it has none or allows both."""
    try:
        annotation = typing.get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError):  # names that exist for a type checker only; a callable object
        return None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = set(typing.get_args(annotation)) - {types.NoneType}
    else:
        kinds = {annotation}
    if kinds == {Judgement}:
        return True
    return False if kinds and kinds <= {int, float, bool} else None
