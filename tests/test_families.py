"""Qwen3 and Llama checkpoints as transformers writes them: logits, log-probs, greedy ids, and the way back."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from attention import Packed, SharedPrefix
from engine import Engine
from model import load_pretrained, save_pretrained
from model_config import Config, rope_inv_freq
from runtime import plan, roofline
from runtime.packing import pack

SHAPE = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3["original_max_position_embeddings"] = 32  # so that within 100 tokens all three ranges of turns show
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
FAMILIES = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),  # heads together are twice as wide as the model
    "qwen3 tied, narrow heads, biases": Qwen3Config(**SHAPE, head_dim=6, tie_word_embeddings=True, attention_bias=True),
    "qwen3 yarn": Qwen3Config(**SHAPE, head_dim=16, rope_parameters=YARN),
    "llama": LlamaConfig(**SHAPE, rms_norm_eps=1e-5),
    "llama biases, head_dim": LlamaConfig(**SHAPE, head_dim=12, attention_bias=True, tie_word_embeddings=True),
    "llama 3": LlamaConfig(**SHAPE, head_dim=16, rope_parameters=LLAMA3),
    "qwen2 yarn": Qwen2Config(
        **SHAPE, rope_parameters={**YARN, "beta_fast": 4, "beta_slow": 2, "attention_factor": 1.3}
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """-> folder as transformers writes it, its model there."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    with torch.no_grad():  # norms and biases away from their neutral values, so that a forgotten one shows
        for name, parameter in reference.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp("family") / "m"
    reference.save_pretrained(folder)
    return str(folder), reference


def some_ids(lengths=(7, 1, 12, 100)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 300, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def test_logits_equal_transformers(checkpoint):
    folder, reference = checkpoint
    model, ids = load_pretrained(folder), some_ids()
    packed = Packed([len(i) for i in ids])
    expected = torch.cat([reference(i[None]).logits[0] for i in ids])
    assert expected.std() > 0.3  # not a comparison of zeros
    torch.testing.assert_close(model(torch.cat(ids), packed.position_ids, packed), expected, atol=1e-4, rtol=0)


def test_greedy_ids_equal_transformers(checkpoint):
    """64 tokens by the engine, one prompt after the other and all together."""
    folder, reference = checkpoint
    prompts = [i.tolist() for i in some_ids((7, 33, 90))]
    settings = dict(do_sample=False, max_new_tokens=64, pad_token_id=0, eos_token_id=None)
    expected = [
        reference.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **settings)[0, len(p) :].tolist()
        for p in prompts
    ]
    for batch in (1, 3):
        engine = Engine(load_pretrained(folder), [], 256, max_batch=batch)
        found = engine.generate(prompts, temperature=0, max_new_tokens=64)
        assert [s.ids for (s,) in found] == expected


def test_log_probs_and_gradients_of_a_shared_prefix(checkpoint):
    """The fused log-probs of two suffixes behind one prefix, against transformers' softmax of each."""
    folder, reference = checkpoint
    model, (prefix, one, two) = load_pretrained(folder), some_ids((20, 9, 14))
    context = SharedPrefix([(20, [9, 14])])
    index = torch.tensor([19, *range(20, 28), 19, *range(29, 42)])
    logprobs, _ = model(torch.cat([prefix, one, two]), context.position_ids, context, index, torch.cat([one, two]))
    expected = []
    for suffix in (one, two):
        logits = reference(torch.cat([prefix, suffix])[None]).logits[0, 19:-1]
        expected.append(logits.log_softmax(-1).gather(1, suffix[:, None])[:, 0])
    expected = torch.cat(expected)
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    logprobs.sum().backward()
    reference.zero_grad()
    expected.sum().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # sums over some 40 tokens of products of size 1: fp32 leaves 1e-5 of the largest
        scale = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4 * max(1, scale), rtol=0)


def test_what_is_saved_transformers_loads(checkpoint, tmp_path):
    """In the family's own format: class, head size, scaling."""
    folder, reference = checkpoint
    save_pretrained(load_pretrained(folder), str(tmp_path / "m"), None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert type(loaded) is type(reference)
    (ids,) = some_ids([100])
    assert torch.equal(loaded(ids[None]).logits, reference(ids[None]).logits)
    # a config that this code has made itself (raw None) says the same
    config = load_pretrained(folder).config
    object.__setattr__(config, "raw", None)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config.to_dict()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(loaded(ids[None]).logits, reference(ids[None]).logits)


def test_a_critic_of_the_family(checkpoint, tmp_path):
    critic = load_pretrained(checkpoint[0], scalar_head=True)
    with torch.no_grad():
        critic.score.weight += 0.1
    save_pretrained(critic, str(tmp_path / "m"), None)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32)
    (ids,) = some_ids([30])
    packed = Packed([30])
    expected = loaded.score(loaded.model(ids[None]).last_hidden_state)[0, :, 0]
    torch.testing.assert_close(critic(ids, packed.position_ids, packed), expected, atol=1e-4, rtol=0)


def test_operations_and_memory_count_the_heads_as_they_are(checkpoint):
    """FLOPs of a pass against the products that torch counts; the plan's parameters against the model's."""
    from torch.utils.flop_counter import FlopCounterMode

    model, lengths = load_pretrained(checkpoint[0]), (64,)
    batch = pack([[1] * n for n in lengths], [[False] + [True] * (n - 1) for n in lengths], torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch.input_ids, batch.context.position_ids, batch.context, batch.index)
    config = model.config
    # attention on a CPU is none of the operations that torch counts
    attention = (
        4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * batch.context.attention_pairs
    )
    assert counter.get_total_flops() == roofline.forward_flops(model, batch) - attention
    machine = plan.Machine(1, None, torch.float32, "cpu", False)
    trained = plan.Trained(plan.meta_model(config), machine, 64, False)
    assert trained.n_parameters == sum(p.numel() for p in model.parameters())


# -- which of several spellings of RoPE counts -------------------------------------------------------------------------

YARN_CARD = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}  # as model cards say to add it
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LONG = {"rope_type": "yarn", "factor": 4.0}
ROPE_VARIANTS = {
    "nothing": {},
    "theta at the top": dict(rope_theta=1e6),
    "theta inside": dict(rope_parameters=PLAIN),
    "theta inside and at the top": dict(rope_parameters=PLAIN, rope_theta=1e6),
    "theta in rope_scaling and at the top": dict(rope_scaling={**YARN_CARD, "rope_theta": 2e5}, rope_theta=1e6),
    "yarn added to rope_parameters": dict(rope_parameters=PLAIN, rope_scaling=YARN_CARD),
    "yarn added, theta at the top": dict(rope_parameters=PLAIN, rope_scaling=YARN_CARD, rope_theta=1e6),
    "yarn in both": dict(rope_parameters={**LONG, "factor": 2.0}, rope_scaling=YARN_CARD),
    "yarn taken back": dict(rope_parameters=YARN, rope_scaling={"rope_type": "default"}),
    "rope_scaling empty": dict(rope_parameters=YARN, rope_scaling={}),
    "rope_scaling null": dict(rope_parameters=YARN, rope_scaling=None, rope_theta=1e6),
    "both null": dict(rope_parameters=None, rope_scaling=None, rope_theta=1e6),
    "type and rope_type": dict(rope_scaling={**LONG, "type": "default", "original_max_position_embeddings": 32}),
    "original context at the top": dict(rope_parameters=LONG, original_max_position_embeddings=64),
    "original context twice": dict(rope_parameters=YARN, original_max_position_embeddings=64),
    "original context twice, llama3": dict(rope_parameters=LLAMA3, original_max_position_embeddings=64),
    "original context of plain RoPE": dict(rope_parameters=PLAIN, original_max_position_embeddings=64),
    "no original context": dict(rope_parameters=LONG, max_position_embeddings=64),
    "no context at all": dict(rope_parameters=LONG, max_position_embeddings=None),
    "beta of zero": dict(rope_scaling={**YARN_CARD, "beta_fast": 0, "beta_slow": 0}),
    "betas swapped": dict(rope_scaling={**YARN_CARD, "beta_fast": 0.1, "beta_slow": 2}),
    "attention factor": dict(rope_scaling={**YARN_CARD, "attention_factor": 0.7}),
    "factor of one": dict(rope_scaling={**YARN_CARD, "factor": 1}),
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_rope_is_that_of_transformers(variant, family, tmp_path):
    """Its frequencies and factor, as transformers' own config and rotary code compute them from the same file."""
    raw = {"model_type": family, **SHAPE, "head_dim": 16, **ROPE_VARIANTS[variant]}
    if raw["max_position_embeddings"] is None:
        del raw["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    reference = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)).rotary_emb
    inv_freq, scale = rope_inv_freq(Config.from_dict(raw), torch.device("cpu"))
    torch.testing.assert_close(inv_freq, reference.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(reference.attention_scaling, rel=1e-6)


def test_an_attention_factor_of_zero_is_refused():
    """cos and sin would be zero; it does not mean the default."""
    raw = {"model_type": "qwen2", **SHAPE, "rope_scaling": {**YARN_CARD, "attention_factor": 0}}
    with pytest.raises(ValueError, match="here: attention_factor is 0, expected a positive number"):
        Config.from_dict(raw, "here")
