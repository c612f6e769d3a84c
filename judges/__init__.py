"""Who scores an answer. All judges are fed and polled alike (judges.Judge), so that judging overlaps sampling:

    judge = open_judge(spec, settings, ranks)
    judge.submit(key, row, answer, seed)   an answer (text) to a prompt row; the key is the caller's
    judge.poll() -> [Verdict, ...]         a little work, then whatever has finished
    judge.busy                             something submitted has no verdict yet
    judge.take_counts() -> (asked, failed) judgements asked for, and those of them that failed

The value of a --judge flag is one of these; `parse_spec` is the only place that reads it:

    PATH               a generative reward model (docs/method.md 1.4) in this process, on the generation engine
    http://HOST        the same prompt to an OpenAI-compatible server; http://HOST#NAME names its model
    bt:PATH            a Bradley-Terry reward model (docs/method.md 1.5): a scalar, no critique
    FILE.py:FUNCTION   a reward of your own (judges/functions.py); data/persona_world.py:judge, `world` for short, is
                       the exact judge of the generated world
    pair:PATH or pair:http://HOST#NAME
                       a language model that sees two answers and names the better one: `answer` is then
                       the two texts, and the reward is the probability that the first one is better

A judgement that does not parse is asked again with another seed, a bounded number of times. After that the verdict has
no reward and says why: no score is ever made up.

    asking.py       the loop that asks a model many things at once, and asks again; engine and server behind it
    chat_client.py  a server's trouble: waiting, retries, refused parameters
    models.py       GenerativeJudge, BradleyTerryJudge       functions.py  FunctionJudge       pairs.py  PairJudge
    journal.py      rows that are made once, appended to disk as they come
"""

from typing import Any

from judges.base import FirstRankAsks, Judge, JudgeSettings, Verdict
from judges.chat_client import is_url
from judges.functions import FUNCTION_SPEC, FunctionJudge, annotated_critiques, load_function
from judges.models import BradleyTerryJudge, GenerativeJudge
from runtime import plan
from runtime.distributed import Ranks

__all__ = [
    "BradleyTerryJudge",
    "FunctionJudge",
    "GenerativeJudge",
    "Judge",
    "JudgeSettings",
    "Verdict",
    "annotated_critiques",
    "ask_all",
    "fingerprint",
    "load_function",
    "open_judge",
    "parse_spec",
    "planned_memory",
]


def parse_spec(spec: str) -> tuple[type[Judge], str]:
    """The value of a --judge flag -> the class of judge, and its folder, hub id, URL or FILE.py:FUNCTION."""
    if spec == "world":
        spec = "data/persona_world.py:judge"
    if spec.startswith("pair:"):
        from judges.pairs import PairJudge  # evaluate.py alone compares answers

        return PairJudge, spec.removeprefix("pair:")
    if spec.startswith("bt:"):
        return BradleyTerryJudge, spec.removeprefix("bt:")
    if is_url(spec):
        return GenerativeJudge, spec
    if FUNCTION_SPEC.fullmatch(spec):
        return FunctionJudge, spec
    if spec.endswith(".py"):
        raise ValueError(f"--judge {spec}: expected FILE.py:FUNCTION")
    return GenerativeJudge, spec


def open_judge(spec: str, settings: JudgeSettings, ranks: Ranks) -> Judge:
    """Opens the judge of a --judge flag. ranks: device and dtype of a model in this process.

    ValueError: it cannot judge.
    """
    kind, target = parse_spec(spec)
    try:
        judge = kind.open(target, settings, ranks)
    except ValueError as error:
        raise ValueError(f"--judge {spec}: {error}") from error
    if ranks.engine_ranks is not None and (is_url(target) or kind is FunctionJudge):
        return FirstRankAsks(judge, ranks.engine_ranks)
    return judge


def fingerprint(spec: str, settings: JudgeSettings) -> list:
    """All that a judge's verdicts depend on, as JSON: new weights, templates or code make another judge."""
    kind, target = parse_spec(spec)
    try:
        return kind.fingerprint(target, settings)
    except ValueError as error:
        raise ValueError(f"--judge {spec}: {error}") from error


def planned_memory(spec: str, settings: JudgeSettings, machine: plan.Machine) -> dict[str, int]:
    """{part: bytes per rank} that a judge will hold, for --plan; of a model only its config.json is read."""
    kind, target = parse_spec(spec)
    return kind.planned_memory(target, settings, machine)


def ask_all(judge: Judge, asked: list[tuple[dict, Any, int]]) -> list[Verdict]:
    """Verdicts on (row, answer, seed) each, in their order, from a judge that has nothing else to do."""
    verdicts: dict[int, Verdict] = {}
    for i, (row, answer, seed) in enumerate(asked):
        judge.submit(i, row, answer, seed)
    while judge.busy:
        verdicts |= {verdict.key: verdict for verdict in judge.poll()}
    return [verdicts[i] for i in range(len(asked))]
