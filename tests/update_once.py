"""One PPO update of tiny models on made-up trajectories; test_shared_prefix.py compares what it changes.

update_once.py FILE TOKENS_PER_MICROBATCH SHARD_SIZE
"""

import random
import sys

import torch
from conftest import random_model, tiny_config
from torch.distributed.tensor import DTensor

import ppo_cpe
from runtime import packing, training
from runtime.distributed import start


def trajectories(n_prompts):
    rng = random.Random(0)
    batch = []
    for place in range(n_prompts):
        x = [rng.randrange(300) for _ in range(rng.randint(4, 20))]
        parent = None
        for i in range(rng.randint(1, 4)):
            y = [rng.randrange(300) for _ in range(rng.randint(1, 15))]
            t = ppo_cpe.Trajectory(f"p{place}", i, {}, place, x, parent, x, y, reward=rng.gauss(0, 1))
            t.engine_logprobs = [-5.0] * len(y)
            if i == 1:  # an edit of the first
                t.sampled_under, t.sample_id = x + parent.response_ids + [7, 8], parent.sample_id
            parent = parent or t
            if i != 1:
                t.parent = None
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

    batch = packing.share_prompts(
        [t for t in trajectories(12) if t.place % ranks.world_size == ranks.rank], args.mini_batch_prompts, ranks
    )
    run = ppo_cpe.Run(args, ranks, None, None)
    ppo_cpe.fill_old_logprobs(batch, models["policy"], run)
    values = training.per_token(
        models["critic"],
        [t.prompt_ids for t in batch],
        [t.response_ids for t in batch],
        [[True] * len(t.response_ids) for t in batch],
        run,
    )
    for t, of_t in zip(batch, values):
        t.values = of_t
    ppo_cpe.compute_advantages(batch, run)
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    models["policy"].register_forward_hook(count)
    ppo_cpe.update(batch, models, optimizers, True, run)
    after = {name: full(model) for name, model in models.items()}
    if ranks.rank == 0:
        changes = {name: {k: before[name][k] - after[name][k] for k in before[name]} for name in models}
        torch.save({**changes, "passes": passes}, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
