"""The model card of a run's last weights (README.md beside them), and --push-to-hub, which uploads both."""

import os
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from json_files import read_json
from runtime.digests import git_hash
from runtime.flags import RuntimeArgs, flag, non_default, script_of
from runtime.rows import logged_rows

DATA_FLAGS = ("data", "prompts", "judge", "eval_data")


def check_hub(repo: str) -> None:
    """ValueError: --push-to-hub names no repository, or this machine has no token for the hub."""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"--push-to-hub {repo}: {error}") from error
    if get_token() is None:
        raise ValueError(f"--push-to-hub {repo}: no token of the Hugging Face hub; `hf auth login`, or set HF_TOKEN")


def metadata_of(folder: str) -> dict[str, Any]:
    """The metadata of a model's own card; {} where it has none that can be read."""
    file = os.path.join(folder, "README.md")
    if not os.path.isfile(file):
        return {}
    try:
        return metadata_load(file) or {}
    except (ValueError, yaml.YAMLError):
        return {}


def table(header: tuple[str, str], rows: dict[str, Any]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    for name, value in rows.items():
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"| {name} | {text} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


def model_card(out: str, args: RuntimeArgs, inputs: dict[str, str], base_folder: str) -> str:
    """README.md for the weights of a finished run: base model, data, flags, metrics, licence.

    base_folder: of the model that was trained, whose own card says its licence and what it was trained from.
    inputs: digests, as in args.json.
    """
    base = getattr(args, "model", None)
    if getattr(args, "from_scratch", None):
        base = None
    before = metadata_of(base_folder) if base else {}
    # only an id of the hub may stand in the metadata, so a folder passes on what its own card names
    origin = before.get("base_model") if base and os.path.isdir(base) else base
    licence = {name: value for name, value in before.items() if name.startswith("license")}
    metadata = ModelCardData(base_model=origin, library_name="transformers", tags=["critique-post-edit"], **licence)

    script = script_of(args)
    trained_from = f"`{base}`" if base else "random weights"
    if origin and origin != base:
        trained_from += f" (which was trained from {origin})"
    data = {f"`{flag(name)}`": getattr(args, name) for name in DATA_FLAGS if getattr(args, name, None)}
    changed = {f"`{flag(name)}`": getattr(args, name) for name in non_default(args)}
    metrics = logged_rows(os.path.join(out, "metrics.jsonl"))[-1]
    figures = {name: f"{value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))}
    held_out = os.path.join(out, "held_out.json")
    if os.path.isfile(held_out):
        figures |= {f"held-out judgements: {name}": value for name, value in read_json(held_out).items()}
    said = f"{licence['license']}, as the base model's card says" if "license" in licence else "not known"
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {os.path.basename(os.path.abspath(out))}\n",
        f"Trained from {trained_from} by `{script}` of a Critique-Post-Edit checkout at commit {git_hash()}.\n",
        f"Licence: {said}. The data may set further terms.\n",
        "## Data\n",
        table(("flag", "value"), data),
        table(("input", "digest"), inputs),
        "## Flags that differ from their defaults\n",
        table(("flag", "value"), changed),
        f"## Metrics of step {metrics['step']}\n",
        table(("metric", "value"), figures),
    ]
    return "\n".join(parts)


def push(folder: str, repo: str) -> str:
    """Uploads a folder of weights to a repository of the hub, which is private if it is new -> the commit's address.

    ValueError: it failed. The folder is as it was.
    """
    try:
        HfApi().create_repo(repo, private=True, exist_ok=True)
        return HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload weights").commit_url
    except Exception as error:  # of any kind: it comes from a library or a network
        raise ValueError(
            f"--push-to-hub {repo}: {type(error).__name__}: {error}; the weights are in {folder}, and the same command "
            "tries again"
        ) from error
