"""Seconds of a PPO step on eight GPUs: the code's own loop, with a clock in the place of kernels.

1. `ppo_cpe.rollout` runs with a policy engine and a judge engine on each rank, which take turns. Scheduler, block
   manager, polls, judge and edits are the real ones. Only the runner is replaced: what it would compute adds seconds to
   a clock. Responses are random words; their lengths are lognormal.
2. `ppo_cpe.score` and `ppo_cpe.update` run with models that add seconds to the clock and compute nothing.
3. Weight copies, --offload and checkpoints are bytes over a rate.

A call takes the time of its operations or of the bytes that it reads, whichever is longer, and a constant for launches.
A floor is the same work at the fastest rates that were measured on such a GPU: all responses of one length, every step
of decoding full, nothing copied. No GPU has confirmed the rates and constants below. bench/check_simulation.py compares
a simulation with real steps on a CPU.

    python bench/simulate.py --tensor-parallel 4 --max-batch 256 --release-cache --save-in-background   # 7B
    python bench/simulate.py --max-batch 64 --checkpoint-activations --offload    # 7B with whole engines on each rank
"""

import os
import sys
from dataclasses import dataclass, replace
from typing import Any, Protocol

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a generate.py too
import ppo_cpe
from runtime import flags


@dataclass(kw_only=True)
class Args(ppo_cpe.Args):
    # -- simulation; the other flags are those of ppo_cpe.py
    model: str = "7b"
    """7b, 14b (Qwen2.5), or a folder or hub id, of which only config.json is read. The critic has the same shape."""
    judge: str = ""
    """Model of the generative judge, as --model. Default: that of --model."""
    judge_server: bool = False
    """The judge runs on two further GPUs, which all ranks share."""
    world_size: flags.Count = 8
    """Ranks."""
    prompt_tokens: flags.Count = 800
    """Tokens of a prompt."""
    response_tokens: flags.Count = 400
    """Tokens of a response, in the mean."""
    response_cv: flags.NonNegative = 0.6
    """Standard deviation of a response's length over its mean."""
    judgement_tokens: flags.Count = 200
    """Tokens of a judgement, in the mean."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)

import functools
import math
import random
from collections import Counter
from collections.abc import Callable
from time import process_time
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bench import train
from bench.common import CONFIGS
from chat import Chat
from engine import Engine
from engine.block_manager import BLOCK_SIZE
from engine.cache_size import likely_tokens
from engine.gpu_runner import GPURunner, graph_size
from engine.requests import Sequence
from engine.runner import Runner
from engine.scheduler import Chunk
from judges import GenerativeJudge, JudgeSettings
from judges.asking import Ended, EngineBackend
from model_config import Config
from prompts import Templates, answer_prompt, judgement_text
from runtime import plan, roofline
from runtime.distributed import Ranks
from runtime.roofline import Rates
from trajectory import Prompt, Rollout

# -- rates -------------------------------------------------------------------------------------------------------------


@dataclass
class GPU:
    """Rates of one GPU, as fractions of its data sheet (roofline.PEAKS), and bytes/s of its links."""

    name: str
    nvlink: float  # a rank's part of an all-gather or all-reduce
    pcie: float  # between pinned host memory and a GPU while all eight copy

    def rates(self, compute: float, bandwidth: float) -> Rates:
        tflops, terabytes = roofline.PEAKS[self.name]
        return Rates(compute * tflops * 1e12, bandwidth * terabytes * 1e12, 2)


GPUS = [GPU("H100", 300e9, 40e9), GPU("A800", 130e9, 20e9)]
FLOOR = (0.81, 0.89)  # measured: 798 TFLOP/s and 3.0 TB/s on H100, 265 and 1.79 on A800
ENGINE = (0.6, 0.7)  # prefill, decoding
TRAINING = (0.45, 0.7)  # FSDP runs of 7B models report 0.33 to 0.57 of the FLOP/s
STEP_SECONDS = 0.5e-3  # of each step of decoding: launches, and kernels that neither products nor bytes explain
PREFILL_SECONDS = 7e-3  # least time of a prefill, which is launched kernel by kernel
SAMPLER_PASSES = 10  # over the fp32 logits of a step
ALL_REDUCE_SECONDS = 14e-6  # latency; a layer split over ranks has two
DISK = 2.5e9  # bytes/s that all ranks together write, flush and read again for the digests
CAPTURE_SECONDS = 0.05  # of a CUDA graph: its kernels are launched one by one, then it is instantiated


Cost = tuple[float, float]  # seconds of a call, and their floor


class Clock:
    """Seconds of one device, by part."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds: Counter[str] = Counter()
        self.floors: Counter[str] = Counter()

    def add(self, part: str, cost: Cost) -> None:
        seconds, floor = cost
        self.now += seconds
        self.seconds[part] += seconds
        self.floors[part] += floor

    def wait_until(self, then: float) -> None:
        if then > self.now:
            self.add("waiting for the judge", (then - self.now, 0.0))


class Costs(Protocol):
    """Costs of the calls of an engine."""

    def decode(self, samples: list[Sequence]) -> Cost: ...

    def prefill(self, chunks: list[Chunk], n_logits: int) -> Cost: ...


def grouped(rates: Rates, tp: int) -> Rates:
    """Rates of tp GPUs that share each call."""
    return replace(rates, flops=tp * rates.flops, bandwidth=tp * rates.bandwidth)


class GPUCosts:
    """The calls of an engine on `tp` GPUs, which as many clients as `sharers` keep busy alike.

    In the floor every step of decoding has max_batch samples.
    """

    def __init__(self, config: Config, gpu: GPU, max_batch: int, tp: int = 1, sharers: int = 1):
        self.sharers = sharers
        # a rank holds whole heads, so that ranks beyond the key-value heads hold copies
        self.config = replace(config, num_key_value_heads=max(tp, config.num_key_value_heads))
        self.gpu = gpu
        self.max_batch = max_batch
        self.tp = tp
        self.rates = grouped(gpu.rates(*ENGINE), tp)
        self.floor_rates = grouped(gpu.rates(*FLOOR), tp)

    def decode(self, samples: list[Sequence]) -> Cost:
        n = self.sharers * len(samples)
        context = sum(sample.length for sample in samples) / len(samples)
        seconds = roofline.decode_seconds(self.config, n, 1, context, n, self.rates)
        seconds += SAMPLER_PASSES * 4 * n * self.config.vocab_size / self.rates.bandwidth
        full = roofline.decode_seconds(self.config, self.max_batch, 1, context, self.max_batch, self.floor_rates)
        return STEP_SECONDS + seconds + self.all_reduces(n), full * n / self.max_batch

    def prefill(self, chunks: list[Chunk], n_logits: int) -> Cost:
        n_tokens, n_pairs = prefilled(chunks)
        context = n_pairs / n_tokens
        n_tokens *= self.sharers
        passed = functools.partial(roofline.forward_seconds, self.config, n_tokens, context, n_logits)
        reading = sum(roofline.matrices(self.config)) * self.rates.itemsize / self.rates.bandwidth
        seconds = max(PREFILL_SECONDS, passed(self.rates), reading)
        return seconds + self.all_reduces(n_tokens), passed(self.floor_rates)

    def all_reduces(self, n_tokens: int) -> float:
        """Seconds of the sums over a group of ranks in a pass."""
        if self.tp == 1:
            return 0.0
        copied = 2 * self.config.hidden_size * n_tokens / self.gpu.nvlink
        return 2 * self.config.num_hidden_layers * (ALL_REDUCE_SECONDS + copied)


def prefilled(chunks: list[Chunk]) -> tuple[int, float]:
    """Tokens of a prefill, and pairs of a token and one that it attends to."""
    return sum(c.end - c.start for c in chunks), sum((c.end**2 - c.start**2) / 2 for c in chunks)


# -- what is generated -------------------------------------------------------------------------------------------------


class Words(Chat):
    """A tokenizer without a checkpoint: each word is one id, and a turn ends with a control id."""

    def __init__(self) -> None:
        self.words = ["<stop>", "<end>", "<assistant>"]
        self.stop_ids = [0]
        self.turn_end = 1
        self.after_turn: list[int] = []
        self.header = [2]
        self.known: dict[str, int] = {}
        self.text_ids: set[int] = set()
        self.fillers = self.encode(" ".join(f"w{i}" for i in range(500)))

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            if word not in self.known:
                self.known[word] = len(self.words)
                self.text_ids.add(len(self.words))
                self.words.append(word)
            ids.append(self.known[word])
        return ids

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def turn(self, role: str, content: str, before: str = "") -> list[int]:
        return [*self.encode(content), self.turn_end]

    def messages(self, messages: list[dict]) -> list[int]:
        return [i for message in messages for i in self.turn("", message["content"])] + self.header


class Script:
    """Scripted responses for the samples of an engine, by seed."""

    def __init__(self, chat: Words, mean: int, cv: float, writes_judgements: bool):
        self.chat = chat
        self.sigma = math.sqrt(math.log(1 + cv**2))
        self.mu = math.log(mean) - self.sigma**2 / 2
        self.writes_judgements = writes_judgements
        self.texts: dict[int, list[int]] = {}  # by seed

    def __call__(self, sequence: Sequence) -> list[int]:
        """Ids of the response to a sequence with one sample."""
        seed = sequence.seeds[0]
        if seed not in self.texts:
            rng = random.Random(seed)
            ids = rng.choices(self.chat.fillers, k=max(1, round(rng.lognormvariate(self.mu, self.sigma))))
            if self.writes_judgements:
                ids = self.chat.encode(judgement_text(self.chat.decode(ids), 1, 1, 1))
            self.texts[seed] = [*ids, self.chat.stop_ids[0]][: sequence.params.max_new_tokens]
        return self.texts[seed]


class ClockRunner(Runner):
    """Adds what each call would take to a clock. Samples say what the script says."""

    def __init__(self, engine: Engine, name: str, costs: Costs, clock: Clock, script: Script):
        self.engine = engine
        self.name = name
        self.costs = costs
        self.clock = clock
        self.script = script
        self.graphs: set[int] | None = None  # sizes that are captured; None: all

    def reset(self) -> None: ...
    def restore_cache(self) -> None: ...
    def copy_blocks(self, copies) -> None: ...
    def start(self, first, samples) -> None: ...
    def sample(self, slots, logits) -> None: ...
    def add_blocks(self, new_blocks) -> None: ...
    def move(self, moves, n_left, n_before) -> None: ...

    def prefill(self, chunks: list[Chunk], n_finished: int) -> Tensor:
        self.clock.add(f"{self.name} prefill", self.costs.prefill(chunks, n_finished))
        return torch.zeros(n_finished, 1)

    def decode(self, n: int) -> Tensor:
        self.clock.add(f"{self.name} decode", self.costs.decode(self.engine.scheduler.running))
        size = graph_size(n, self.engine.max_batch)
        if self.graphs is not None and size not in self.graphs:
            self.graphs.add(size)
            self.clock.add("CUDA graphs", (CAPTURE_SECONDS, 0.0))
        return torch.zeros(n, 1)

    def ended(self, n: int) -> list[int]:
        running = self.engine.scheduler.running[:n]
        return [slot for slot, sample in enumerate(running) if sample.n_sampled >= len(self.script(sample))]

    def response(self, slot: int) -> tuple[list[int], list[float]]:
        sample = self.engine.scheduler.running[slot]
        ids = self.script(sample)[: sample.n_sampled]
        return ids, [-1.0] * len(ids)


class ClockEngine(Engine):
    """The engine with a ClockRunner, as on a GPU, or with on_cpu as on a CPU."""

    def __init__(
        self,
        name: str,
        config: Config,
        max_len: int,
        max_batch: int,
        script: Script,
        costs: Costs,
        clock: Clock,
        on_cpu: bool = False,
        kv_tokens: int | None = None,
    ):
        self.model = SimpleNamespace(config=config, part=None)  # type: ignore[assignment]
        self.max_len = max_len
        self.max_batch = max_batch
        self.stop_ids = set(script.chat.stop_ids)
        self.device = torch.device("cpu")
        kv_tokens = kv_tokens or (max_len * max_batch if on_cpu else likely_tokens(max_len, max_batch))
        self.n_blocks = -(-kv_tokens // BLOCK_SIZE) + 1
        self.runner = ClockRunner(self, name, costs, clock, script)
        self.runner.steps_per_poll = 1 if on_cpu else GPURunner.steps_per_poll
        self.runner.max_padded_tokens = kv_tokens if on_cpu else None
        self.host_seconds = 0.0  # of the scheduler
        self.reset()

    def step(self) -> None:
        started = process_time()
        super().step()
        self.host_seconds += process_time() - started


class ServerEngine(EngineBackend):
    """The judge's engine on GPUs of its own, whose clock goes on beside that of the policy's engine."""

    def __init__(self, engine: Engine, chat: Chat, policy: Engine, clock: Clock, policy_clock: Clock):
        super().__init__(engine, chat)
        self.policy = policy
        self.clock = clock
        self.policy_clock = policy_clock

    def start(self, number, call) -> None:
        if not self.engine.busy:
            self.clock.wait_until(self.policy_clock.now)
        super().start(number, call)

    def poll(self) -> Ended:
        if not self.policy.busy:
            self.policy_clock.wait_until(self.clock.now)
        ended: Ended = []
        while self.engine.busy and self.clock.now <= self.policy_clock.now:
            ended += super().poll()
        return ended


# -- a step ------------------------------------------------------------------------------------------------------------


class ClockModel(nn.Module):
    """A model in training that computes nothing. cost_of: (phase, FLOPs of the forward pass) -> cost of a pass."""

    lora = None

    def __init__(self, config: Config, scalar_head: bool, clock: Clock, cost_of: Callable[[str, float], Cost]):
        super().__init__()
        self.config = config
        self.scalar_head = scalar_head
        self.clock = clock
        self.cost_of = cost_of
        self.anchor = nn.Parameter(torch.ones(1))  # for gradients and an optimizer

    def forward(self, input_ids, position_ids, context, index, targets=None, temperature=1.0):
        n_tokens, n_logits = len(input_ids), len(index)
        flops = roofline.pass_flops(self.config, n_tokens, context.attention_pairs, n_logits, self.scalar_head)
        phase = "update" if torch.is_grad_enabled() else "score"
        self.clock.add(phase, self.cost_of(phase, flops))
        result = -self.anchor.expand(n_logits)
        return result if self.scalar_head else (result, result.detach())


def prompts_of(args: Args, chat: Words, first: int, n: int) -> list[Prompt]:
    """n prompts of random words, each of --prompt-tokens."""
    prompts = []
    for index in range(n):
        rng = random.Random(first + index)
        row = {"prompt_id": f"p{first + index}", "persona": "", "question": "w1"}
        n_words = args.prompt_tokens - len(answer_prompt(chat, Templates(), row))
        row["persona"] = chat.decode(rng.choices(chat.fillers, k=max(1, n_words)))
        prompts.append(Prompt(index=index, row=row, ids=answer_prompt(chat, Templates(), row)))
    return prompts


def run_rollout(args: Args, engine: Engine, backend: EngineBackend, first: int, n: int) -> Rollout:
    """The rollout of n prompts."""
    settings = JudgeSettings.from_args(args)
    judge = GenerativeJudge(backend, Templates(), settings)
    judge.in_process = not isinstance(backend, ServerEngine)
    chat = backend.chat
    prompts = prompts_of(args, chat, first, n)
    return ppo_cpe.rollout(
        prompts, args, 0, engine=engine, judge=judge, chat=chat, templates=Templates(), show=lambda text: None
    )


def scripts_of(args: Args) -> tuple[Script, Script]:
    """The scripts of policy and judge."""
    chat = Words()
    policy = Script(chat, args.response_tokens, args.response_cv, writes_judgements=False)
    # nine words of a judgement are the form
    return policy, Script(chat, max(1, args.judgement_tokens - 9), 0.25, writes_judgements=True)


def clock_models(config: Config, clock: Clock, cost_of: Callable[[str, float], Cost]) -> dict[str, Any]:
    return {name: ClockModel(config, name == "critic", clock, cost_of) for name in ("policy", "critic")}


def train_step(
    args: Args, rollout: Rollout, models: dict[str, Any], n_prompts: int, world_size: int
) -> dict[str, float]:
    """Scoring and update of a rank's prompts. Returns the processor seconds of both."""
    args = replace(
        args,
        prompts_per_step=n_prompts,
        mini_batch_prompts=max(1, args.mini_batch_prompts // world_size),
        critic_warmup_steps=0,
        offload=False,
    )
    ranks = Ranks(0, 1, torch.device("cpu"), torch.float32, None)
    models = {name: models[name] for name in ("policy", "critic")}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-6) for name, model in models.items()}
    started = process_time()
    trajectories, _ = ppo_cpe.select(rollout, args, 0, ranks)
    batch = train.score(trajectories, models, args, ranks)
    scored = process_time()
    train.update(batch, models, optimizers, args, ranks)
    return {"score": scored - started, "update": process_time() - scored}


def config_of(name: str) -> Config:
    return CONFIGS.get(name) or plan.config_of(name)


def copied_seconds(args: Args, config: Config, gpu: GPU) -> dict[str, float]:
    """Seconds of copies that neither the rollout nor a pass hides."""
    body, head = roofline.matrices(config)
    embedding = 0 if config.tie_word_embeddings else head  # beside the LM head
    weights = {"policy": body + head + embedding, "critic": body + head}
    per_rank = sum(weights.values()) / args.world_size
    n_updates = math.ceil(args.prompts_per_step / args.mini_batch_prompts) * args.ppo_epochs
    offloaded = 0.0
    if args.offload:  # masters come back after the rollout, Adam's moments for each update; copies out are hidden
        offloaded = 4 * per_rank + n_updates * 8 * per_rank
    checkpoint = sum(weights.values()) * (2 + 12)  # models in bf16; masters and moments in fp32
    writing = checkpoint / DISK
    if args.save_in_background:  # the copies: rank 0 has both models and its part of the rest
        writing = sum(weights.values()) * (2 + 12 / args.world_size) / gpu.pcie
    return {
        "weights to the engine": 4 * weights["policy"] / gpu.nvlink,
        "offload": offloaded / gpu.pcie,
        "checkpoint": writing / args.save_every,
    }


def simulate(args: Args, gpu: GPU) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step by phase, and their floors. The phases of the rollout are means over the ranks."""
    policy = config_of(args.model)
    judge = config_of(args.judge or args.model)
    tp = args.tensor_parallel
    n_engines = args.world_size // tp
    n_prompts = args.prompts_per_step // n_engines
    n_passes = 3  # of an update, in forward passes
    training_flops = gpu.rates(*TRAINING).flops
    floor_flops = gpu.rates(*FLOOR).flops

    def pass_cost(phase: str, flops: float) -> Cost:
        if phase == "score":
            return flops / training_flops, flops / floor_flops
        return (n_passes + args.checkpoint_activations) * flops / training_flops, n_passes * flops / floor_flops

    clocks = []
    parts: Counter[str] = Counter()
    floors: Counter[str] = Counter()
    train_clock = Clock()
    for number in range(n_engines):
        clock = Clock()
        policy_script, judge_script = scripts_of(args)
        costs = GPUCosts(policy, gpu, args.max_batch, tp)
        longest = ppo_cpe.longest_sequence(args, policy.max_position_embeddings)
        engine = ClockEngine(
            "policy", policy, longest, args.max_batch, policy_script, costs, clock, kv_tokens=args.kv_tokens
        )
        judge_clock = Clock() if args.judge_server else clock
        judge_costs = GPUCosts(judge, gpu, args.max_batch, tp)
        if args.judge_server:
            judge_costs = GPUCosts(judge, gpu, args.max_batch, tp=2, sharers=n_engines)
        judge_engine = ClockEngine("judge", judge, 8192, args.max_batch, judge_script, judge_costs, judge_clock)
        backend = EngineBackend(judge_engine, judge_script.chat)
        if args.judge_server:
            backend = ServerEngine(judge_engine, judge_script.chat, engine, judge_clock, clock)
        if args.release_cache:
            engine.runner.graphs = set()
            judge_engine.runner.graphs = set()
        rollout = run_rollout(args, engine, backend, number * n_prompts, n_prompts)
        clock.wait_until(judge_clock.now)
        clocks.append(clock)
        parts.update(clock.seconds)
        floors.update(clock.floors)
        train_step(args, rollout, clock_models(policy, train_clock, pass_cost), n_prompts, n_engines)
    rollout_seconds = max(clock.now for clock in clocks)
    phases = {part: seconds / n_engines for part, seconds in parts.items()}
    phases["waiting for the slowest rank"] = rollout_seconds - sum(phases.values())
    phases |= {phase: train_clock.seconds[phase] / args.world_size for phase in ("score", "update")}
    phases |= copied_seconds(args, policy, gpu)
    lowest = {part: floor * tp / args.world_size for part, floor in floors.items()}
    lowest |= {phase: train_clock.floors[phase] / args.world_size for phase in ("score", "update")}
    return phases, lowest


def main(args: Args) -> None:
    if args.lora_rank is not None:
        raise ValueError(
            f"--lora-rank {args.lora_rank}: expected none, since all weights are synced, offloaded and saved here"
        )
    columns = [(gpu.name, *simulate(args, gpu)) for gpu in GPUS]
    print(
        f"seconds of a step of {args.prompts_per_step} prompts x {args.n_samples} on {args.world_size} ranks, "
        f"{args.model}; floors in brackets"
    )
    print(f"{'':30}" + "".join(f"{name:>20}" for name, _, _ in columns))
    names = dict.fromkeys(phase for _, phases, floors in columns for phase in [*phases, *floors])
    for phase in [*names, "step"]:
        cells = []
        for _, phases, floors in columns:
            seconds = sum(phases.values()) if phase == "step" else phases.get(phase, 0.0)
            floor = sum(floors.values()) if phase == "step" else floors.get(phase, 0.0)
            cells.append(f"{seconds:12.1f}" + (f" ({floor:.1f})" if floor else "").rjust(8))
        print(f"{phase:30}" + "".join(cells))


if __name__ == "__main__":
    flags.run(main, ARGS)
