"""A whole RL step, side by side with TRL's GRPOTrainer, which generates with `transformers`.

Both train the same SFT model on the same prompts, with the exact judge of the generated world as the reward: 16 prompts
x 6 samples of at most 96 tokens, temperature 1, two updates of 8 prompts each, no KL term. TRL has no critic, so ours
is timed twice: with the policy alone, and with a critic.

The sides take turns, a step each, in one process. Seconds are processor time, so that other processes don't add to it
while torch runs one thread (OMP_NUM_THREADS=1).

    bash recipes/tiny.sh                                    # makes the model and the prompts
    pip install trl==1.16.0                                 # in an environment of its own: nothing else needs it
    OMP_NUM_THREADS=1 python bench/peers.py --model out/tiny/sft/policy --prompts out/tiny/world/prompts_train.jsonl
"""

import os
import sys
from dataclasses import dataclass

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a kernels.py too
from runtime import flags


@dataclass
class Args:
    model: str = "out/tiny/sft/policy"
    """Folder of the policy."""
    prompts: str = "out/tiny/world/prompts_train.jsonl"
    """Prompt rows of the generated world."""
    repeats: flags.Count = 3
    """Steps of each side after a first one that is not counted. The median is reported."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import importlib.metadata
import statistics
import tempfile
import time
from typing import Any

import torch
import transformers
from datasets import Dataset

import ppo_cpe
from bench import train
from bench.common import device_name, random_model
from chat import Chat
from data import persona_world
from engine import Engine
from judges import JudgeSettings, open_judge
from model import load_pretrained
from model_config import Config
from prompts import load_templates, read_prompts
from runtime import packing, training
from runtime.distributed import start

EXACT_JUDGE = "data/persona_world.py:judge"
N_PROMPTS = 16
N_SAMPLES = 6
MAX_NEW_TOKENS = 96
LR = 1e-6  # small, so that the answers of both sides keep their length


class Ours:
    """Steps of ppo_cpe.py without edits."""

    def __init__(self, args: Args):
        self.args = ppo_cpe.Args(
            model=args.model,
            judge=EXACT_JUDGE,
            edit_rate=0,
            temperature=1.0,
            prompts_per_step=N_PROMPTS,
            mini_batch_prompts=N_PROMPTS // 2,
            n_samples=N_SAMPLES,
            max_new_tokens=MAX_NEW_TOKENS,
            max_prompt_length=512,
            tokens_per_microbatch=8192,
            lr=LR,
            critic_lr=LR,
        )
        self.ranks = start("fp32")
        self.chat = Chat(args.model)
        self.templates = load_templates(args.model)
        self.prompts = read_prompts(args.prompts, self.chat, self.templates, self.args.max_prompt_length)
        self.judge = open_judge(EXACT_JUDGE, JudgeSettings.from_args(self.args), self.ranks)
        self.models, self.optimizers = ppo_cpe.open_models(self.args, self.ranks)
        sampler = load_pretrained(args.model, torch.float32, self.ranks.device)
        # stands for no critic: it is so small that it takes next to no time
        self.no_critic = random_model(Config(sampler.config.vocab_size, 16, 16, 1, 1, 1), "cpu", torch.float32, True)
        self.no_optimizer = training.adamw(self.no_critic, LR, 0.0)
        self.engine = Engine(sampler, self.chat.stop_ids, self.args.max_prompt_length + MAX_NEW_TOKENS)

    def step(self, number: int, with_critic: bool) -> tuple[float, float, int]:
        """Seconds of the rollout (syncing weights, sampling, judging), seconds of all that follows, tokens sampled."""
        models = self.models
        optimizers = self.optimizers
        if not with_critic:
            models = models | {"critic": self.no_critic}
            optimizers = optimizers | {"critic": self.no_optimizer}
        indices = packing.batch_indices(len(self.prompts), N_PROMPTS, number, 0)
        started = time.process_time()
        self.engine.sync_weights(models["policy"])
        responses = ppo_cpe.rollout(
            ppo_cpe.shard([self.prompts[i] for i in indices], self.ranks),
            self.args,
            number,
            engine=self.engine,
            judge=self.judge,
            chat=self.chat,
            templates=self.templates,
            show=lambda text: None,
        )
        sampled = time.process_time()
        trajectories, _ = ppo_cpe.select(responses, self.args, number, self.ranks)
        train.ours_step(models, optimizers, trajectories, self.args, self.ranks)
        return sampled - started, time.process_time() - sampled, sum(len(t.response_ids) for t in trajectories)


def trl_trainer(args: Args, ours: Ours, folder: str) -> Any:
    """TRL's GRPOTrainer on the same model, prompts and reward; one generation serves two updates."""
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows = [row for row, _ in ours.prompts]
    data = Dataset.from_list([dict(prompt=tokenizer.decode(ids), number=i) for i, (_, ids) in enumerate(ours.prompts)])
    weights = ours.args.score_weights

    def reward(completions: list[str], number: list[int], **_: Any) -> list[float]:
        return [persona_world.judge(rows[i], answer).score(weights) for answer, i in zip(completions, number)]

    config = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=N_PROMPTS * N_SAMPLES // 2,
        steps_per_generation=2,
        num_generations=N_SAMPLES,
        max_completion_length=MAX_NEW_TOKENS,
        max_steps=2 * (1 + args.repeats),
        temperature=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=LR,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return trl.GRPOTrainer(model, reward, args=config, train_dataset=data, processing_class=tokenizer)


def main(args: Args) -> None:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError("TRL is not installed; expected: pip install trl==1.16.0") from error
    ours = Ours(args)
    times: dict[str, list] = {"policy alone": [], "with critic": [], "TRL": []}  # (rollout, update, tokens) of steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(args, ours, folder)
        generate = trainer._generate_and_score_completions

        def end_trl_step() -> None:
            """TRL's step ends where its next one begins: losses, gradients, optimizer, the trainer's own work."""
            if times["TRL"]:
                times["TRL"][-1][1] = time.process_time() - times["TRL"][-1][1]

        def timed_generate(*inputs: Any) -> Any:
            end_trl_step()
            number = 2 * len(times["TRL"])
            times["policy alone"].append(ours.step(number, with_critic=False))
            times["with critic"].append(ours.step(number + 1, with_critic=True))
            started = time.process_time()
            outputs = generate(*inputs)
            sampled = time.process_time()
            times["TRL"].append([sampled - started, sampled, int(outputs["completion_mask"].sum())])
            return outputs

        trainer._generate_and_score_completions = timed_generate
        trainer.train()
        end_trl_step()

    print(
        f"{device_name()}, transformers {transformers.__version__}, trl {version}; {N_PROMPTS} prompts x {N_SAMPLES}, "
        f"medians of {args.repeats} steps, seconds of processor time"
    )
    print(f"{'':16}{'rollout':>10}{'update':>10}{'step':>10}{'tokens':>10}{'TRL / it':>10}")
    medians = {name: [statistics.median(column) for column in zip(*steps[1:])] for name, steps in times.items()}
    trl_step = sum(medians["TRL"][:2])
    for name, (rollout, update, tokens) in medians.items():
        step = rollout + update
        print(f"{name:16}{rollout:10.2f}{update:10.2f}{step:10.2f}{tokens:10.0f}{trl_step / step:9.2f}x")


if __name__ == "__main__":
    flags.run(main, ARGS)
