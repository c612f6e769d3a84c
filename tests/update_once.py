"""One PPO update of tiny models on made-up trajectories; test_shared_prefix.py compares what it changes.

update_once.py FILE TOKENS_PER_MICROBATCH SHARD_SIZE
"""

import random
import sys
from types import SimpleNamespace

import torch
from conftest import random_model, tiny_config
from torch.distributed.tensor import DTensor

import ppo_cpe
from runtime import training
from runtime.distributed import start
from trajectory import Batch, Prompt, Trajectory, balance_prompts


def trajectories(n_prompts):
    rng = random.Random(0)
    batch = []
    for index in range(n_prompts):
        prompt = Prompt(
            index=index, row={"prompt_id": f"p{index}"}, ids=[rng.randrange(300) for _ in range(rng.randint(4, 20))]
        )
        original = None
        for i in range(rng.randint(1, 4)):
            y = [rng.randrange(300) for _ in range(rng.randint(1, 15))]
            sampled = dict(response_ids=y, engine_logprobs=[-5.0] * len(y), answer="", truncated=False)
            judged = dict(reward=rng.gauss(0, 1), judgement=None)
            origin = dict(prompt=prompt, sample_id=i, context_ids=prompt.ids)
            if i == 1:  # an edit of the first
                context_ids = prompt.ids + original.response_ids + [7, 8]
                origin |= dict(sample_id=0, parent=original, context_ids=context_ids)
            t = Trajectory(**origin, **sampled, **judged)
            original = original or t
            batch.append(t)
    return batch


def full(model):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def main(file, budget, shard_size):
    ranks = start("fp32", shard_size)
    args = ppo_cpe.Args(
        prompts_per_step=12,
        mini_batch_prompts=12,
        tokens_per_microbatch=budget,
        temperature=1.0,
        lr=1.0,
        critic_lr=1.0,
        max_grad_norm=1e9,
    )
    models = {
        "policy": training.shard(random_model(tiny_config()).to(ranks.device), ranks),
        "critic": training.shard(random_model(tiny_config(), scalar_head=True).to(ranks.device), ranks),
    }
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1.0) for name, model in models.items()}
    before = {name: full(model) for name, model in models.items()}

    mine = [t for t in trajectories(12) if t.prompt.index % ranks.world_size == ranks.rank]
    mine = balance_prompts(mine, args.mini_batch_prompts, ranks)
    old_logprobs, values, _ = ppo_cpe.score(mine, models, args, 0, ranks)
    batch = Batch(mine, old_logprobs, values, *ppo_cpe.compute_advantages(mine, values, args, ranks))
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    models["policy"].register_forward_hook(count)
    run = SimpleNamespace(ranks=ranks, args=args, step=0, out="")
    ppo_cpe.update(models, optimizers, batch, args, run)
    after = {name: full(model) for name, model in models.items()}
    if ranks.rank == 0:
        changes = {name: {k: before[name][k] - after[name][k] for k in before[name]} for name in models}
        torch.save({**changes, "passes": passes}, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
