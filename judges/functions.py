"""Judges that are functions: FILE.py:FUNCTION, where FUNCTION(row, answer) returns a number, a prompts.Judgement
(scores and a critique, which edits need) or None (no judgement).

Beside it the file may have a function describe(row, answer) -> dict[str, float], whose figures evaluate.py reports.
"""

import collections
import importlib.machinery
import math
import numbers
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from judges.base import Judge, JudgeSettings, Verdict, lowest_score
from prompts import DIMENSIONS, Judgement
from runtime import plan
from runtime.digests import file_digest
from runtime.distributed import Ranks
from runtime.rows import without_surrogates

FUNCTION_SPEC = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


class FunctionJudge(Judge):
    """Calls the function once for each answer, in turn.

    The return annotation says whether it writes critiques: `-> Judgement` does, `-> float` does not. It is `down` once
    the function raises, or returns something else than a finite number, a Judgement or None.
    """

    answers_per_poll = 16  # so that a slow function holds up neither sampling nor the journal of its verdicts

    @classmethod
    def open(cls, target: str, settings: JudgeSettings, ranks: Ranks) -> Judge:
        return cls(target, settings.weights)

    @classmethod
    def fingerprint(cls, target: str, settings: JudgeSettings) -> list:
        """The file's content, not that of the modules it imports."""
        load_function(target)
        file, name = file_and_name(target)
        return [file_digest(file), name]

    @classmethod
    def planned_memory(cls, target: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
        load_function(target)
        return {}

    def __init__(self, target: str, weights: tuple[float, float, float]):
        super().__init__()
        self.name = target
        self.function = load_function(target)
        self.weights = weights
        self.writes_critiques = annotated_critiques(self.function)
        self.lowest_reward = lowest_score(weights) if self.writes_critiques else None
        self.waiting: collections.deque[tuple[Any, dict, str]] = collections.deque()

    def submit(self, key: Any, row: dict, answer: str, seed: int) -> None:
        self.pending += 1
        self.waiting.append((key, row, answer))

    def advance(self) -> None:
        for _ in range(min(len(self.waiting), self.answers_per_poll)):
            key, row, answer = self.waiting.popleft()
            try:
                verdict = Verdict(key, *self.judge(row, answer))
            except ValueError as error:
                self.down = str(error)
                for unjudged in (key, *(key for key, *_ in self.waiting)):
                    self.finish(Verdict(unjudged, None, error=self.down, failure="request"), failed=0)
                self.waiting.clear()
                return
            if verdict.reward is None:
                verdict.error = f"{self.name} gave None"
                verdict.failure = "no judgement"
            self.finish(verdict, failed=verdict.reward is None)

    def judge(self, row: dict, answer: str) -> tuple[float | None, Judgement | None]:
        where = f'{self.name}, prompt "{row["prompt_id"]}"'
        value = call(where, self.function, row, answer)
        if value is None:
            return None, None
        if isinstance(value, Judgement):
            scores = [getattr(value, name) for name in DIMENSIONS]
            is_text = isinstance(value.critique, str) and isinstance(value.checks, str)
            if not is_text or any(type(s) is not int or not -5 <= s <= 5 for s in scores):
                raise ValueError(f"{where}: it gave {value}, expected a text as critique and integers from -5 to 5")
            # texts may have come from a model, and go into prompts and files
            critique = without_surrogates(value.critique)
            checks = without_surrogates(value.checks)
            return value.score(self.weights), replace(value, critique=critique, checks=checks)
        try:
            reward = float(value) if isinstance(value, numbers.Real) else math.nan
        except OverflowError:
            reward = math.inf
        if not math.isfinite(reward):
            kind = type(value).__name__
            raise ValueError(f"{where}: it gave {kind} {value!r:.80}, expected a finite number, a Judgement or None")
        return reward, None


def call(where: str, function: Callable, *arguments: Any) -> Any:
    """Calls a user's function. ValueError: it raises anything, or exits."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error


def file_and_name(target: str) -> tuple[str, str]:
    match = FUNCTION_SPEC.fullmatch(target)
    if match is None:
        raise ValueError(f"{target}: expected FILE.py:FUNCTION")
    return match[1], match[2]


def load_file(file: str) -> ModuleType:
    """Runs a Python file as a module, once for each content. ValueError: it is missing, or does not run."""
    if not os.path.isfile(file):
        raise ValueError(f"{file}: no such file")
    name = f"judge_function_{file_digest(file)}"
    if name not in sys.modules:
        loader = importlib.machinery.SourceFileLoader(name, file)
        module = ModuleType(name)
        module.__file__ = file
        sys.modules[name] = module  # dataclasses look for the module of their class there
        try:
            loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever a user's file raises
            del sys.modules[name]
            raise ValueError(f"{file} does not run: {type(error).__name__}: {error}") from error
    return sys.modules[name]


def load_function(target: str) -> Callable:
    """FILE.py:FUNCTION -> the function. ValueError: there is none, or the file does not run."""
    file, name = file_and_name(target)
    function = getattr(load_file(file), name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name}")
    return function


def annotated_critiques(function: Callable) -> bool | None:
    """Whether a function's return annotation promises critiques. None: it has none, or allows both."""
    try:
        annotation = typing.get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError):  # names that exist for a type checker only; a callable object
        return None
    kinds = {annotation}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = set(typing.get_args(annotation)) - {types.NoneType}
    if kinds == {Judgement}:
        return True
    return False if kinds and kinds <= {int, float, bool} else None
