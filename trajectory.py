"""What a PPO step passes from phase to phase (ppo_cpe.py).

Prompt         a row and its ids x
Request        what the engine is asked for: an original y_o of x, or the edit y_e of an original
Response       what the engine sampled for it
Trajectory     a response with a reward, which can be trained on
Dropped        a response that leaves the batch, with the reason
Rollout        the responses of a rank's engine in a step
Checks         more judgements of them, which change nothing in the training
Batch          the trajectories that a rank trains on, with log-probs, values and advantages of their tokens
UpdateRecord   what the update did with each token (TokenArrays, ValueArrays), for the metrics
"""

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Optional, TypeVar

from torch import Tensor

from prompts import Judgement
from runtime import packing
from runtime.distributed import Ranks, all_gather

TRUNCATED = "cut off at --max-new-tokens"


@dataclass(kw_only=True)
class Prompt:
    """A prompt of the step's batch. index: its place in the batch, which decides its mini-batch."""

    index: int
    row: dict  # persona, question, ...
    ids: list[int]  # x


@dataclass(kw_only=True)
class Request:
    prompt: Prompt
    sample_id: int  # from 0 within a prompt; an edit has that of its original
    parent: Optional["Trajectory"] = None  # the original that an edit rewrites
    context_ids: list[int]  # what the engine samples after: x, or the edit prompt

    def __post_init__(self):
        if self.parent is not None and self.parent.parent is not None:
            raise ValueError("an edit of an edit: see docs/forking.md, a second round of edits")

    @property
    def key(self) -> tuple[str, int, bool]:
        """Identifies a response within a step."""
        return (self.prompt.row["prompt_id"], self.sample_id, self.parent is not None)


@dataclass(kw_only=True)
class Response(Request):
    response_ids: list[int]  # with the stop token
    engine_logprobs: list[float]  # of these tokens, as the engine recorded them
    answer: str
    truncated: bool  # hit --max-new-tokens


@dataclass(kw_only=True)
class Trajectory(Response):
    reward: float
    judgement: Judgement | None  # None where the judge writes none (Bradley-Terry)

    @property
    def critique(self) -> str:
        return self.judgement.critique if self.judgement else ""


@dataclass(kw_only=True)
class Dropped(Response):
    drop_reason: str

    @property
    def kind(self) -> str:
        """How it is counted: truncated | originals | edits (without a judgement)."""
        if self.drop_reason == TRUNCATED:
            return "truncated"
        return "edits" if self.parent else "originals"


@dataclass
class Rollout:
    """The responses of this rank's engine."""

    n_prompts: int
    judged: list[Trajectory]
    dropped: list[Dropped]
    judge_counts: tuple[int, int]  # judgements asked for, those that failed

    def of_leader(self, ranks: Ranks) -> "Rollout":
        """Itself on one rank of each engine, and nothing on the others, which have the same."""
        return self if ranks.leads else Rollout(0, [], [], (0, 0))


@dataclass
class Checks:
    """Further judgements in a step, which change nothing in the training."""

    audits: dict[tuple, dict[str, float | None]]  # by the key of an original: its rewards in the audit
    held_out: Rollout | None
    swapped: list[float]  # what held-out answers lose under another person's profile

    def of_leader(self, ranks: Ranks) -> "Checks":
        return self if ranks.leads else Checks({}, self.held_out and self.held_out.of_leader(ranks), [])


@dataclass
class Batch:
    """The trajectories that this rank trains on in a step, and fp32 [L_i] for the response tokens of each."""

    trajectories: list[Trajectory]
    old_logprobs: list[Tensor | None]  # None: the ratio is 1, or only the critic is trained
    values: list[Tensor]
    advantages: list[Tensor]
    returns: list[Tensor]

    def take(self, indices: Iterable[int]) -> "Batch":
        """Some of them, in the order of the indices."""
        chosen = list(indices)
        return Batch(
            trajectories=[self.trajectories[i] for i in chosen],
            old_logprobs=[self.old_logprobs[i] for i in chosen],
            values=[self.values[i] for i in chosen],
            advantages=[self.advantages[i] for i in chosen],
            returns=[self.returns[i] for i in chosen],
        )

    def rows(self) -> list[dict]:
        """Everything about each trajectory, for OUT/bad_steps."""
        columns = zip(self.trajectories, self.advantages, self.returns, strict=True)
        return [vars(t) | dict(advantages=advantages, returns=returns) for t, advantages, returns in columns]


@dataclass(kw_only=True)
class TokenArrays:
    """Arrays of a policy pass of an update, with a value for each token of the micro-batch: [S] each."""

    trajectories: list[Trajectory]
    counts: list[int]  # tokens of each; their sum is S
    is_edit: Tensor  # bool: belongs to an edit
    logprobs: Tensor  # log p, fp32 as all below
    old_logprobs: Tensor  # log pi_old(y_o | x), for edits log pi_e(y_e | edit prompt)
    advantages: Tensor
    entropy: Tensor
    loss: Tensor
    weight: Tensor  # the gradient of the loss is -weight * advantage * grad log p

    @property
    def log_ratio(self) -> Tensor:
        return self.logprobs - self.old_logprobs

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()

    def approx_kl(self) -> Tensor:
        """KL of originals from the policy that sampled them, by the estimator r - 1 - log r."""
        log_ratio = self.log_ratio[~self.is_edit]
        return log_ratio.exp() - 1 - log_ratio


@dataclass(kw_only=True)
class ValueArrays:
    """Arrays of a critic pass, with a value for each token of the micro-batch: [S] each."""

    loss: Tensor  # fp32
    clipped: Tensor  # bool: gets no gradient


Arrays = TypeVar("Arrays", TokenArrays, ValueArrays)


def arrays_on_cpu(arrays: Arrays) -> Arrays:
    """The same with all tensors on the CPU."""
    moved = copy.copy(arrays)
    for name, value in vars(arrays).items():
        if isinstance(value, Tensor):
            setattr(moved, name, value.cpu())
    return moved


@dataclass
class UpdateRecord:
    """What the update of a step did on this rank."""

    policy: list[TokenArrays] = field(default_factory=list)  # one for each pass
    critic: list[ValueArrays] = field(default_factory=list)
    grad_norms: dict[str, list[float]] = field(default_factory=lambda: {"policy": [], "critic": []})
    flops: float = 0.0
    logical_tokens: int = 0  # of prompts and responses, as if no prompt were shared
    computed_tokens: int = 0


def balance_prompts(trajectories: list[Trajectory], prompts_per_mini_batch: int, ranks: Ranks) -> list[Trajectory]:
    """Distributes whole prompts over the ranks, balanced by tokens within each mini-batch.

    Responses differ in length, and every rank waits for the one that has most to compute. Returns this rank's
    trajectories, ordered by prompt.
    """
    batch = sorted(all_gather(ranks, trajectories), key=lambda t: (t.prompt.index, t.key))
    groups = [list(group) for _, group in itertools.groupby(batch, key=lambda t: t.prompt.index)]
    mine: list[Trajectory] = []
    for _, mini_batch in itertools.groupby(groups, key=lambda group: group[0].prompt.index // prompts_per_mini_batch):
        prompts = list(mini_batch)
        sizes = [len(group[0].prompt.ids) + sum(len(t.response_ids) for t in group) for group in prompts]
        for i in packing.balance(sizes, ranks.world_size)[ranks.rank]:
            mine += prompts[i]
    return mine
