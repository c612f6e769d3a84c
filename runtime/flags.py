"""The command line of a script, read from its `Args` dataclass: groups, help, ranges, and errors that a user can mend.

A script defines `Args` before its heavy imports and parses it there, so that `--help` and a wrong flag answer at once:

    @dataclass
    class Args:
        # -- optimization
        lr: Positive = 1e-6
        \"\"\"Peak learning rate.\"\"\"
        save_every: MayChange[Count] = 20
        \"\"\"Steps between checkpoints.\"\"\"

The type of a number is its range. `MayChange` marks what a continuation of the run may set differently, since what a
step computes stays the same; any other change is refused (`runs.Run`).
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import itertools
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
import tyro

from runtime.progress import printable

T = TypeVar("T")
MAY_CHANGE = "may change between the start of a run and its continuation"
MayChange = Annotated[T, MAY_CHANGE]
_, POSITIONAL = get_args(tyro.conf.Positional[int])
Count = Annotated[int, pydantic.Field(ge=1)]
Natural = Annotated[int, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, pydantic.Field(ge=0, le=65535)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
TopP = Annotated[float, pydantic.Field(gt=0, le=1)]
TIMEOUTS = (3600, 7200, 1800)  # seconds of a start, a rollout, an update
SCORE_WEIGHTS = (0.35, 0.40, 0.25)  # of helpfulness, personalization, naturalness (docs/method.md 1.4)
PATIENCE = 1800  # seconds that a judge's server is waited for
DType = Literal["auto", "fp32", "bf16"]
# indented lines of a docstring that begin a command, with those that continue it
COMMAND = re.compile(r"^    (?:[A-Z_]+=\S+ )*(?:python|torchrun|bash) (?:.*\\\n)*.*", re.MULTILINE)


@dataclasses.dataclass(kw_only=True)
class RuntimeArgs:
    """Flags of every training script: the machine, checkpoints, adapters, trackers."""

    # -- the machine
    tokens_per_microbatch: MayChange[Count] = 16384
    """Tokens per forward pass and rank."""
    checkpoint_activations: MayChange[bool] = False
    """Recompute layers in the backward pass: less memory, a third more time."""
    dtype: DType = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""
    shard_size: MayChange[Count | None] = None
    """Ranks that share one copy of a model (HSDP), such as the GPUs of a node. Default: all."""
    offload: MayChange[bool] = False
    """Keep Adam moments, and in RL the trained models while responses are sampled, in host memory."""
    deterministic: MayChange[bool] = False
    """On a GPU: sums in a fixed order, so that a repeated run gives the same bits; slower."""
    peak_tflops: MayChange[Positive | None] = None
    """Peak of a device in the compute dtype, for the metric mfu. Default: from a table of known GPUs."""
    plan: MayChange[bool] = False
    """Print what the run will hold in memory, and whether it fits, and exit; needs no GPU and no weights."""
    world_size: MayChange[Count | None] = None
    """For --plan: number of ranks. Default: as started."""
    gpu_gib: MayChange[NonNegative] = 80
    """For --plan: memory of a GPU in GiB; 0: the plan is for CPU processes."""
    max_steps: MayChange[Count | None] = None
    """Stop after this many steps; a schedule stays that of the whole run. Default: all steps."""
    save_every: MayChange[Count] = 100
    """Steps between checkpoints; the last step always makes one."""
    save_in_background: MayChange[bool] = False
    """Write a checkpoint while the next steps run, from a copy in host memory."""
    keep_checkpoints: MayChange[Count] = 2
    """The newest so many are kept: if the newest is damaged, the run goes on from the one before it."""
    skip_bad_steps: MayChange[Natural] = 0
    """Updates with a loss or gradient that is not finite or out of bounds that are left out before the run ends."""
    timeouts: MayChange[tuple[Count, Count, Count]] = TIMEOUTS
    """Seconds that a rank may take to start, for a rollout (or an evaluation, a checkpoint), for an update."""

    # -- low-rank adapters (LoRA, docs/gpus.md)
    lora_rank: Count | None = None
    """Rank of adapters on the frozen model; they need a higher learning rate (docs/gpus.md). Default: all weights."""
    lora_alpha: Positive | None = None
    """An adapter is multiplied by alpha / rank. Default: twice the rank."""

    # -- where metrics and rollouts go besides OUT (`python report.py OUT` needs neither)
    wandb: MayChange[str | None] = None
    """Project of Weights & Biases (pip install wandb)."""
    tensorboard: MayChange[bool] = False
    """Event files in OUT/tensorboard (pip install tensorboard)."""
    push_to_hub: MayChange[str | None] = None
    """Repository of the Hugging Face hub (OWNER/NAME) for the last weights and their card; a new one is private."""


@dataclasses.dataclass(kw_only=True)
class JudgeArgs:
    """Flags of the judge, in ppo_cpe.py and evaluate.py."""

    # -- the judge
    judge: str = "out/grm/model"
    """PATH of a generative reward model | http(s)://... | bt:PATH | world | FILE.py:FUNCTION (judges/). The key for
    https://my.host is in API_KEY_MY_HOST."""
    grm_template: str | None = None
    """File with another rubric. Default: the one that the judge was trained with."""
    score_weights: tuple[NonNegative, NonNegative, NonNegative] = SCORE_WEIGHTS
    """Of helpfulness, personalization, naturalness in the reward."""
    judge_temperature: NonNegative = 0.9
    """Of the critique and scores."""
    judge_attempts: Count = 3
    """Judgements that are asked for before a sample without a parsable one leaves the batch."""
    judge_max_new_tokens: Count = 512
    """Tokens of a judgement; what is cut off does not parse."""
    judge_patience: MayChange[Positive] = PATIENCE
    """Seconds that a server which is down, busy or answers rubbish is waited for before the run saves and stops."""


@dataclasses.dataclass(kw_only=True)
class EngineArgs:
    """Flags of the generation engine, in ppo_cpe.py and evaluate.py."""

    # -- generation
    max_batch: MayChange[Count] = 256
    """Sequences that are generated at once, per rank."""
    kv_tokens: MayChange[Count | None] = None
    """Tokens in the KV cache of the model that answers, per rank. Default: by --max-batch and the free memory."""


@dataclasses.dataclass(kw_only=True)
class DiagnosticArgs:
    """Flags of what an RL run is watched by."""

    # -- diagnostics, which change nothing in the training (docs/metrics.md)
    eval_data: MayChange[str | None] = None
    """Prompt rows that are not trained on; the metrics of their answers and edits are held_out/*."""
    eval_every: MayChange[Count] = 10
    """Evaluation interval in steps; the first evaluation is at step 1, before any training."""
    eval_n: MayChange[Count] = 64
    """Prompts of an evaluation: the first of the file."""
    audit_share: MayChange[Fraction] = 0.0
    """Share of the originals that the judge scores a second time, with another seed."""
    audit_judge: MayChange[str | None] = None
    """Another judge (as --judge) that scores these too. Like --judge it is waited for, and stops the run if it stays
    down."""
    log_tokens: MayChange[Natural] = 4
    """Answers a step, with their trained edits, whose tokens' log-probs, weights, advantages go into OUT/tokens."""
    save_batch: MayChange[Count | None] = None
    """Step whose batch and weights are kept in OUT/batch_*, for `python replay.py`."""


# What a user can mend: a flag, a file, a row, a disk, memory; two by name, since their libraries take long to load.
MENDABLE = (ValueError, OSError, FloatingPointError, RecursionError)
MENDABLE_NAMES = ("SafetensorError", "OutOfMemoryError")


@contextlib.contextmanager
def user_errors():
    """Ends an error that a user can mend in one line and exit status 2, without a traceback; an interruption in 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        mendable = isinstance(error, MENDABLE) or type(error).__name__ in MENDABLE_NAMES
        if os.environ.get("TRACEBACK") or not mendable:
            raise
        print(f"error: {printable(' '.join(str(error).splitlines()))}\n(TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)


around_main = contextlib.ExitStack()  # what modules want to be told when main ends, and how (watch.py)


def run(main: Callable[[Any], Any], args: Any) -> None:
    """main(args), as the last line of a script."""
    with user_errors(), around_main:
        main(args)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(args_class: type[T], doc: str, argv: list[str] | None = None) -> T:
    """The command line as an instance of the script's Args; `--help` prints `help_text`.

    Exit status 2: an unknown flag, a value that is no such type or out of its range.
    """
    if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        print(help_text(args_class, doc))
        sys.exit(0)
    args = tyro.cli(args_class, prog=os.path.basename(sys.argv[0]), args=argv, add_help=False)
    with user_errors():
        check_ranges(args)
    return args


SECRET_IN_ADDRESS = re.compile(r"https?://([^/?#\s]*@|[^#\s]*\?)", re.IGNORECASE)


def refuse_secrets_in_address(text: str, where: str) -> None:
    """ValueError, without the text: it holds the address of a server with a password or a query, which would be written
    into journals, logs and reports.
    """
    if SECRET_IN_ADDRESS.search(text):
        raise ValueError(
            f"{where} holds a password, a user name or a query (?...); expected http(s)://HOST[/PATH][#MODEL], and the "
            "key in an environment variable (docs/reliability.md, Keys)"
        )


def check_ranges(args: Any) -> None:
    """ValueError naming the flag, its value and its range, unless every field is within its type's. A flag that holds a
    secret is named without its value.
    """
    for name, value in vars(args).items():
        for text in value if isinstance(value, tuple) else [value]:
            if isinstance(text, str):
                refuse_secrets_in_address(text, flag(name))
    if getattr(args, "lora_alpha", None) is not None and args.lora_rank is None:
        raise ValueError(f"--lora-alpha {args.lora_alpha}: expected a --lora-rank beside it")
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        try:
            pydantic.TypeAdapter(hint).validate_python(value)
        except pydantic.ValidationError as error:
            raise ValueError(f"{flag(name)} {value}: {error.errors()[0]['msg'].replace('Input', 'it', 1)}") from error


def may_change(args_class: type) -> set[str]:
    """Names of the fields that are marked `MayChange`."""
    hints = get_type_hints(args_class, include_extras=True)
    return {name for name, hint in hints.items() if MAY_CHANGE in getattr(hint, "__metadata__", ())}


def non_default(args: Any) -> list[str]:
    """Names of the flags whose value is not the default. args.defaults, if there is one, comes before the fields'."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)} | getattr(args, "defaults", {})
    return [name for name, default in defaults.items() if getattr(args, name) != default]


def script_of(args: Any) -> str:
    """The name of the script whose flags these are. A copy of a script is another one."""
    return os.path.basename(inspect.getfile(type(args)))


def record(args: Any) -> dict[str, Any]:
    """The flags as a file of results holds them: {name: value}, and the names of those that are not the default."""
    return dataclasses.asdict(args) | {"non_default": non_default(args)}


def help_text(args_class: type, doc: str) -> str:
    """doc's first paragraph, the flags, and the commands of doc as examples.

    The groups of the flags are the comments `# -- title` in the source of Args. The default is added to a flag's
    docstring, unless it has a "Default: " of its own.
    """
    first, _, _ = doc.strip().partition("\n\n")
    hints = get_type_hints(args_class)
    annotated = get_type_hints(args_class, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(args_class)}
    positional = [name for name in fields if POSITIONAL in getattr(annotated[name], "__metadata__", ())]
    required = [name for name in positional if fields[name].default is dataclasses.MISSING]
    parser = argparse.ArgumentParser(
        prog=os.path.basename(sys.argv[0]),
        description=first,
        usage=" ".join(["%(prog)s", *map(str.upper, required), "[flags]"]),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        add_help=False,
    )
    group: argparse.ArgumentParser | argparse._ArgumentGroup = parser
    for title, name, text in _documented(args_class):
        if title is not None:
            group = parser.add_argument_group(title)
        if "Default: " not in text:
            text += f" ({_default_text(fields[name].default)})"
        text = text.replace("%", "%%")
        if name in positional:
            group.add_argument(name, metavar=name.upper(), nargs="*", help=text)
        elif hints[name] is bool:
            group.add_argument(flag(name), action="store_true", help=text)
        else:
            group.add_argument(flag(name), metavar=_metavar(hints[name]), help=text)
    examples = "\n".join(COMMAND.findall(doc))
    return f"{parser.format_help()}\nexamples:\n{examples}\n"


def _documented(args_class: type) -> Iterator[tuple[str | None, str, str]]:
    """Yields (title of a group that begins here or None, field, its docstring): of the class, then of its bases."""
    seen = set()
    for c in args_class.__mro__[:-1]:
        source = inspect.cleandoc(inspect.getsource(c))
        lines = source.splitlines()
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        title = None
        for node, following in itertools.pairwise([*definition.body, ast.Pass()]):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            above = re.match(r"\s*# -- (.*)", lines[node.lineno - 2])
            if above:
                title = above[1]
            name = node.target.id
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = str(following.value.value)
            if name not in seen:
                yield title, name, text
            title = None
            seen.add(name)


def _default_text(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if isinstance(default, tuple):
        default = " ".join(map(str, default)) or None
    return "default: none" if default is None else f"default: {default}"


def _metavar(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) is tuple:
        return " ".join("..." if part is Ellipsis else _metavar(part) for part in get_args(hint))
    return {int: "INT", float: "FLOAT", str: "TEXT"}.get(hint, getattr(hint, "__name__", str(hint)).upper())
