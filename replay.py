"""Every loss on edits on one batch: norms and cosines of the gradients over the whole model.

For each loss: the norm of its gradient; "mass, inserted", the share of the gradient mass |weight A| that is on tokens
which edits inserted; "no gradient", the share of edit tokens with weight 0; the cosine with each other loss's gradient.

    python replay.py out/ppo_cpe/batch_000020

`ppo_cpe.py --save-batch 20` keeps the batch of step 20, ready for the update, and the weights that sampled it. The
batch names the script that wrote it, which may be a copy of ppo_cpe.py with losses of its own. All its `EDIT_LOSSES`
are compared, by its own `policy_pass`, beside the loss on originals. Host memory holds a gradient of each in fp32.
"""

from dataclasses import dataclass

import tyro

from runtime import flags


@dataclass
class Args:
    batch: tyro.conf.Positional[str]
    """Folder that --save-batch wrote."""
    script: str | None = None
    """Script whose losses are compared. It is run. Default: the one that the batch names, if this checkout has it."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import importlib.util
import os
import sys
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import diagnostics
from json_files import read_json
from model import Transformer, load_pretrained
from prompts import Judgement
from runtime import packing
from runtime.digests import is_whole
from runtime.distributed import Ranks, start
from trajectory import Batch, Prompt, Trajectory, UpdateRecord, arrays_on_cpu


def load_script(path: str) -> ModuleType:
    """A script as a module, without running its main. ValueError: there is no such file."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; --script names the script whose losses are compared")
    spec = importlib.util.spec_from_file_location("script_of_the_batch", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of their class
    spec.loader.exec_module(module)
    return module


def load_batch(folder: str, script_file: str | None = None) -> tuple[ModuleType, Any, Batch]:
    """The script as a module, its Args of the run, and the batch.

    Loading a script runs it, and a batch may come from anybody. So the script that it names is taken only if it lies at
    the top of this checkout or in exp/. ValueError: it does not, or the batch is not whole.
    """
    file = os.path.join(folder, "batch.json")
    if not os.path.isfile(file):
        raise ValueError(f"{file}: no such file; expected a folder that --save-batch wrote to its end")
    saved = read_json(file)
    root = os.path.dirname(os.path.abspath(__file__))
    named = os.path.abspath(saved["script"])
    if script_file is None and os.path.dirname(named) not in (root, os.path.join(root, "exp")):
        raise ValueError(
            f"{file} names {saved['script']}, which is no script of this checkout; if you trust it: --script"
        )
    if not is_whole(saved) or saved["digests"] != diagnostics.batch_digests(folder):
        raise ValueError(
            f"{folder}: not what --save-batch wrote; expected batch.json and the files beside it unchanged"
        )
    script = load_script(script_file or named)

    def trajectory(values: dict) -> Trajectory:
        judgement = values["judgement"] and Judgement(**values["judgement"])
        parent = values["parent"] and trajectory(values["parent"])
        return Trajectory(**values | dict(prompt=Prompt(**values["prompt"]), judgement=judgement, parent=parent))

    names = {f.name for f in fields(script.Args)}
    args = script.Args(**{name: value for name, value in saved["args"].items() if name in names})
    tensors = load_file(os.path.join(folder, "batch.safetensors"))
    trajectories = [trajectory(values) for values in saved["trajectories"]]

    def column(name: str) -> list[Any]:
        return [tensors.get(f"{name}.{i}") for i in range(len(trajectories))]

    columns = [column(f.name) for f in fields(Batch)[1:]]
    return script, args, Batch(trajectories, *columns)


def gradient(
    script: ModuleType, policy: Transformer, batch: Batch, args: Any, n_tokens: int, ranks: Ranks
) -> tuple[Tensor, dict[str, float]]:
    """Gradient of the script's `policy_pass` on a batch, as a mean over n_tokens: fp32 [parameters]; its metrics."""
    policy.zero_grad()
    prompts = [t.prompt.ids for t in batch.trajectories]
    responses = [t.response_ids for t in batch.trajectories]
    record = UpdateRecord()
    for indices, packed in packing.packed_micro_batches(prompts, responses, None, args.tokens_per_microbatch, ranks):
        loss, tokens = script.policy_pass(policy, packed, batch.take(indices), args)
        (loss / n_tokens).backward()
        record.policy.append(arrays_on_cpu(tokens))
    means = diagnostics.Means()
    diagnostics.describe_update(means, record, args.eps_low, args.eps_high)
    known = {name: value for name, value in means.over_ranks(ranks).items() if value is not None}
    return torch.cat([p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None]), known


def replay(folder: str, script_file: str | None = None) -> dict[str, Tensor]:
    """Prints norms and cosines of the gradients of all losses -> {loss: gradient}."""
    ranks = start("fp32")
    script, args, batch = load_batch(folder, script_file)
    policy = load_pretrained(f"{folder}/policy", torch.float32, ranks.device)
    policy.checkpoint_activations = True  # fp32 weights and gradients leave little room on a GPU
    originals = batch.take(i for i, t in enumerate(batch.trajectories) if t.parent is None)
    edits = batch.take(i for i, t in enumerate(batch.trajectories) if t.parent is not None)
    n_tokens = sum(len(t.response_ids) for t in batch.trajectories)
    if not edits.trajectories:
        raise ValueError(f"{folder}: the batch has no edits, so no loss on edits to compare")
    gradients = {"originals": gradient(script, policy, originals, args, n_tokens, ranks)[0]}
    metrics = {}
    for kind in script.EDIT_LOSSES:
        # the cap of the run was chosen for its own loss
        own = args if kind == args.edit_loss else replace(args, edit_loss=kind, ratio_cap=None)
        gradients[kind], metrics[kind] = gradient(script, policy, edits, own, n_tokens, ranks)
    counts = f"{len(originals.trajectories)} originals, {len(edits.trajectories)} edits, {n_tokens} tokens"
    print(f"{counts}; losses are means over all of them")
    print_table(gradients, metrics)
    return gradients


PIECE = 2**24  # parameters


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product, in fp64 and in pieces: an fp32 sum over all parameters of a model is wrong by percents."""
    return sum(torch.dot(x.double(), y.double()).item() for x, y in zip(a.split(PIECE), b.split(PIECE)))


def print_table(gradients: dict[str, Tensor], metrics: dict[str, dict[str, float]]) -> None:
    """gradients: {loss: fp32 [parameters]}. metrics: {loss on edits: figures of `diagnostics.describe_update`}."""
    norms = {name: dot(g, g) ** 0.5 for name, g in gradients.items()}
    names = "".join(f"{name:>11}" for name in gradients)
    print(f"{'':11}{'norm':>10}{'mass, inserted':>16}{'no gradient':>13}   cosines{names}")
    for name, g in gradients.items():
        inserted = clipped = "-"
        if name in metrics:
            own = metrics[name]
            mass = own["edit/kept_gradient_mass"] + own["edit/inserted_gradient_mass"]
            inserted = f"{100 * own['edit/inserted_gradient_mass'] / mass:.1f} %" if mass else "-"
            clipped = f"{100 * own['edit/clipfrac']:.1f} %"
        cosines = ""
        for other_name, other in gradients.items():
            scale = norms[name] * norms[other_name]
            cosines += f"{dot(g, other) / scale:11.3f}" if scale else f"{'-':>11}"
        print(f"{name:11}{norms[name]:10.5f}{inserted:>16}{clipped:>13}   {'':7}{cosines}")


if __name__ == "__main__":
    with flags.user_errors():
        replay(ARGS.batch, ARGS.script)
