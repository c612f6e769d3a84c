"""One engine of bench/cpu_engines.py, in a process of its own, with the packages of its own environment.

An engine is a function `generate(prompts, n_new)` that decodes greedily and ignores end tokens. All engines get and
return ids, so none needs a tokenizer. Each imports its packages when it is opened, since no environment has them all.
"""

import functools
import glob
import importlib.metadata
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TypedDict

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # names that torch and vLLM know
Generate = Callable[[list[list[int]], int], list[list[int]]]


class Job(TypedDict):
    engine: str  # ours, or a key of PEERS
    folder: str  # checkpoint of a Qwen2 model
    config: dict[str, Any]  # its fields, under the names of model_config.Config
    dtype: str  # fp32 or bf16
    batch: tuple[int, ...]  # numbers of prompts that are decoded at once
    prompt: int  # tokens of each of these prompts
    new_tokens: int  # tokens that are generated for each
    prefill: int  # tokens of the prompt whose prefill is measured
    max_batch: int
    max_len: int  # tokens of the longest sequence
    repeats: int


class Result(TypedDict, total=False):
    missing: str  # package that the environment lacks; then there is nothing else
    version: str
    responses: list[list[int]]  # greedy tokens, by which engines are compared
    rates: dict[str, float]  # tokens per second of processor time


def open_ours(job: Job) -> Generate:
    import torch

    from engine import Engine
    from model import load_pretrained

    model = load_pretrained(job["folder"], getattr(torch, DTYPES[job["dtype"]]))
    engine = Engine(model, [], job["max_len"], job["max_batch"])

    def generate(prompts: list[list[int]], n_new: int) -> list[list[int]]:
        engine.reset_prefix_cache()
        return [sample.ids for (sample,) in engine.generate(prompts, max_new_tokens=n_new, temperature=0.0)]

    return generate


def open_transformers(job: Job) -> Generate:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=DTYPES[job["dtype"]])
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(prompts: list[list[int]], n_new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new)
        return output[:, ids.shape[1] :].tolist()

    return generate


def open_vllm(job: Job) -> Generate:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whose time is measured
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as OMP_NUM_THREADS, on any core
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    }
    import vllm

    llm = vllm.LLM(
        job["folder"],
        skip_tokenizer_init=True,
        dtype=DTYPES[job["dtype"]],
        max_model_len=job["max_len"],
        max_num_seqs=job["max_batch"],
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], n_new: int) -> list[list[int]]:
        params = vllm.SamplingParams(temperature=0, max_tokens=n_new, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def write_gguf(job: Job, file: str) -> None:
    """The checkpoint as llama.cpp reads it, without a tokenizer. Vectors stay in fp32."""
    import gguf
    from safetensors.torch import load_file

    config = job["config"]
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    types = {"fp32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}
    for weights in sorted(glob.glob(os.path.join(job["folder"], "*.safetensors"))):
        for name, tensor in load_file(weights).items():
            values = tensor.float().numpy()
            kind = types["fp32" if values.ndim == 1 else job["dtype"]]
            new_name = names.get_name(name, (".weight", ".bias"))
            writer.add_tensor(new_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_llama_cpp(job: Job) -> Generate:
    """One `llama_decode` for all sequences a step, as in llama.cpp's own llama-batched-bench."""
    import llama_cpp
    import numpy as np

    file = "model.gguf"  # the working directory is a temporary folder
    write_gguf(job, file)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())

    @functools.cache
    def open_context(n_sequences: int, length: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = n_sequences
        params.n_ctx = n_sequences * -(-length // 256) * 256  # a multiple of 256 for each
        params.n_batch = params.n_ctx  # tokens of a call; it computes 512 at a time by default
        params.n_threads = params.n_threads_batch = 1
        if job["dtype"] == "fp32":  # keys and values are in fp16 by default
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        return llama_cpp.llama_init_from_model(model, params)

    batch = llama_cpp.llama_batch_init(job["max_batch"] * job["max_len"], 0, 1)

    def forward(context: Any, ids: list[list[int]], position: int) -> list[int]:
        """Feeds each sequence the next of its ids. Returns the most likely token after them."""
        n = 0
        last = []
        for sequence, tokens in enumerate(ids):
            for i, token in enumerate(tokens):
                batch.token[n] = token
                batch.pos[n] = position + i
                batch.n_seq_id[n] = 1
                batch.seq_id[n][0] = sequence
                batch.logits[n] = i == len(tokens) - 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed for {n} tokens")
        shape = (job["config"]["vocab_size"],)
        logits = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape) for i in last]
        return [int(row.argmax()) for row in logits]

    def generate(prompts: list[list[int]], n_new: int) -> list[list[int]]:
        context = open_context(len(prompts), len(prompts[0]) + job["new_tokens"])
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        steps = [forward(context, prompts, 0)]
        while len(steps) < n_new:
            position = len(prompts[0]) + len(steps) - 1
            steps.append(forward(context, [[token] for token in steps[-1]], position))
        return [list(tokens) for tokens in zip(*steps)]

    return generate


PEERS = {  # name: package and function
    "llama.cpp": ("llama-cpp-python", open_llama_cpp),
    "vLLM": ("vllm-cpu", open_vllm),
    "transformers": ("transformers", open_transformers),
}


def random_ids(job: Job, n_prompts: int, length: int) -> list[list[int]]:
    return [random.Random(i).choices(range(job["config"]["vocab_size"]), k=length) for i in range(n_prompts)]


def seconds(generate: Generate, prompts: list[list[int]], n_new: int) -> float:
    """Processor time of all threads, so that other processes don't add to it."""
    started = time.process_time()
    generate(prompts, n_new)
    return time.process_time() - started


def measure(job: Job) -> Result:
    package, opener = ("torch", open_ours) if job["engine"] == "ours" else PEERS[job["engine"]]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Result(missing=package)
    generate = opener(job)
    n_new = job["new_tokens"]
    rates = {}
    for n in job["batch"]:
        prompts = random_ids(job, n, job["prompt"])
        generate(prompts, 3)  # warm-up
        times = [seconds(generate, prompts, n_new) - seconds(generate, prompts, 1) for _ in range(job["repeats"])]
        rates[f"decode {n}"] = n * (n_new - 1) / statistics.median(times)
    prompts = random_ids(job, 1, job["prefill"])
    generate(prompts, 1)
    times = [seconds(generate, prompts, 1) for _ in range(job["repeats"])]
    rates["prefill"] = job["prefill"] / statistics.median(times)
    responses = generate(random_ids(job, min(job["max_batch"], 4), job["prompt"]), min(n_new, 16))
    return Result(version=f"{package} {version}", rates=rates, responses=responses)


def main() -> None:
    """Reads a Job from standard input and writes a Result to result.json, in the working directory."""
    job: Job = json.load(sys.stdin)
    if job["engine"] != "ours":
        del sys.path[0]  # the root of the project, whose modules a peer must not find in place of its own
    result = measure(job)
    with open("result.json", "w", encoding="utf-8") as f:
        json.dump(result, f)
