"""Checkpoint folders: where they come from, strict reading of their tensors, and writing what other tools load."""

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from json_files import read_json, write_json
from kernels.varlen_attention import say_once
from model_config import FAMILIES, Config

GIB = 2**30
INDEX_FILE = "model.safetensors.index.json"
LARGEST_FILE = 2**27  # bytes of a file other than weights; the largest tokenizers take some 40 MB
SHARD_BYTES = 5 * 10**9  # of a saved safetensors file, as the hub's own tools do
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")  # of ChatML and Llama 3
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
# What a chat template may take from its caller, with the values that prompts are made with here. Llama 3's takes the
# date as today's if it has no clock; with one, prompts would change at midnight.
TEMPLATE_DEFAULTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
# The model's own distribution, which RL samples from. top_k 0: the whole vocabulary.
PLAIN_SAMPLING = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
MADE_BY = {  # scripts that write the model folders which other scripts read by default
    "out/sft/": "sft.py",
    "out/grm/": "train_grm.py",
    "out/bt/": "train_grm.py --objective bt",
    "out/dpo/": "dpo.py",
    "out/ppo_cpe/": "ppo_cpe.py",
}


def resolve(path: str, patterns: Iterable[str] = ("*.json", "*.safetensors", "*.txt", "*.jinja", "README.md")) -> str:
    """Returns a local folder for a folder name or a hub id, whose matching files are downloaded.

    The hub is not asked for what is meant as a folder: a path in `out` or in another folder that exists, or one that is
    no hub id (ORGANIZATION/NAME). Raises ValueError if it is neither, and for a folder that `check_files` refuses.
    """
    if os.path.isdir(path):
        check_files(path)
        return path
    for folder, script in MADE_BY.items():
        if path.startswith(folder):
            raise ValueError(f"{path}: no such folder; run {script} first, or name another model")
    organization, _, name = path.partition("/")
    is_local = organization in ("", ".", "..", "~", "out") or "/" in name or os.path.isdir(organization)
    if is_local or os.path.exists(path):
        raise ValueError(f"{path} is not a folder; expected a model's folder, or a hub id such as Qwen/Qwen3-8B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return snapshot_download(path, allow_patterns=list(patterns))
    except (HFValidationError, OSError) as error:  # the hub's errors for an unknown id or no network are OSErrors
        raise ValueError(f"model {path!r} is not a folder, and fetching it from the hub failed: {error}") from error


def check_files(folder: str) -> None:
    """Raises ValueError for a file of a model's folder that leads out of it, is no regular file, or is too large.

    A folder may come from anybody. Its tokenizer and templates are copied into every checkpoint, and people publish
    checkpoints: a link to a private file would publish that file. In the hub's cache, the files of snapshots/X are
    links to ../../blobs, which belong to them.
    """
    root = os.path.realpath(folder)
    model, parent = os.path.split(os.path.dirname(root))
    blobs = os.path.join(model, "blobs") if parent == "snapshots" else root
    for pattern in ("*.json", "*.safetensors", "*.txt", "*.jinja", "templates/*.txt"):
        for file in glob.glob(os.path.join(glob.escape(folder), pattern)):
            target = os.path.realpath(file)
            if os.path.commonpath([root, target]) != root and os.path.dirname(target) != blobs:
                raise ValueError(f"{file}: a link out of the model's folder, to {target}; expected a copy of the file")
            if not os.path.exists(file) or os.path.isdir(file):
                continue  # missing for whoever reads it
            if not os.path.isfile(file):
                raise ValueError(f"{file}: no regular file")
            size = os.path.getsize(file)
            if size > LARGEST_FILE and not file.endswith(".safetensors"):
                raise ValueError(f"{file}: {size:,} bytes, expected at most {LARGEST_FILE:,}")


def load_config(folder: str) -> Config:
    """Config of a checkpoint folder. Raises ValueError without config.json, or for a model that isn't supported."""
    file = os.path.join(folder, "config.json")
    if not os.path.isfile(file):
        raise ValueError(f"{folder}: no config.json; expected a checkpoint folder")
    return Config.from_dict(read_json(file), file)


# -- sharded parameters ------------------------------------------------------------------------------------------------


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of a parameter. A sharded one is gathered, which every rank has to take part in."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def copy_into(parameter: Tensor, full: Tensor) -> None:
    """Copies a whole tensor into a parameter in place. Of a sharded parameter, each rank copies its slice."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            full = full.to(device=parameter.device, dtype=parameter.dtype)
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)


# -- reading -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_weights(
    folder: str, shapes: dict[str, torch.Size], scalar_head: bool, is_tied: bool
) -> Iterator[dict[str, safe_open]]:
    """Opens the weights of a folder -> {tensor: open file that holds it}.

    shapes: of the model's parameters. `score.weight` may be missing. An LM head is superfluous if the model has a
    scalar head or is tied; so are old checkpoints' rotary buffers.

    Raises ValueError, naming the file or tensor, for a file that is cut off or is not a safetensors file, and for a
    missing, superfluous or misshapen tensor.
    """
    file_of = _weight_files(folder)
    ignored = {"lm_head.weight"} if scalar_head or is_tied else set()
    missing = [name for name in shapes if name not in file_of and name != "score.weight"]
    unknown = [name for name in file_of if name not in shapes and name not in ignored]
    superfluous = [name for name in unknown if "rotary_emb" not in name]
    if missing or superfluous:
        raise ValueError(
            f"{folder}: not the tensors of its config.json; missing {missing[:3]} ({len(missing)} in all), "
            f"superfluous {superfluous[:3]} ({len(superfluous)} in all)"
        )
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(_open_file(file)) for file in set(file_of.values())}
        held = {file: set(f.keys()) for file, f in opened.items()}
        for name, file in file_of.items():
            if name not in held[file]:
                raise ValueError(f"{file}: lacks {name}, which the index says it holds")
        files = {name: opened[file] for name, file in file_of.items()}
        for name in set(shapes) & set(files):
            shape = files[name].get_slice(name).get_shape()
            if shape != list(shapes[name]):
                raise ValueError(f"{folder}: {name} has shape {shape}, its config.json says {list(shapes[name])}")
        if is_tied and not scalar_head:
            _check_tied_head(file_of, files)
        yield files


def _weight_files(folder: str) -> dict[str, str]:
    """Returns {tensor: file that holds it}. Raises ValueError without weights, or for an index that is not one."""
    index_file = os.path.join(folder, INDEX_FILE)
    single = os.path.join(folder, "model.safetensors")
    names = None
    if os.path.isfile(index_file):
        names = read_json(index_file).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index_file}: expected a weight_map from tensors to files")
    if os.path.isfile(single) and (names is None or "model.safetensors" not in names.values()):
        if names is not None:
            say_once(f"{folder}: reading model.safetensors, as transformers does; its index of other files is ignored")
        with _open_file(single) as f:
            return dict.fromkeys(f.keys(), single)
    if names is None:
        raise ValueError(f"{folder}: neither model.safetensors nor {INDEX_FILE}")
    for name in sorted(set(names.values())):
        if os.path.basename(name) != name:
            raise ValueError(f"{index_file} names {name}, expected a file of the same folder")
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{index_file} names {name}, which is not there")
    return {tensor: os.path.join(folder, name) for tensor, name in names.items()}


def _open_file(file: str) -> safe_open:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error


def _check_tied_head(file_of: dict[str, str], files: dict[str, safe_open]) -> None:
    """Raises ValueError for a tied model whose files hold an LM head other than the embedding.

    Tools disagree about such files: transformers uses the head, vLLM ignores it.
    """
    head = "lm_head.weight"
    embedding = "model.embed_tokens.weight"
    if head not in files:
        return
    if not torch.equal(files[head].get_tensor(head), files[embedding].get_tensor(embedding)):
        raise ValueError(
            f"{file_of[head]}: {head} differs from {embedding}, though config.json says tie_word_embeddings: true. "
            "Write false there if the model was trained with this head, else remove the tensor from the file"
        )


# -- special tokens ----------------------------------------------------------------------------------------------------


def stop_ids(folder: str, control: dict[str, int]) -> list[int]:
    """Ids that end a response: the end of a turn, `<|endoftext|>`, then those that the folder's own files name.

    control: {text: id} of the tokenizer's added tokens.
    """
    stops = [control[token] for token in (*TURN_ENDS, "<|endoftext|>") if token in control]
    for name in ("generation_config.json", "config.json"):
        file = os.path.join(folder, name)
        eos = read_json(file).get("eos_token_id") if os.path.isfile(file) else None
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not all(type(i) is int and abs(i) < 2**31 for i in ids):
            raise ValueError(f"{file}: eos_token_id is {eos!r}, expected an integer or a list of integers, below 2^31")
        stops += ids
    return list(dict.fromkeys(stops))


def special_ids(folder: str, vocab_size: int) -> dict[str, int | list[int]]:
    """eos_token_id and pad_token_id for a checkpoint with the tokenizer of this folder.

    transformers and vLLM end a response at the first. Batches are padded with the second, and a scalar head is read at
    the last token that is not padding.
    """
    control = {}
    file = os.path.join(folder, "tokenizer.json")
    if os.path.isfile(file):
        control = {token["content"]: token["id"] for token in read_json(file).get("added_tokens", [])}
    pad = None
    file = os.path.join(folder, "tokenizer_config.json")
    if os.path.isfile(file):
        pad = read_json(file).get("pad_token")
        if isinstance(pad, dict):
            pad = pad.get("content")
    if pad not in tuple(control) or pad in TURN_ENDS:  # the end of a response must not count as padding
        pad = next((token for token in ("<|endoftext|>", "<|finetune_right_pad_id|>") if token in control), None)
    ids: dict[str, int | list[int]] = {}
    stops = [i for i in stop_ids(folder, control) if i < vocab_size]  # an id without an embedding loads nowhere
    if stops:
        ids["eos_token_id"] = stops
    if pad is not None and control[pad] < vocab_size:
        ids["pad_token_id"] = control[pad]
    return ids


# -- writing -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_folder(path: str) -> Iterator[str]:
    """Yields a new folder that takes the place of PATH at the end, so that PATH appears whole or not at all."""
    tmp = f"{path.rstrip('/')}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    yield tmp
    shutil.rmtree(path, ignore_errors=True)
    os.rename(tmp, path)


UMASK = os.umask(0)  # it can only be read by setting it: at import, before other threads create files
os.umask(UMASK)
NEW_FILE = 0o666 & ~UMASK  # mode


def write_tensors(tensors: dict[str, Tensor], file: str, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the mode of any new file. The library makes one that only its owner may read."""
    save_file(tensors, file, metadata)
    os.chmod(file, NEW_FILE)


def save_tensors(tensors: dict[str, Tensor], folder: str) -> None:
    """Writes safetensors files of at most SHARD_BYTES, or one tensor, and their index if there are several."""
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_BYTES)
    for file in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        os.chmod(file, NEW_FILE)


def save_config(config: Config, scalar_head: bool, dtype: torch.dtype, special: dict, folder: str) -> None:
    """Writes config.json, with the fields that transformers and vLLM choose a class and a dtype by."""
    content = config.to_dict()
    kind = "ForSequenceClassification" if scalar_head else "ForCausalLM"
    content["architectures"] = [FAMILIES[config.model_type] + kind]
    # two names of the same field: transformers 5 reads the first, older versions read the second
    content["dtype"] = content["torch_dtype"] = str(dtype).removeprefix("torch.")
    if scalar_head:
        content["num_labels"] = 1
        content["id2label"] = {"0": "LABEL_0"}  # transformers derives num_labels from it
        content["label2id"] = {"LABEL_0": 0}
    write_json(os.path.join(folder, "config.json"), content | special)


def copy_tokenizer(source: str, special: dict, folder: str) -> None:
    """Copies a folder's tokenizer files and templates; the chat template and generation_config.json with new defaults.

    A server renders and samples by these what a request leaves open. So the template takes what this project trains
    with as defaults, and a response is sampled from the model's own distribution. ValueError: see `check_files`.
    FileNotFoundError: the folder is gone, and without it the checkpoint would lack its tokenizer.
    """
    if not os.path.isdir(source):
        raise FileNotFoundError(f"{source} is gone; checkpoints take the tokenizer from it")
    check_files(source)
    for name in TOKENIZER_FILES:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    for file in glob.glob(os.path.join(glob.escape(source), "templates", "*.txt")):
        os.makedirs(os.path.join(folder, "templates"), exist_ok=True)
        shutil.copyfile(file, os.path.join(folder, "templates", os.path.basename(file)))

    file = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(file):
        with open(file, encoding="utf-8") as f:
            text = f.read()
        with open(file, "w", encoding="utf-8") as f:
            f.write(_with_template_defaults(text))
    file = os.path.join(folder, "tokenizer_config.json")
    content = read_json(file) if os.path.isfile(file) else {}
    template = content.get("chat_template")
    if isinstance(template, str):
        write_json(file, content | {"chat_template": _with_template_defaults(template)})
    elif template:  # [{"name", "template"}, ...]
        named = [entry | {"template": _with_template_defaults(entry["template"])} for entry in template]
        write_json(file, content | {"chat_template": named})

    file = os.path.join(folder, "generation_config.json")
    before = read_json(file) if os.path.isfile(file) else {}
    ids = {name: value for name, value in before.items() if name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(file, {**ids, **special, **PLAIN_SAMPLING})


def _with_template_defaults(template: str) -> str:
    """Sets what the template reads of TEMPLATE_DEFAULTS, at its start, unless its caller does."""
    for name, value in TEMPLATE_DEFAULTS.items():
        default = f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}\n"
        if re.search(rf"\b{name}\b", template) and default not in template:
            template = default + template
    return template


def save_templates(templates: dict[str, str], folder: str) -> None:
    """Writes {name: text} to FOLDER/templates, where `prompts.load_templates` reads them."""
    for name, text in templates.items():
        os.makedirs(os.path.join(folder, "templates"), exist_ok=True)
        with open(os.path.join(folder, "templates", f"{name}.txt"), "w", encoding="utf-8") as f:
            f.write(text + "\n")
