"""The simulation of bench/simulate.py against real steps of a small model on this CPU, by phase.

Real steps run with the simulation's scripted responses. Their calls are measured in two sizes of steps, and a linear
function is fitted for each kind of call. A third, larger step is then simulated with these functions, and run. Seconds
are processor time, so that other processes don't add to it while torch runs one thread.

    OMP_NUM_THREADS=1 python bench/check_simulation.py
"""

import os
import sys
from dataclasses import dataclass, replace

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a generate.py too
from runtime import flags


@dataclass
class Args:
    prompts: flags.Count = 8
    """Prompts of the step that is compared, with four originals each. The measured ones have a quarter and a half."""
    repeats: flags.Count = 3
    """Runs of both sides, in turns. The medians are reported."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import statistics
from collections import defaultdict
from time import process_time

import torch
from torch import Tensor

from bench import simulate
from bench.common import CONFIGS, device_name, random_model
from bench.simulate import (
    Clock,
    ClockEngine,
    Cost,
    Script,
    clock_models,
    prefilled,
    run_rollout,
    scripts_of,
    train_step,
)
from engine import Engine
from engine.cpu_runner import CPURunner
from engine.requests import Sequence
from engine.scheduler import Chunk
from judges.asking import EngineBackend
from model import Transformer
from model_config import Config


class Measured:
    """Seconds of real calls, and from them what other calls would take: a linear function of some features."""

    def __init__(self) -> None:
        self.features: defaultdict[str, list[list[float]]] = defaultdict(list)
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.weights: dict[str, Tensor] = {}

    def add(self, part: str, features: list[float], seconds: float) -> None:
        self.features[part].append(features)
        self.seconds[part].append(seconds)

    def extend(self, other: "Measured") -> None:
        for part, rows in other.features.items():
            self.features[part] += rows
            self.seconds[part] += other.seconds[part]

    def fit(self) -> None:
        for part, rows in self.features.items():
            seconds = torch.tensor(self.seconds[part], dtype=torch.float64)
            self.weights[part] = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), seconds).solution

    def expected(self, part: str, features: list[float]) -> float:
        return float(self.weights[part] @ torch.tensor(features, dtype=torch.float64))


def decode_features(samples: list[Sequence]) -> list[float]:
    return [1, len(samples), len(samples) * max(sample.length for sample in samples)]  # rows are padded to the longest


def prefill_features(chunks: list[Chunk]) -> list[float]:
    return [1, len(chunks), *prefilled(chunks)]


class MeasuredCosts:
    """The calls of an engine on this CPU."""

    def __init__(self, name: str, measured: Measured):
        self.name = name
        self.measured = measured

    def decode(self, samples: list[Sequence]) -> Cost:
        return self.measured.expected(f"{self.name} decode", decode_features(samples)), 0.0

    def prefill(self, chunks: list[Chunk], n_logits: int) -> Cost:
        return self.measured.expected(f"{self.name} prefill", prefill_features(chunks)), 0.0


class ScriptedRunner(CPURunner):
    """Computes as ever, but samples say what the script says."""

    engine: Engine
    script: Script
    decoded: list[float] | None  # features of this step

    def decode(self, n: int) -> Tensor:
        self.decoded = decode_features(self.engine.scheduler.running)
        return super().decode(n)

    def sample(self, slots: slice, logits: Tensor) -> None:
        super().sample(slots, logits)
        s = self.slots
        for slot in range(*slots.indices(len(s.token))):
            ids = self.script(self.engine.scheduler.running[slot])
            n = int(s.position[slot])
            s.ids[slot, n - 1] = s.token[slot] = ids[n - 1]
            s.done[slot] = n == len(ids)


class MeasuredEngine(Engine):
    """The engine on this CPU with scripted samples. Its calls are measured in processor seconds."""

    def __init__(self, name: str, model: Transformer, max_batch: int, script: Script, measured: Measured):
        super().__init__(model, [], CHECK_LEN, max_batch, kv_tokens=CHECK_LEN * max_batch)
        self.name = name
        self.measured = measured
        self.runner = ScriptedRunner(model, [], CHECK_LEN, max_batch, self.n_blocks)
        self.runner.engine = self
        self.runner.script = script
        self.stop_ids = set(script.chat.stop_ids)
        self.reset()

    def _prefill(self, chunks: list[Chunk]) -> None:
        features = prefill_features(chunks)
        started = process_time()
        super()._prefill(chunks)
        self.measured.add(f"{self.name} prefill", features, process_time() - started)
        self.started += process_time() - started

    def step(self) -> None:
        self.started = process_time()
        self.runner.decoded = None
        super().step()
        if self.runner.decoded:  # everything but the prefill
            self.measured.add(f"{self.name} decode", self.runner.decoded, process_time() - self.started)


CHECK_LEN = 2048
PARTS = ("policy prefill", "policy decode", "judge prefill", "judge decode")


def real_step(args: simulate.Args, seed: int, models: dict[str, Transformer], measured: Measured) -> dict[str, float]:
    """Processor seconds of a real step by phase. Its calls are added to `measured`."""
    called = Measured()
    policy_script, judge_script = scripts_of(args)
    engine = MeasuredEngine("policy", models["sampler"], args.max_batch, policy_script, called)
    judge_engine = MeasuredEngine("judge", models["judge"], args.max_batch, judge_script, called)
    started = process_time()
    rollout = run_rollout(args, engine, EngineBackend(judge_engine, judge_script.chat), seed, args.prompts_per_step)
    rollout_seconds = process_time() - started
    phases = {part: sum(called.seconds[part]) for part in PARTS}
    phases["rollout together"] = rollout_seconds
    phases |= train_step(args, rollout, models, args.prompts_per_step, 1)

    passes: defaultdict[str, list[float]] = defaultdict(list)

    def note(phase: str, flops: float) -> Cost:
        passes[phase].append(flops)
        return 0.0, 0.0

    train_step(args, rollout, clock_models(models["policy"].config, Clock(), note), args.prompts_per_step, 1)
    for phase, flops in passes.items():
        called.add(phase, [len(flops), sum(flops)], phases[phase])
    measured.extend(called)
    return phases


def expected_step(args: simulate.Args, seed: int, config: Config, measured: Measured) -> dict[str, float]:
    """The same step on the clock. The Python around the engines is what the simulation runs itself."""
    policy_script, judge_script = scripts_of(args)
    clock = Clock()

    def engine_of(name: str, script: Script) -> ClockEngine:
        costs = MeasuredCosts(name, measured)
        return ClockEngine(name, config, CHECK_LEN, args.max_batch, script, costs, clock, on_cpu=True)

    engine = engine_of("policy", policy_script)
    judge_engine = engine_of("judge", judge_script)
    started = process_time()
    rollout = run_rollout(args, engine, EngineBackend(judge_engine, judge_script.chat), seed, args.prompts_per_step)
    around_engines = process_time() - started - engine.host_seconds - judge_engine.host_seconds
    rollout_seconds = clock.now + around_engines

    def pass_cost(phase: str, flops: float) -> Cost:
        return measured.expected(phase, [1, flops]), 0.0

    train_step(args, rollout, clock_models(config, clock, pass_cost), args.prompts_per_step, 1)
    return {**clock.seconds, "rollout together": rollout_seconds}


def main(args: Args) -> None:
    config = CONFIGS["tiny"]
    models = {}
    for name in ("policy", "critic", "sampler", "judge"):
        models[name] = random_model(config, "cpu", torch.float32, scalar_head=name == "critic")
    plain = simulate.Args(
        max_new_tokens=256, judge_max_new_tokens=256, max_prompt_length=512, tokens_per_microbatch=2048
    )

    def sized(prompts: int, prompt: int, response: int, judgement: int, max_batch: int) -> simulate.Args:
        steps = replace(plain, prompts_per_step=prompts, mini_batch_prompts=-(-prompts // 2), max_batch=max_batch)
        return replace(steps, prompt_tokens=prompt, response_tokens=response, judgement_tokens=judgement)

    n = args.prompts
    small, medium, large = (
        sized(-(-n // 4), 120, 24, 24, n),
        sized(-(-n // 2), 240, 48, 32, 2 * n),
        sized(n, 200, 80, 48, 4 * n),
    )
    measured = Measured()
    real_step(medium, 0, models, Measured())  # warm-up
    for seed in (100, 200):
        real_step(small, seed, models, measured)
        real_step(medium, seed, models, measured)
    measured.fit()
    real = []
    expected = []
    for _ in range(args.repeats):
        real.append(real_step(large, 300, models, Measured()))
        expected.append(expected_step(large, 300, config, measured))
    print(device_name())
    print(f"{'':20}{'expected':>10}{'measured':>10}{'ratio':>8}   seconds of processor time")
    for phase in real[0]:
        seconds = statistics.median(step[phase] for step in real)
        foreseen = statistics.median(step[phase] for step in expected)
        print(f"{phase:20}{foreseen:10.3f}{seconds:10.3f}{foreseen / seconds:8.2f}")


if __name__ == "__main__":
    flags.run(main, ARGS)
