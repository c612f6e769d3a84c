"""What every judge has (judges/): its verdicts, its settings, the base class, P(first) of a judge that compares."""

import glob
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

from prompts import PAIR_NAMES, SCORE_WEIGHTS, Judgement, Templates, load_templates
from runtime import plan
from runtime.chat_client import is_url
from runtime.digests import input_digest
from runtime.flags import PATIENCE
from weights import resolve


@dataclass
class Verdict:
    key: Any
    reward: float | None  # None: no judgement, the sample has to leave the batch
    judgement: Judgement | None  # None where the judge writes none
    attempts: int  # judgements that were asked for
    error: str | None  # why there is no reward
    # what kind of failure: unparsable | refused | too long | not a number | no judgement (a function gave None) |
    # request (nothing that the judge said arrived; it may the next time)
    failure: str | None = None
    method: str | None = None  # of pairs: logprobs | votes


@dataclass(frozen=True)
class JudgeSettings:
    """What a judge is opened with, whichever it is; each uses what concerns it."""

    weights: tuple[float, float, float] = SCORE_WEIGHTS  # of helpfulness, personalization, naturalness in the reward
    attempts: int = 3  # judgements asked for before an answer is given up
    temperature: float = 0.9  # of a judgement
    max_new_tokens: int = 512  # of a judgement
    votes: int = 5  # verdicts on a pair whose share stands in where a server gives no log-probabilities
    # files that take the place of the templates which a model in this process was trained with, or of the built-in ones
    answer_template: str | None = None
    grm_template: str | None = None
    pair_template: str | None = None
    # the machine: a judgement does not depend on these
    max_batch: int = 256  # sequences in the engine of a model in this process
    max_len: int = 8192  # tokens of each, prompt and judgement
    concurrency: int = 64  # requests that a server gets at a time
    patience: float = PATIENCE  # seconds that a server is waited for

    @classmethod
    def from_args(cls, args: Any) -> "JudgeSettings":
        """From a script's flags (`flags.JudgeArgs`), and those of these names that it has beside them."""
        names = ("answer_template", "grm_template", "pair_template", "max_batch", "concurrency")
        return cls(
            weights=args.score_weights,
            attempts=args.judge_attempts,
            temperature=args.judge_temperature,
            max_new_tokens=args.judge_max_new_tokens,
            votes=getattr(args, "judge_votes", cls.votes),
            patience=args.judge_patience,
            **{name: getattr(args, name) for name in names if hasattr(args, name)},
        )


def weights_fingerprint(folder: str) -> str:
    """Of the content of a folder's weights, config and tokenizer. ValueError: there are no weights."""
    folder = resolve(folder)
    if not glob.glob(os.path.join(folder, "*.safetensors")):
        raise ValueError(f"{folder}: no *.safetensors there")
    return input_digest(folder)


class Judge:
    """What the judges share: verdicts on their way out, and counts."""

    writes_critiques: bool | None = True  # None: the first verdict will show
    compares = False  # two answers at a time
    template: str | None = None  # which of prompts.Templates it fills
    down: str | None = None  # why no more judgements are to be had: a server's, once patience with it is at its end

    def __init__(self):
        self.pending, self.finished = 0, []
        self.asked = self.failed = 0
        self.complaints = set()

    @classmethod
    def templates(cls, target: str, settings: JudgeSettings) -> Templates:
        """Of a model in this process those that it was trained with, unless a flag names another file."""
        folder = None if is_url(target) else resolve(target)
        flag = f"{cls.template}_template"
        return load_templates(folder, **{flag: getattr(settings, flag)})

    @classmethod
    def fingerprint(cls, target: str, settings: JudgeSettings) -> list:
        identity = target if is_url(target) else weights_fingerprint(target)
        return [identity, cls.templates(target, settings).texts(cls.template)]

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        return {}

    @property
    def busy(self) -> bool:
        return self.pending > 0

    def poll(self) -> list[Verdict]:
        """Finished verdicts, each once. Should `advance` raise, those before it are not lost."""
        self.advance()
        verdicts, self.finished = self.finished, []
        self.pending -= len(verdicts)
        return verdicts

    def forget(self) -> None:
        """Drops what is kept from earlier judgements to save time, so that the next are computed as the first ones."""

    def take_counts(self) -> tuple[int, int]:
        """(judgements asked for, those that failed) since the last call."""
        counts, self.asked, self.failed = (self.asked, self.failed), 0, 0
        return counts

    def finish(self, key, reward, judgement=None, attempts=1, error=None, failure=None, method=None):
        if error is not None and error[:40] not in self.complaints:  # each kind once
            self.complaints.add(error[:40])
            print(f"judge: an answer got no judgement: {error}", file=sys.stderr)
        self.finished.append(Verdict(key, reward, judgement, attempts, error, failure, method))


def share_of_first(top: list[tuple[str, float]]) -> float | None:
    """(text, log-prob) of the first token's alternatives -> P(first) / (P(first) + P(second)), or None.

    Exact names only, as AlpacaEval: a name that is not among the alternatives has probability 0.
    """
    first, second = (sum(math.exp(logprob) for text, logprob in top if text == name) for name in PAIR_NAMES)
    return first / (first + second) if first + second > 0 else None  # NaN is not above 0
