"""model.py against transformers: logits, gradients, both directions of loading, and what it refuses."""

import json
import os

import pytest
import torch
from conftest import random_model, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from model import Config, Packed, load_pretrained, save_pretrained

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
    monkeypatch.setattr("model.SHARD_BYTES", 20_000)
    save_pretrained(model, str(tmp_path / "m"), None)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    loaded = load_pretrained(str(tmp_path / "m"))
    for (name, a), b in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(a, b), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def edit_json(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **changes}))


def test_refuses_what_is_not_a_qwen2_checkpoint(tmp_path):
    folder = tmp_path / "m"
    save_pretrained(random_model(tiny_config()), str(folder), None)
    edit_json(folder / "config.json", model_type="llama")
    with pytest.raises(ValueError, match="config.json: model_type is 'llama'"):
        load_pretrained(str(folder))
    edit_json(folder / "config.json", model_type="qwen2", rope_scaling={"type": "yarn", "factor": 4})
    with pytest.raises(ValueError, match="rope type is 'yarn'"):
        load_pretrained(str(folder))
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
    assert Config.from_dict({**raw, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}).rope_theta == 5e5
