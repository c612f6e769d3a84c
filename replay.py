"""Every loss on edits on one batch: norms and cosines of the gradients over the whole model.

    python replay.py out/ppo_cpe/batch_000020

The batch is what `ppo_cpe.py --save-batch 20` kept, with the weights that sampled it, ready for the update. It names
the script that wrote it, a copy of ppo_cpe.py with losses of its own, say; its `EDIT_LOSSES` are compared, by its own
`policy_pass`, beside the loss on originals that they are added to. A gradient of each is held in fp32 in host memory.
"""

from dataclasses import dataclass

import tyro

from runtime import flags


@dataclass
class Args:
    batch: tyro.conf.Positional[str]
    """Folder that --save-batch wrote."""
    script: str | None = None
    """Script whose losses are compared, where it is no longer the file that the batch names."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import importlib.util
import os
import sys
from dataclasses import fields, replace

import torch

from chat import Chat
from model import load_pretrained
from prompts import Judgement, load_templates
from runtime import packing
from runtime.distributed import start


def load_script(path):
    """The script that made a batch, as a module. FileNotFoundError: it is not there any more."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file, though the batch names it as its script; give --script")
    spec = importlib.util.spec_from_file_location("script_of_the_batch", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of their class
    spec.loader.exec_module(module)
    return module


def load_batch(folder: str, script_file: str | None = None):
    """-> (the script as a module, its Args of the run, its trajectories)."""
    found = torch.load(os.path.join(folder, "batch.pt"), weights_only=True)
    script = load_script(script_file or found["script"])

    def trajectory(saved):
        judgement, parent = saved["judgement"], saved["parent"]
        known = {"judgement": judgement and Judgement(**judgement), "parent": parent and trajectory(parent)}
        return script.Trajectory(**saved | known)

    known = {f.name for f in fields(script.Args)}
    args = script.Args(**{name: value for name, value in found["args"].items() if name in known})
    return script, args, [trajectory(saved) for saved in found["batch"]]


def gradient(script, policy, batch, run, n_tokens):
    """Of the script's `policy_pass` on a batch, as a mean over n_tokens -> fp32 [parameters], means of its stats."""
    policy.zero_grad()
    prompts, responses = [t.prompt_ids for t in batch], [t.response_ids for t in batch]
    budget = run.args.tokens_per_microbatch
    for indices, packed in packing.packed_micro_batches(prompts, responses, None, budget, run.ranks):
        (script.policy_pass(policy, packed, [batch[i] for i in indices], run) / n_tokens).backward()
    return torch.cat([p.grad.flatten().cpu() for p in policy.parameters()]), run.stats.means(run.ranks)


def replay(folder: str, script_file: str | None = None) -> dict[str, torch.Tensor]:
    """Prints norms and cosines of the gradients of all losses -> {loss: gradient}."""
    ranks = start("fp32")
    script, args, batch = load_batch(folder, script_file)
    policy = load_pretrained(f"{folder}/policy", torch.float32, ranks.device)
    templates = load_templates(f"{folder}/policy", args.answer_template, args.edit_template)
    chat = Chat(f"{folder}/policy")
    originals, edits = ([t for t in batch if bool(t.parent) == edited] for edited in (False, True))
    n_tokens = sum(len(t.response_ids) for t in batch)
    if not edits:
        raise ValueError(f"{folder}: the batch has no edits, so no loss on edits to compare")

    def of(trajectories, **changes):
        run = script.Run(replace(args, **changes), ranks, chat, templates)
        return gradient(script, policy, trajectories, run, n_tokens)

    gradients, described = {}, {}
    gradients["originals"], _ = of(originals)
    for kind in script.EDIT_LOSSES:
        # the cap of the run was chosen for its own loss
        changes = {} if kind == args.edit_ratio else dict(edit_ratio=kind, ratio_cap=None)
        gradients[kind], described[kind] = of(edits, **changes)
    if hasattr(script, "fill_credit"):
        script.fill_credit(originals, policy, script.Run(args, ranks, chat, templates))
        for t in originals:
            t.advantages = args.sdpo_lambda * t.advantages + (1 - args.sdpo_lambda) * t.credit
        gradients["sdpo"], _ = of(originals)

    print(
        f"{len(originals)} originals, {len(edits)} edits, {n_tokens} tokens; losses are means over all of them. "
        "sdpo has no edits: it takes the place of the loss on originals"
    )
    print_table(gradients, described)
    return gradients


def print_table(gradients, described):
    """gradients: {loss: fp32 [parameters]}; described: {loss on edits: means of its stats}."""
    norms = {name: g.norm().item() for name, g in gradients.items()}
    names = "".join(f"{name:>11}" for name in gradients)
    print(f"{'':11}{'norm':>10}{'mass, inserted':>16}{'no gradient':>13}   cosines{names}")
    for name, g in gradients.items():
        found = described.get(name)
        mass = found and found["edit/kept_mass"] + found["edit/inserted_mass"]
        inserted = f"{100 * found['edit/inserted_mass'] / mass:.1f} %" if mass else "-"
        clipped = f"{100 * found['edit/clipfrac']:.1f} %" if found else "-"
        scales = [norms[name] * norms[other] for other in gradients]
        cosines = "".join(
            f"{torch.dot(g, other).item() / scale:11.3f}" if scale else f"{'-':>11}"
            for other, scale in zip(gradients.values(), scales)
        )
        print(f"{name:11}{norms[name]:10.5f}{inserted:>16}{clipped:>13}   {'':7}{cosines}")


if __name__ == "__main__":
    with flags.user_errors():
        replay(ARGS.batch, ARGS.script)
