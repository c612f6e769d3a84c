"""model.py against transformers: logits, gradients, both directions of loading, and what it refuses."""

import importlib
import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import random_model, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from attention import Packed, SeqLens
from chat import Chat
from kernels import varlen_attention
from model import load_pretrained, save_pretrained
from model_config import Config
from weights import resolve

CONFIGS = [
    dict(),
    dict(tie_word_embeddings=False, num_key_value_heads=1, rope_theta=1e6),
    dict(num_key_value_heads=4, hidden_size=64, num_hidden_layers=3, rms_norm_eps=1e-5),
    dict(tie_word_embeddings=False, num_attention_heads=8, num_key_value_heads=2, rope_theta=5e5),
]


def packed_batch(config, lengths=(7, 1, 12, 33)):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, config.vocab_size, (n,), generator=generator) for n in lengths]
    return ids, Packed(lengths)


@pytest.mark.parametrize("changes", CONFIGS)
def test_logits_equal_transformers(tmp_path, changes):
    config = tiny_config(**changes)
    model = random_model(config)
    save_pretrained(model, str(tmp_path / "m"), None)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    loaded = load_pretrained(str(tmp_path / "m"))
    ids, packed = packed_batch(config)
    logits = loaded(torch.cat(ids), packed.position_ids, packed)
    expected = torch.cat([reference(i[None]).logits[0] for i in ids])
    assert logits.std() > 0.3  # not a comparison of zeros
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_scalar_head_equals_transformers(tmp_path):
    config = tiny_config()
    save_pretrained(random_model(config, scalar_head=True), str(tmp_path / "m"), None)
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32)
    loaded = load_pretrained(str(tmp_path / "m"), scalar_head=True)
    ids, packed = packed_batch(config)
    values = loaded(torch.cat(ids), packed.position_ids, packed)
    hidden = torch.cat([reference.model(i[None]).last_hidden_state[0] for i in ids])
    assert reference.config.num_labels == 1
    torch.testing.assert_close(values, reference.score(hidden)[:, 0], atol=1e-4, rtol=0)


def test_a_critic_starts_on_an_lm_with_a_zero_head(tmp_path):
    config = tiny_config(tie_word_embeddings=False)
    save_pretrained(random_model(config), str(tmp_path / "m"), None)
    critic = load_pretrained(str(tmp_path / "m"), scalar_head=True)
    ids, packed = packed_batch(config)
    assert (critic(torch.cat(ids), packed.position_ids, packed) == 0).all()


def test_a_scalar_head_is_fp32_behind_a_bf16_trunk(tmp_path):
    """Its weights, in the model and in the file, and the product: values differ by less than bf16 could tell apart."""
    model = random_model(tiny_config(), scalar_head=True)
    save_pretrained(model, str(tmp_path / "m"), None, torch.bfloat16)
    loaded = load_pretrained(str(tmp_path / "m"), torch.bfloat16, scalar_head=True)
    assert torch.equal(loaded.score.weight, model.score.weight) and loaded.score.weight.dtype == torch.float32
    assert loaded.model.norm.weight.dtype == torch.bfloat16
    hidden = []
    loaded.model.norm.register_forward_hook(lambda module, given, out: hidden.append(out[0]))
    ids, packed = packed_batch(model.config)
    for trunk_dtype in ("as loaded", "all bf16"):  # as FSDP hands over the weights where it casts all of them
        if trunk_dtype == "all bf16":
            loaded.to(torch.bfloat16)
        values = loaded(torch.cat(ids), packed.position_ids, packed)
        assert hidden[-1].dtype == torch.bfloat16 and values.dtype == torch.float32
        exact = hidden[-1].double() @ loaded.score.weight[0].double()
        assert (values - exact).abs().max() < 1e-6 < (values - values.bfloat16()).abs().max()
    values.sum().backward()
    assert loaded.score.weight.grad.abs().sum() > 0 and loaded.model.norm.weight.grad.abs().sum() > 0


def test_sequences_do_not_see_each_other():
    model = random_model(tiny_config())
    ids, packed = packed_batch(model.config)
    together = model(torch.cat(ids), packed.position_ids, packed)
    alone = torch.cat([model(i, torch.arange(len(i)), Packed([len(i)])) for i in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = random_model(tiny_config())
        model.checkpoint_activations = recompute
        ids, packed = packed_batch(model.config)
        model(torch.cat(ids), packed.position_ids, packed).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_indexed_shards_load(tmp_path, monkeypatch):
    model = random_model(tiny_config())
    monkeypatch.setattr("weights.SHARD_BYTES", 20_000)
    save_pretrained(model, str(tmp_path / "m"), None)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    loaded = load_pretrained(str(tmp_path / "m"))
    for (name, a), b in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(a, b), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def edit_json(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **changes}))


def test_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="not a folder"):
        os.environ["HF_HUB_OFFLINE"] = "1"
        load_pretrained(str(tmp_path / "nothing" / "here"))


def test_refuses_missing_superfluous_and_misshapen_tensors(tmp_path):
    folder = tmp_path / "m"
    save_pretrained(random_model(tiny_config()), str(folder), None)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.bias"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=name):
        load_pretrained(str(folder))
    save_file({**weights, "model.layers.9.x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="superfluous.*model.layers.9.x"):
        load_pretrained(str(folder))
    save_file({**weights, name: torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"k_proj.bias has shape \[3\]"):
        load_pretrained(str(folder))


def test_config_reads_both_generations_of_rope_fields():
    raw = dict(
        model_type="qwen2", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    assert Config.from_dict({**raw, "rope_theta": 1e6}).rope_theta == 1e6
    rope = {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 1.0}  # as transformers 5 saves it
    assert Config.from_dict({**raw, "rope_parameters": rope}).rope_theta == 5e5


# -- what other tools make of a saved folder ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_tokenizer(tiny, tmp_path_factory):
    """A tokenizer folder as base checkpoints have it: `<|endoftext|>` ends, or nothing is said."""
    folder = tmp_path_factory.mktemp("base") / "tokenizer"
    shutil.copytree(tiny / "tokenizer", folder)
    ids = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return folder, {token["content"]: token["id"] for token in ids}


@pytest.mark.parametrize("source", ["scratch", "base"])
def test_a_response_ends_at_im_end_in_transformers(base_tokenizer, tmp_path, source):
    folder, ids = base_tokenizer
    im_end, endoftext = ids["<|im_end|>"], ids["<|endoftext|>"]
    if source == "base":
        for name in ("config.json", "generation_config.json"):
            (tmp_path / name).write_text(json.dumps({"eos_token_id": endoftext, "max_new_tokens": 64}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, tmp_path)
        folder = tmp_path
    model = random_model(tiny_config(vocab_size=512, tie_word_embeddings=False))
    with torch.no_grad():  # whatever comes, <|im_end|> is the most likely
        model.lm_head.weight.zero_()
        model.lm_head.weight[im_end] = model.model.norm.weight
        model.lm_head.weight[7] = -model.model.norm.weight
    save_pretrained(model, str(tmp_path / "m"), str(folder))
    for name in ("config.json", "generation_config.json"):
        saved = json.loads((tmp_path / "m" / name).read_text())
        assert (saved["eos_token_id"], saved["pad_token_id"]) == ([im_end, endoftext], endoftext)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    prompts = torch.tensor([[3, 4, 5], [8, 9, 10]])
    ended = reference.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=False)
    for row in ended.tolist():
        assert im_end in row[3:] or row[3:] == [7] * 20
    assert any(im_end in row[3:] for row in ended.tolist()) and ended.shape[1] < 3 + 20


def test_modes_of_saved_files_are_those_of_new_ones(base_tokenizer, tmp_path):
    """Whatever the modes of the files that are copied, such as those of a shared store, which nobody may write."""
    shutil.copytree(base_tokenizer[0], tmp_path / "store")
    (tmp_path / "store/templates").mkdir()
    (tmp_path / "store/templates/answer.txt").write_text("{question}")
    for file in (tmp_path / "store").rglob("*.*"):
        file.chmod(0o444)
    (tmp_path / "new").write_text("")
    save_pretrained(random_model(tiny_config(vocab_size=512)), str(tmp_path / "m"), str(tmp_path / "store"))
    saved = {file.name: file.stat().st_mode for file in (tmp_path / "m").rglob("*.*")}
    assert {"model.safetensors", "tokenizer_config.json", "answer.txt"} <= saved.keys()
    assert set(saved.values()) == {(tmp_path / "new").stat().st_mode}


def test_no_model_is_saved_without_the_tokenizer_it_had(base_tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone is gone; checkpoints take the tokenizer from it"):
        save_pretrained(random_model(tiny_config(vocab_size=512)), str(tmp_path / "m"), str(tmp_path / "gone"))


def test_a_saved_model_is_sampled_as_it_is(base_tokenizer, tmp_path):
    """Nothing of a chat model's own defaults: transformers and vLLM apply these to whatever a request leaves open."""
    source = tmp_path / "source"
    shutil.copytree(base_tokenizer[0], source)
    defaults = dict(do_sample=True, repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20)  # Qwen2.5-Instruct's
    more = dict(max_new_tokens=3, min_p=0.1, no_repeat_ngram_size=2, suppress_tokens=[5], bos_token_id=9)
    (source / "generation_config.json").write_text(json.dumps({**defaults, **more}))
    save_pretrained(random_model(tiny_config(vocab_size=512), std=0.02), str(tmp_path / "m"), str(source))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.manual_seed(0)
    found = reference.generate(
        torch.tensor([[3, 4, 5, 3, 4]]),
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert found.sequences.shape[1] > 5 + 3
    for scores, logits in zip(found.scores, found.logits):  # after and before what the folder's defaults do
        assert torch.equal(scores, logits)
    saved = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    # what vLLM reads as the server's defaults; top_k 0 is the whole vocabulary there and in transformers
    sampling = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert {name: saved[name] for name in sampling} == sampling and "max_new_tokens" not in saved
    assert saved["bos_token_id"] == 9 and saved["eos_token_id"] == reference.generation_config.eos_token_id


def test_the_dtype_of_the_file_is_the_only_one(tmp_path):
    """A source that says bfloat16 in either of the two names, saved in fp32: transformers loads fp32."""
    model = random_model(tiny_config())
    save_pretrained(model, str(tmp_path / "m"), None)
    edit_json(tmp_path / "m" / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    for dtype in (torch.float32, torch.bfloat16):
        save_pretrained(load_pretrained(str(tmp_path / "m"), torch.float32), str(tmp_path / "again"), None, dtype)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").dtype == dtype
        raw = json.loads((tmp_path / "again" / "config.json").read_text())
        assert raw["dtype"] == raw["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_padded_batch_scores_the_same_in_transformers(base_tokenizer, tmp_path):
    folder, ids = base_tokenizer
    config = tiny_config(vocab_size=512)
    save_pretrained(random_model(config, scalar_head=True), str(tmp_path / "m"), str(folder))
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    texts = ["tea<|im_end|>", "a trip with jazz<|im_end|>", "What about a gift?<|im_end|>"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    found = reference(**batch).logits[:, 0]
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    packed = Packed([len(s) for s in sequences])
    values = load_pretrained(str(tmp_path / "m"), scalar_head=True)(
        torch.tensor(sum(sequences, [])), packed.position_ids, packed
    )
    ours = values[packed.cu_seqlens[1:].long() - 1]
    assert ours.std() > 0.01 and len({len(s) for s in sequences}) > 1
    torch.testing.assert_close(found, ours, atol=1e-4, rtol=0)


# -- folders that say two things, and files that say none --------------------------------------------------------------


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path):
    """transformers takes such a head and vLLM leaves it: nothing here chooses in silence."""
    folder = tmp_path / "m"
    save_pretrained(random_model(tiny_config(tie_word_embeddings=False)), str(folder), None)
    weights = load_file(folder / "model.safetensors")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"model.safetensors: lm_head.weight differs.*tie_word_embeddings: true"):
        load_pretrained(str(folder))
    assert load_pretrained(str(folder), scalar_head=True).scalar_head  # which has no use for it
    edit_json(folder / "config.json", tie_word_embeddings=False)
    ids, packed = packed_batch(load_pretrained(str(folder)).config)
    own = load_pretrained(str(folder))(torch.cat(ids), packed.position_ids, packed)
    # a copy of the embedding is what some tools write for a tied model
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    tied = load_pretrained(str(folder))(torch.cat(ids), packed.position_ids, packed)
    assert (own - tied).abs().max() > 1


def test_a_stale_index_beside_one_file(tmp_path, monkeypatch, capsys):
    """What transformers reads is read, and said once."""
    model = random_model(tiny_config(), seed=5)
    save_pretrained(model, str(tmp_path / "new"), None)
    monkeypatch.setattr("weights.SHARD_BYTES", 20_000)
    save_pretrained(random_model(tiny_config()), str(tmp_path / "m"), None)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "m")
    capsys.readouterr()
    for _ in range(2):
        loaded = load_pretrained(str(tmp_path / "m"))
    said = capsys.readouterr().err
    assert said.count("reading model.safetensors") == 1 and str(tmp_path / "m") in said
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    for (name, ours), new in zip(loaded.named_parameters(), model.parameters()):
        assert torch.equal(ours, new) and torch.equal(ours, reference[name]), name
    # an index that names this one file is none of the kind
    names = dict.fromkeys(load_file(tmp_path / "new" / "model.safetensors"), "model.safetensors")
    (tmp_path / "new" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    capsys.readouterr()
    load_pretrained(str(tmp_path / "new"))
    assert capsys.readouterr().err == ""


def spoil(file, how):
    if how == "absent":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        file.write_bytes(how)


@pytest.mark.parametrize(
    "name, how",
    [
        ("config.json", b"[1]"),
        ("config.json", b"{"),
        ("config.json", b"\xff\xfe{}"),
        ("model.safetensors", "cut off"),
        ("model.safetensors", b""),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b"[]"),
        ("model.safetensors.index.json", b'{"weight_map": ["model.safetensors"]}'),
        ("model-00002-of-00003.safetensors", "absent"),
        ("model-00002-of-00003.safetensors", "cut off"),
        ("model-00002-of-00003.safetensors", "another"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, monkeypatch, name, how):
    if name.startswith("model-") or "index" in name:
        monkeypatch.setattr("weights.SHARD_BYTES", 40_000)
    save_pretrained(random_model(tiny_config()), str(tmp_path / "m"), None)
    file = tmp_path / "m" / name
    if how == "another":
        shutil.copy(tmp_path / "m" / "model-00001-of-00003.safetensors", file)
    else:
        spoil(file, how)
    with pytest.raises(ValueError, match=name) as caught:
        load_pretrained(str(tmp_path / "m"))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "changes, problem",
    [
        (dict(num_key_value_heads="2"), "num_key_value_heads is '2'"),
        (dict(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'"),
        (dict(max_position_embeddings=0), "max_position_embeddings is 0"),
        (dict(rope_theta=[1]), r"rope_theta is \[1\]"),
        (dict(rope_parameters=[1]), "rope parameters"),
        (dict(head_dim="16"), "head_dim is '16'"),
        (dict(head_dim=7), "head_dim is 7, expected an even number"),
        (dict(model_type="qwen3_moe"), "model_type is 'qwen3_moe', this code computes qwen2, qwen3, llama"),
        (dict(model_type="mistral"), "model_type is 'mistral'"),
        (dict(model_type="llama", mlp_bias=True), "mlp_bias is True"),
        (dict(model_type="qwen3", use_sliding_window=True), "use_sliding_window is True"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (dict(rope_scaling={"type": "dynamic", "factor": 4}), "rope type is 'dynamic', this code computes default, "),
        (dict(rope_scaling={"type": "yarn"}), "factor is None, expected a positive number"),
        (dict(rope_scaling={"type": "yarn", "factor": "4"}), "factor is '4'"),
        (dict(rope_scaling={"type": "yarn", "factor": 4, "mscale": 0.7}), "rope parameter mscale = 0.7"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8}), "low_freq_factor is None"),
        (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rope parameter full_attention"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected a positive integer, at most 1,000"),
        (dict(vocab_size=10**30), "vocab_size is 10+, expected"),
        (dict(hidden_size=2**40), "hidden_size is 1099511627776, expected"),
        (dict(rms_norm_eps=math.inf), "rms_norm_eps is inf"),
        (dict(rope_theta=10**400), "rope_theta is 10+, expected"),
        (dict(model_type=["qwen2"]), r"model_type is \['qwen2'\]"),
        (dict(model_type=7), "model_type is 7"),
        (dict(layer_types=7), "layer_types is 7"),
        (dict(layer_types=[7, "full_attention"]), "layer_types"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false', expected true or false"),
        (dict(model_type="llama", attention_bias="no"), "attention_bias is 'no', expected true or false"),
        (dict(rope_scaling={"rope_type": ["yarn"]}), r"rope type is \['yarn'\]"),
    ],
)
def test_config_fields_of_another_kind_are_named(changes, problem):
    raw = dict(model_type="qwen2", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    with pytest.raises(ValueError, match=f"here: {problem}"):
        Config.from_dict({**raw, "num_attention_heads": 2, **changes}, "here")


@pytest.mark.parametrize(
    "name, text",
    [
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "7"}'),
        ("tokenizer_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": 99999999999999999999}'),
        ("generation_config.json", '{"eos_token_id": [0, -99999999999999999999]}'),
        ("config.json", "[]"),
        ("config.json", '{"model_type": {"qwen2": 1}}'),
        ("config.json", '{"model_type": "qwen2", "hidden_size": "64"}'),
        ("tokenizer_config.json", '{"pad_token": ["a"]}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_broken_file_beside_the_tokenizer_is_named(tiny, tmp_path, name, text):
    shutil.copytree(tiny / "checkpoint", tmp_path / "m")
    (tmp_path / "m" / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        Chat(str(tmp_path / "m"))


# -- folders from anybody, whose files are copied into checkpoints -----------------------------------------------------


@pytest.fixture
def folder(tiny, tmp_path):
    """A checkpoint with a template, in tmp_path/m; tmp_path/secret.txt lies outside."""
    shutil.copytree(tiny / "checkpoint", tmp_path / "m")
    (tmp_path / "m" / "templates").mkdir()
    (tmp_path / "m" / "templates" / "grm.txt").write_text("{persona}{question}{answer}")
    (tmp_path / "secret.txt").write_text("{persona} {question} KEY")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "answer.txt").write_text("{persona} {question} KEY")
    return tmp_path / "m"


LINKS = [  # a file of the folder, what it leads to
    ("templates/answer.txt", "../../secret.txt"),
    ("templates/notes.txt", "../../secret.txt"),
    ("merges.txt", "../secret.txt"),
    ("added_tokens.json", "../secret.txt"),
    ("chat_template.jinja", "/proc/self/environ"),
    ("templates", "../secrets"),
    ("model.safetensors", "../secret.txt"),
    ("vocab.json", "templates/../../secret.txt"),
]


@pytest.mark.parametrize("name, target", LINKS)
def test_links_out_of_a_folder_are_refused(folder, tmp_path, name, target):
    file = folder / name
    if name == "templates":
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.symlink_to(target)
    problem = f"{re.escape(str(folder))}.*: a link out of the model's folder, to "
    for read in (resolve, load_pretrained, Chat):
        with pytest.raises(ValueError, match=problem):
            read(str(folder))
    with pytest.raises(ValueError, match=problem):
        save_pretrained(random_model(tiny_config(), seed=1), str(tmp_path / "new"), str(folder))
    assert not any("KEY" in f.read_text(errors="replace") for f in (tmp_path / "new").rglob("*") if f.is_file())


def test_an_index_that_leads_out_is_refused(folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "other.safetensors")
    for name in ("../other.safetensors", str(tmp_path / "other.safetensors")):
        tensors = dict.fromkeys(load_file(tmp_path / "other.safetensors"), name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": tensors}))
        with pytest.raises(ValueError, match="index.json names .*, expected a file of the same folder"):
            load_pretrained(str(folder))


@pytest.mark.parametrize("name", ["templates/answer.txt", "merges.txt", "config.json", "model.safetensors"])
def test_what_is_no_plain_file_is_refused(folder, name):
    """A device would be read until memory ends, a pipe for ever; this one holds no data, so that a test may."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name}: no regular file"):
        resolve(str(folder))


def test_a_huge_file_beside_the_weights_is_refused(folder):
    with open(folder / "merges.txt", "wb") as f:
        f.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=r"merges.txt: 1,099,511,627,776 bytes, expected at most 134,217,728"):
        resolve(str(folder))


def test_links_within_a_folder_and_into_the_hubs_cache_are_followed(folder, tmp_path):
    """As snapshot_download makes them."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1f"
    blobs = tmp_path / "models--a--b" / "blobs"
    (snapshot / "templates").mkdir(parents=True)
    blobs.mkdir()
    for n, file in enumerate(f for f in folder.rglob("*") if f.is_file()):
        shutil.copy(file, blobs / str(n))
        link = snapshot / file.relative_to(folder)
        link.symlink_to(os.path.relpath(blobs / str(n), link.parent))
    (folder / "templates" / "pair.txt").symlink_to("grm.txt")
    for source in (folder, snapshot):
        Chat(str(source))
        save_pretrained(load_pretrained(str(source)), str(tmp_path / "new"), str(source))
        assert (tmp_path / "new" / "templates" / "grm.txt").read_text() == "{persona}{question}{answer}"
        assert not any(file.is_symlink() for file in (tmp_path / "new").rglob("*"))
    (blobs / "x").symlink_to(tmp_path / "secret.txt")
    (snapshot / "merges.txt").symlink_to("../../blobs/x")
    with pytest.raises(ValueError, match="merges.txt: a link out of the model's folder"):
        resolve(str(snapshot))


def test_a_conversation_that_the_assistant_opens(tiny):
    chat = Chat(str(tiny / "checkpoint"))
    with pytest.raises(ValueError, match=r"messages\[0\]: expected a message of the user .*before the assistant's"):
        chat.messages([])
    with pytest.raises(ValueError, match=r"messages\[1\]: expected an object"):
        chat.messages([{"role": "user", "content": "Tea?"}, "Tea?"])


# -- attention on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, said",
    [
        (None, "flash-attn is not installed"),
        ("from flash_attn_2_cuda import x", "installed but does not load (ModuleNotFoundError: No module named"),
        ("raise ImportError('a.so: undefined symbol: _ZN3c10')", "does not load (ImportError: a.so: undefined symbol"),
        ("x = 1", "does not load (ImportError: cannot import name"),
        ("raise OSError('libcudart.so.12: not found')", "does not load (OSError: libcudart.so.12"),
        ("flash_attn_varlen_func = print", "attention: flash-attn"),
    ],
)
def test_what_flash_attn_lacks_is_said(monkeypatch, tmp_path, code, said):
    if code:
        (tmp_path / "flash_attn.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
    elif importlib.util.find_spec("flash_attn"):
        pytest.skip("it is installed")
    spec = importlib.util.spec_from_file_location("fresh_varlen_attention", varlen_attention.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_varlen_attention", fresh)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    spec.loader.exec_module(fresh)
    assert said in fresh.attention_used(True)
    assert "scaled_dot_product_attention" in fresh.attention_used(False)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


def test_keys_are_not_copied_for_each_query_head(monkeypatch):
    """What torch's varlen_attn gets."""
    given = []

    def varlen_attn(q, k, v, *where, **flags):
        given.append((tuple(k.shape), flags))
        return q

    monkeypatch.setattr("kernels.varlen_attention.flash_attn_varlen_func", None)
    monkeypatch.setattr("kernels.varlen_attention.varlen_attn", varlen_attn)
    monkeypatch.setattr("kernels.varlen_attention.say_once", lambda text: None)

    class OnGPU(torch.Tensor):
        is_cuda = True

    q, k = (torch.zeros(5, heads, 8, dtype=torch.bfloat16).as_subclass(OnGPU) for heads in (4, 2))
    where = SeqLens([5])
    varlen_attention.varlen_attention(q, k, k, where, where)
    assert given == [((5, 2, 8), dict(window_size=(-1, 0), enable_gqa=True))]
