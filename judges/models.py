"""Judges that are models: a generative reward model, in this process or behind a server, and a Bradley-Terry model in
this process.
"""

import itertools
import math
from typing import Any

import torch

from attention import Packed
from chat import Chat, without_control_tokens
from engine.cache_size import likely_tokens
from judges.asking import Asker, EngineBackend, Question, Reply, ServerBackend, ask_until_parsed, open_engine, text_of
from judges.base import Judge, JudgeSettings, Verdict, lowest_score
from judges.chat_client import ChatServer, Failure, is_url, shown
from model import Transformer, load_pretrained
from prompts import Judgement, Templates, bt_ids, grm_request, parse_judgement
from runtime import plan
from runtime.distributed import Ranks, derive_seed


class LanguageModelJudge(Judge):
    """A judge that is asked in words, on the engine of this process or behind a server."""

    asks_for = "judgements"

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks: Ranks) -> Judge:
        templates = cls.load_templates(target, settings)
        backend: EngineBackend | ServerBackend
        if is_url(target):
            backend = ServerBackend(ChatServer(target, patience=settings.patience), settings.concurrency)
        else:
            backend = open_engine(target, ranks, settings.max_len, settings.max_batch)
        return cls(backend, templates, settings)

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        if is_url(target):
            return {}
        config = plan.config_of(target)
        max_len = min(settings.max_len, config.max_position_embeddings)
        weights, cache = plan.inference(config, machine, likely_tokens(max_len, settings.max_batch))
        return {"weights": weights, "KV cache": cache}

    def __init__(self, backend: EngineBackend | ServerBackend, templates: Templates, settings: JudgeSettings):
        super().__init__()
        self.backend = backend
        self.in_process = isinstance(backend, EngineBackend)
        self.asker = Asker(backend)
        self.templates = templates
        self.settings = settings

    def readable(self, text: Any) -> Any:
        """Text from rows as the model may get it: a server would read control tokens in it."""
        return without_control_tokens(text) if isinstance(self.backend, ServerBackend) else text

    def ask(self, key: Any, question: Question) -> None:
        self.pending += 1
        self.asker.submit(key, question)

    def advance(self) -> None:
        for key, reply in self.asker.poll():
            if reply.failure is None:
                self.finish(self.verdict_of(key, reply), reply.failed)
            else:
                tries = f", {reply.calls} {self.asks_for}" if reply.failure.retry else ""
                error = f"{reply.failure}{tries}"
                self.finish(Verdict(key, None, None, reply.calls, error, reply.failure.kind), reply.failed)
        if self.asker.down and not self.asker.under_way:
            self.down = self.asker.down
            for key in self.asker.abandon():
                self.finish(Verdict(key, None, None, 0, self.down, "request"), failed=0)

    def verdict_of(self, key: Any, reply: Reply) -> Verdict:
        raise NotImplementedError

    def forget(self) -> None:
        if isinstance(self.backend, EngineBackend):
            self.backend.engine.reset_prefix_cache()

    def release_cache(self) -> None:
        if isinstance(self.backend, EngineBackend):
            self.backend.engine.release_cache()


class GenerativeJudge(LanguageModelJudge):
    """A generative reward model (docs/method.md 1.4): critique and scores."""

    template = "grm"

    def __init__(self, backend: EngineBackend | ServerBackend, templates: Templates, settings: JudgeSettings):
        super().__init__(backend, templates, settings)
        self.lowest_reward = lowest_score(settings.weights)

    def submit(self, key: Any, row: dict, answer: str, seed: int) -> None:
        row, answer = self.readable((row, answer))
        messages = [{"role": "user", "content": grm_request(self.templates, row, answer)}]
        attempts = self.settings.attempts
        if isinstance(self.backend, EngineBackend) and self.settings.temperature == 0:
            attempts = 1  # another seed gives the same text
        seeds = [derive_seed(seed, attempt) for attempt in range(1, attempts + 1)]
        sampling = dict(temperature=self.settings.temperature, max_tokens=self.settings.max_new_tokens)
        self.ask(key, ask_until_parsed(messages, seeds, sampling, judgement_in))

    def verdict_of(self, key: Any, reply: Reply) -> Verdict:
        return Verdict(key, reply.value.score(self.settings.weights), reply.value, reply.calls)


def judgement_in(choice: dict) -> Judgement:
    text = text_of(choice)
    judgement = parse_judgement(text)
    if judgement is None:
        raise Failure(f"in no readable form: {shown(text)}", "unparsable", retry=True)
    return judgement


# -- Bradley-Terry -----------------------------------------------------------------------------------------------------


class BradleyTerryJudge(Judge):
    """A scalar at the last token of prompt and answer (docs/method.md 1.5), over packed sequences. No critique."""

    writes_critiques = False
    in_process = True
    template = "answer"
    tokens_per_batch = 16384  # per poll

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks: Ranks) -> Judge:
        templates = cls.load_templates(target, settings)
        model = load_pretrained(target, ranks.dtype, ranks.device, scalar_head=True, engine_ranks=ranks.engine_ranks)
        if not model.score.weight.any():  # a language model's folder gives zeros
            raise ValueError(f"{target} has no score.weight: it is no Bradley-Terry model")
        return cls(model, Chat(target), templates)

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        weights, _ = plan.inference(plan.config_of(target), machine, 0, scalar_head=True)
        return {"weights": weights}

    def __init__(self, model: Transformer, chat: Chat, templates: Templates):
        super().__init__()
        self.model = model
        self.chat = chat
        self.templates = templates
        self.waiting: list[tuple[Any, list[int]]] = []  # (key, ids)

    def submit(self, key: Any, row: dict, answer: str, seed: int) -> None:
        self.pending += 1
        ids = bt_ids(self.chat, self.templates, row, answer)
        limit = self.model.config.max_position_embeddings
        if len(ids) > limit:
            error = f"{len(ids)} tokens, more than the {limit} of the model"
            self.finish(Verdict(key, None, error=error, failure="too long"), failed=1)
        else:
            self.waiting.append((key, ids))

    def advance(self) -> None:
        sizes = itertools.accumulate(len(ids) for _, ids in self.waiting)
        n = max(1, sum(size <= self.tokens_per_batch for size in sizes))
        batch = self.waiting[:n]
        if not batch:
            return
        rewards = scalar_rewards(self.model, [ids for _, ids in batch])
        self.waiting = self.waiting[n:]
        for (key, _), reward in zip(batch, rewards):
            if math.isfinite(reward):
                self.finish(Verdict(key, reward), failed=0)
            else:
                error = f"the model's reward is {reward}"
                self.finish(Verdict(key, None, error=error, failure="not a number"), failed=1)


@torch.no_grad()
def scalar_rewards(model: Transformer, sequences: list[list[int]]) -> list[float]:
    """The scalar head's value at the last token of each sequence of ids."""
    device = model.score.weight.device
    context = Packed([len(ids) for ids in sequences], device)
    input_ids = torch.tensor([i for ids in sequences for i in ids], device=device)  # [T]
    last = context.cu_seqlens[1:].long() - 1
    return model(input_ids, context.position_ids, context, index=last).tolist()
