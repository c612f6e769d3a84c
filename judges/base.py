"""The base of all judges: the class Judge, verdicts and settings."""

import glob
import os
import sys
from dataclasses import dataclass
from typing import Any

from judges.chat_client import is_url
from prompts import SCORE_WEIGHTS, Judgement, Templates, load_templates
from runtime import plan
from runtime.digests import input_digest
from runtime.distributed import Ranks
from runtime.flags import PATIENCE, JudgeArgs
from runtime.progress import printable
from tensor_parallel import EngineRanks
from weights import resolve


@dataclass
class Verdict:
    key: Any
    reward: float | None  # None: no judgement, the sample has to leave the batch
    judgement: Judgement | None = None  # None if the judge writes none
    attempts: int = 1  # judgements that were asked for
    error: str | None = None  # why there is no reward
    # the kind of failure: unparsable | refused | too long | not a number | no judgement (a function returned None) |
    # request (no reply arrived; it may the next time)
    failure: str | None = None
    method: str | None = None  # how a judge of pairs decided: logprobs | votes


@dataclass(frozen=True)
class JudgeSettings:
    """Settings to open a judge with. Each kind of judge uses some of them."""

    weights: tuple[float, float, float] = SCORE_WEIGHTS  # of helpfulness, personalization, naturalness in the reward
    attempts: int = 3  # judgements asked for before an answer is given up
    temperature: float = 0.9  # for sampling a judgement
    max_new_tokens: int = 512  # per judgement
    votes: int = 5  # verdicts on a pair that replace its probability if a server gives no log-probs
    # files that replace the templates a model was trained with, or the built-in ones
    answer_template: str | None = None
    grm_template: str | None = None
    pair_template: str | None = None
    # resources; judgements do not depend on these
    max_batch: int = 256  # sequences at once in the engine of a model in this process
    max_len: int = 8192  # tokens of a sequence, prompt and judgement
    concurrency: int = 64  # requests under way to a server
    patience: float = PATIENCE  # seconds to wait for a server that gives no reply

    @classmethod
    def from_args(cls, args: JudgeArgs, **more: Any) -> "JudgeSettings":
        """From the flags that scripts share. more: the fields that a script has other flags for."""
        return cls(
            weights=args.score_weights,
            attempts=args.judge_attempts,
            temperature=args.judge_temperature,
            max_new_tokens=args.judge_max_new_tokens,
            grm_template=args.grm_template,
            patience=args.judge_patience,
            **more,
        )


class Judge:
    """Scores answers. All judges are fed and polled alike, so that judging can overlap sampling.

    A subclass defines `open`, `submit` and `advance`. Class attributes and class methods need no model to be loaded.
    """

    writes_critiques: bool | None = True  # None: the first verdict will show
    lowest_reward: float | None = None  # None: there is no bound
    compares = False  # two answers at a time
    in_process = False  # a model that shares this process's device
    template: str  # the one of prompts.Templates that it fills
    down: str | None = None  # why no more judgements are to be had: a server is given up, a function raised

    def __init__(self) -> None:
        self.pending = 0
        self.finished: list[Verdict] = []
        self.asked = 0
        self.failed = 0
        self.complaints: set[str] = set()

    @classmethod
    def load_templates(cls, target: str, settings: JudgeSettings) -> Templates:
        """Those that a model in this process was trained with, unless a flag names another file."""
        folder = None if is_url(target) else resolve(target)
        flag = f"{cls.template}_template"
        return load_templates(folder, **{flag: getattr(settings, flag)})

    @classmethod
    def fingerprint(cls, target: str, settings: JudgeSettings) -> list:
        """Everything that its verdicts depend on, as JSON."""
        identity = target if is_url(target) else weights_fingerprint(target)
        return [identity, cls.load_templates(target, settings).texts(cls.template)]

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        """{part: bytes per rank} that it will hold."""
        return {}

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks: Ranks) -> "Judge":
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether something submitted has no verdict yet."""
        return self.pending > 0

    def submit(self, key: Any, row: dict, answer: Any, seed: int) -> None:
        """answer: a text, or two texts for a judge that compares. key: returned in the verdict."""
        raise NotImplementedError

    def advance(self) -> None:
        """A little work, which ends in calls of `finish`."""
        raise NotImplementedError

    def poll(self) -> list[Verdict]:
        """A little work; then the finished verdicts, each once."""
        self.advance()  # if it raises, the verdicts before it are not lost
        verdicts = self.finished
        self.finished = []
        self.pending -= len(verdicts)
        return verdicts

    def forget(self) -> None:
        """Drops caches of earlier judgements, so that the next are computed like the first ones."""

    def release_cache(self) -> None:
        """Frees the KV cache of a model in this process until the next answer (Engine.release_cache)."""

    def take_counts(self) -> tuple[int, int]:
        """(judgements asked for, those that failed) since the last call."""
        counts = self.asked, self.failed
        self.asked = 0
        self.failed = 0
        return counts

    def finish(self, verdict: Verdict, failed: int) -> None:
        """failed: of the verdict's attempts."""
        self.asked += verdict.attempts
        self.failed += failed
        error = verdict.error
        kind = str(error).partition(":")[0][:40]
        if error is not None and kind not in self.complaints:
            self.complaints.add(kind)
            print(f"judge: an answer got no judgement: {printable(error)}", file=sys.stderr)
        self.finished.append(verdict)


class FirstRankAsks(Judge):
    """A server or a function, for ranks that share an engine: the first asks, and tells the others what it got.

    Another reply, or the same at another time, would make their engines differ. The ranks submit and poll alike.
    """

    def __init__(self, judge: Judge, ranks: EngineRanks):
        super().__init__()
        self.judge = judge
        self.ranks = ranks
        self.writes_critiques = judge.writes_critiques
        self.lowest_reward = judge.lowest_reward

    def submit(self, key: Any, row: dict, answer: Any, seed: int) -> None:
        self.pending += 1
        if self.ranks.rank == 0:
            self.judge.submit(key, row, answer, seed)

    def advance(self) -> None:
        if self.pending == 0:
            return
        told = None
        if self.ranks.rank == 0:
            told = self.judge.poll(), self.judge.take_counts(), self.judge.down
        verdicts, (asked, failed), self.down = self.ranks.from_first(told)
        self.finished += verdicts
        self.asked += asked
        self.failed += failed

    def forget(self) -> None:
        self.judge.forget()


def lowest_score(weights: tuple[float, float, float]) -> float:
    """The reward of a judgement whose scores are all the lowest."""
    return Judgement("", -5, -5, -5).score(weights)


def weights_fingerprint(target: str) -> str:
    """Digest of a model's weights, config and tokenizer. ValueError: there are no weights."""
    folder = resolve(target)
    if not glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        raise ValueError(f"{folder}: no *.safetensors there")
    return input_digest(folder)
