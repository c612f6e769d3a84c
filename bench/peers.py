"""A whole RL step against a trainer that others use: TRL's GRPOTrainer, which generates with `transformers`.

Both train the same SFT model on the same prompts, with the exact judge of the generated world as the reward: 16
prompts x 6 samples of at most 96 tokens, temperature 1, two updates of 8 prompts each, no KL term. TRL has no critic,
so ours is timed twice: as GRPO (the policy alone, advantages within the group) and as PPO (critic, values, GAE). The
sides take turns, a step each, in one process. Reported are seconds of processor time, which other processes do not add
to, as long as torch runs one thread (OMP_NUM_THREADS=1).

    bash recipes/tiny.sh                                    # makes the model and the prompts
    pip install trl==1.16.0                                 # in an environment of its own: nothing else needs it
    OMP_NUM_THREADS=1 python bench/peers.py --model out/tiny/sft/policy --prompts out/tiny/world/prompts_train.jsonl
"""

import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a kernels.py too

import torch
import transformers
import tyro
from datasets import Dataset

import ppo_cpe
from chat import Chat
from data import persona_world
from engine import Engine
from judges import JudgeSettings, open_judge
from model import load_pretrained
from prompts import load_templates, read_prompts
from runtime import packing, runs, training
from runtime.distributed import start
from runtime.flags import user_errors

N_PROMPTS, N_SAMPLES, MAX_NEW_TOKENS, LR = 16, 6, 96, 1e-6  # a small rate: answers keep their length on both sides


@dataclass
class Args:
    model: str = "out/tiny/sft/policy"
    """Folder of the policy."""
    prompts: str = "out/tiny/world/prompts_train.jsonl"
    """Prompt rows of the generated world."""
    repeats: int = 3
    """Steps of each side after a first one that is not counted; the median is reported."""


class Silent:
    """In the place of a progress bar."""

    def set_postfix_str(self, text: str) -> None:
        pass


class Ours:
    """Steps of ppo_cpe.py without edits."""

    def __init__(self, args: Args):
        sizes = dict(prompts_per_step=N_PROMPTS, mini_batch_prompts=N_PROMPTS // 2, n_samples=N_SAMPLES)
        sizes |= dict(max_new_tokens=MAX_NEW_TOKENS, max_prompt_length=512, tokens_per_microbatch=8192, lr=LR)
        self.args = ppo_cpe.Args(
            model=args.model,
            judge="data/persona_world.py:judge",
            edit_rate=0,
            temperature=1.0,
            top_p=1.0,
            critic_lr=LR,
            **sizes,
        )
        ranks, templates = start("fp32"), load_templates(args.model)
        self.run = ppo_cpe.Run(self.args, ranks, Chat(args.model), templates)
        self.prompts = read_prompts(args.prompts, self.run.chat, templates, self.args.max_prompt_length)
        self.judge = open_judge("data/persona_world.py:judge", JudgeSettings.from_args(self.args), ranks)
        self.models, self.optimizers = ppo_cpe.open_models(self.run)
        sampler = load_pretrained(args.model, torch.float32, ranks.device)
        self.engine = Engine(sampler, self.run.chat.stop_ids, self.args.max_prompt_length + MAX_NEW_TOKENS)

    def step(self, number: int, with_critic: bool) -> tuple[float, float, int]:
        """-> seconds of the rollout (weights copied to the engine, sampled, judged) and of all that follows, tokens."""
        run = replace(self.run, stats=runs.Stats())
        rows = packing.batch_indices(len(self.prompts), N_PROMPTS, number, 0)
        started = time.process_time()
        self.engine.sync_weights(self.models["policy"])
        mine = packing.deal([self.prompts[i] for i in rows], run.ranks)
        batch, _ = ppo_cpe.rollout(mine, self.engine, self.judge, run, number, Silent())
        sampled = time.process_time()
        if with_critic:
            ppo_cpe.train_step(batch, self.models, self.optimizers, number, self.args.model, run, [])
        else:
            self.policy_alone(batch, run)
        return sampled - started, time.process_time() - sampled, sum(len(t.response_ids) for t in batch)

    def policy_alone(self, batch: list[ppo_cpe.Trajectory], run: ppo_cpe.Run) -> None:
        """GRPO from the same parts: advantages within each prompt's group, clipped loss, two updates."""
        policy, rewards = self.models["policy"], torch.tensor([t.reward for t in batch]).view(N_PROMPTS, N_SAMPLES)
        edges = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        for t, edge in zip(batch, edges.flatten().tolist()):
            t.advantages = torch.full((len(t.response_ids),), edge)
        ppo_cpe.fill_old_logprobs(batch, policy, run)
        for first in range(0, N_PROMPTS, self.args.mini_batch_prompts):
            mine = [t for t in batch if first <= t.place < first + self.args.mini_batch_prompts]
            prompts, responses = [t.prompt_ids for t in mine], [t.response_ids for t in mine]
            n_tokens = sum(map(len, responses))
            parts = packing.packed_micro_batches(prompts, responses, None, self.args.tokens_per_microbatch, run.ranks)
            for indices, packed in parts:
                (ppo_cpe.policy_pass(policy, packed, [mine[i] for i in indices], run) / n_tokens).backward()
            training.optimizer_step(policy, self.optimizers["policy"], LR, 1, {}, mine, self.args, run.ranks)


def trl_trainer(args: Args, ours: Ours, folder: str) -> Any:
    """TRL's GRPOTrainer on the same model, prompts and reward; one generation serves two updates."""
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows = [row for _, row, _ in packing.deal(ours.prompts, ours.run.ranks)]
    texts = [tokenizer.decode(ids) for _, _, ids in packing.deal(ours.prompts, ours.run.ranks)]
    data = Dataset.from_list([dict(prompt=text, number=i) for i, text in enumerate(texts)])
    weights = ours.args.score_weights

    def reward(completions, number, **_):
        found = [persona_world.judge(rows[i], c) for c, i in zip(completions, number)]
        return [judgement.score(weights) for judgement in found]

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
    ours, times = Ours(args), {"policy alone": [], "with critic": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(args, ours, folder)
        generate = trainer._generate_and_score_completions

        def close():
            """TRL's step ends where its next one begins: losses, gradients, optimizer, what the trainer does beside."""
            if times["TRL"]:
                times["TRL"][-1][1] = time.process_time() - times["TRL"][-1][1]

        def generation(*inputs):
            close()
            number = 2 * len(times["TRL"])
            times["policy alone"].append(ours.step(number, False))
            times["with critic"].append(ours.step(number + 1, True))
            started = time.process_time()
            outputs = generate(*inputs)
            sampled = time.process_time()
            times["TRL"].append([sampled - started, sampled, int(outputs["completion_mask"].sum())])
            return outputs

        trainer._generate_and_score_completions = generation
        trainer.train()
        close()

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, transformers {transformers.__version__}, "
        f"trl {version}; {N_PROMPTS} prompts x {N_SAMPLES}, medians of {args.repeats} steps, seconds of processor time"
    )
    print(f"{'':16}{'rollout':>10}{'update':>10}{'step':>10}{'tokens':>10}{'TRL / it':>10}")
    counted = {name: [statistics.median(column) for column in zip(*found[1:])] for name, found in times.items()}
    for name, (rollout, rest, tokens) in counted.items():
        ratio = sum(counted["TRL"][:2]) / (rollout + rest)
        print(f"{name:16}{rollout:10.2f}{rest:10.2f}{rollout + rest:10.2f}{tokens:10.0f}{ratio:9.2f}x")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args))
