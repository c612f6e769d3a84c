"""The engine: against transformers and fresh forward passes, and that a sample depends on nothing but itself."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import error_of, random_model, run_script, tiny_config
from transformers import AutoModelForCausalLM

import generate
from attention import Packed
from chat import Chat
from engine import Engine, cache_size
from engine.scheduler import SAMPLES_AT_ONCE
from kernels.sampling import sample
from model import load_pretrained, save_pretrained
from runtime.flags import user_errors
from runtime.progress import printable

RAGGED = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 8, 8, 8, 8, 8]]


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(tie_word_embeddings=False), std=0.3)


def engine_of(model, stop_ids=(), max_len=64, max_batch=16):
    return Engine(model, stop_ids, max_len, max_batch)


def drain(engine):
    """-> {(key, index): Sample}"""
    found = {}
    while engine.busy:
        engine.step()
        found |= {(s.key, s.index): s for s in engine.collect()}
    return found


def fresh_logprobs(model, prompt, response, temperature):
    """Log-probs of the response by one forward pass over the whole sequence."""
    ids = prompt + response
    context = Packed([len(ids)], "cpu")
    with torch.no_grad():
        logits = model(torch.tensor(ids), context.position_ids, context)
    table = torch.log_softmax(logits[len(prompt) - 1 : -1].float() / temperature, -1)
    return table.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize(
    "changes", [{}, dict(tie_word_embeddings=False, num_key_value_heads=4), dict(num_key_value_heads=1)]
)
def test_greedy_equals_transformers(changes, tiny, tmp_path):
    ours = random_model(tiny_config(**changes), std=0.3)  # wide enough for responses without repetition
    save_pretrained(ours, str(tmp_path), str(tiny / "tokenizer"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    settings = dict(do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=None)
    # three slots for four prompts: one waits, and joins when a place is free
    results = engine_of(ours, max_batch=3).generate(RAGGED, max_new_tokens=20, temperature=0)
    for prompt, (found,) in zip(RAGGED, results):
        expected = reference.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
        assert found.ids == expected[0, len(prompt) :].tolist()
        assert found.finish_reason == "length" and found.stop_id is None and len(found.logprobs) == 20


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_logprobs_equal_a_fresh_forward_pass(model, temperature, top_p):
    """Those of the full softmax at the sampling temperature, the stop token's included, also under a nucleus."""
    settings = dict(max_new_tokens=30, temperature=temperature, top_p=top_p)
    results = engine_of(model, stop_ids=[7, 11, 100], max_batch=5).generate(RAGGED, n=3, seeds=[1, 2, 3], **settings)
    stopped = 0
    for prompt, samples in zip(RAGGED, results):
        for s in samples:
            response = s.ids + ([] if s.stop_id is None else [s.stop_id])
            expected = fresh_logprobs(model, prompt, response, temperature)
            torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-4, rtol=0)
            stopped += s.stop_id is not None
    assert 0 < stopped < 12  # both endings occur


def test_greedy_logprobs_are_of_the_plain_softmax(model):
    ((found,),) = engine_of(model).generate([[5, 6]], temperature=0, max_new_tokens=8)
    torch.testing.assert_close(
        torch.tensor(found.logprobs), fresh_logprobs(model, [5, 6], found.ids, 1.0), atol=1e-4, rtol=0
    )


def test_a_sample_depends_on_its_seed_alone(model):
    """Alone, in a full batch, in another order, joined late: the same ids."""
    requests = [(prompt, 1000 + 10 * i + k) for i, prompt in enumerate(RAGGED) for k in range(3)]
    alone = [
        engine_of(model).generate([prompt], seeds=[seed], max_new_tokens=12)[0][0].ids for prompt, seed in requests
    ]
    assert len({tuple(ids) for ids in alone}) == len(alone)  # seeds matter
    engine = engine_of(model, max_batch=7)
    for i in reversed(range(len(requests))):
        engine.submit(requests[i][0], i, seeds=[requests[i][1]], max_new_tokens=12)
        if i % 4 == 0:
            engine.step()  # the rest joins a running batch
    found = drain(engine)
    assert [found[i, 0].ids for i in range(len(requests))] == alone


def test_samples_of_a_prompt_prefill_it_once(model):
    engine = engine_of(model, max_batch=8)
    results = engine.generate(RAGGED, n=4, seeds=[1, 2, 3, 4], max_new_tokens=5)
    assert engine.scheduler.computed_tokens == sum(map(len, RAGGED))
    for prompt, samples in zip(RAGGED, results):
        for seed, s in zip((1, 2, 3, 4), samples):
            assert engine_of(model).generate([prompt], seeds=[seed], max_new_tokens=5)[0][0].ids == s.ids


def test_more_samples_than_places(model):
    (samples,) = engine_of(model, max_batch=2).generate([[5, 6]], n=5, max_new_tokens=4)
    assert [s.index for s in samples] == [0, 1, 2, 3, 4] and all(len(s.ids) == 4 for s in samples)


def test_the_next_samples_do_not_wait_for_all_of_a_prompt(model):
    """With one slot still taken, those of the next prompt get the others."""
    engine = engine_of(model, max_batch=40)
    engine.submit([5, 6], "long", max_new_tokens=50)
    for key in range(2):
        engine.submit([7, 8, 9], key, n=40, max_new_tokens=9)
    engine.step()
    assert len(engine.scheduler.running) == 1 + 2 * SAMPLES_AT_ONCE


def test_stop_ids_and_truncation(model):
    """A response ends before the first stop id, or is flagged at its limit: that of the request or of the engine."""
    ((free,),) = engine_of(model).generate([[5, 6]], temperature=0, max_new_tokens=20)
    stop = free.ids[6]
    first = free.ids.index(stop)
    ((found,),) = engine_of(model, stop_ids=[stop]).generate([[5, 6]], temperature=0, max_new_tokens=20)
    assert (found.ids, found.stop_id, found.finish_reason) == (free.ids[:first], stop, "stop")
    assert len(found.logprobs) == first + 1
    ((full,),) = engine_of(model, max_len=10).generate([[5, 6]], temperature=0, max_new_tokens=20)
    assert (full.ids, full.finish_reason) == (free.ids[:8], "length")
    # a response that stops at its very last token has stopped
    ((last,),) = engine_of(model, stop_ids=[stop]).generate([[5, 6]], temperature=0, max_new_tokens=first + 1)
    assert last.finish_reason == "stop"


def test_samples_are_distributed_as_the_softmax(model):
    n, temperature = 4000, 0.7
    (samples,) = engine_of(model, max_batch=n).generate([[5, 6]], n=n, max_new_tokens=1, temperature=temperature)
    context = Packed([2], "cpu")
    with torch.no_grad():
        logits = model(torch.tensor([5, 6]), context.position_ids, context)[-1]
    expected = torch.softmax(logits / temperature, -1)
    observed = torch.bincount(torch.tensor([s.ids[0] for s in samples]), minlength=len(expected)) / n
    common = expected * n > 20  # where counts are close to normal
    assert common.sum() > 10 and abs(observed[~common].sum() - expected[~common].sum()) < 0.03
    error = (observed - expected).abs() / (expected * (1 - expected) / n).sqrt()
    assert error[common].max() < 4.5  # standard errors


def test_sample_takes_the_nucleus_of_each_row():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3]).repeat(600, 1)
    top_p = torch.tensor([0.35, 0.6, 0.75, 1.0]).repeat(
        150
    )  # smallest sets with that mass: {1}, {1, 3}, {1, 2, 3}, all
    seeds = torch.arange(600)
    tokens, logprobs = sample(probs.log(), torch.ones(600), top_p, seeds, torch.zeros(600, dtype=torch.int64))
    drawn = [set(tokens[i::4].tolist()) for i in range(4)]
    assert drawn == [{1}, {1, 3}, {1, 2, 3}, {0, 1, 2, 3}]
    torch.testing.assert_close(logprobs, probs.log().gather(1, tokens[:, None])[:, 0])


def test_top_logprobs(model):
    """The most likely tokens of each place at the temperature, the sampled one among them when all are asked for."""
    engine = engine_of(model, stop_ids=[7])
    engine.submit([5, 6], "top", n=2, max_new_tokens=6, temperature=0.7, top_logprobs=model.config.vocab_size)
    engine.submit([9], "plain", max_new_tokens=6)
    engine.submit([5, 6], "also", n=2, max_new_tokens=6, temperature=0.7, top_logprobs=3, extra_logprob_ids=[4, 8])
    engine.submit([9], "only", max_new_tokens=6, extra_logprob_ids=[8, 4])
    found = drain(engine)
    assert found["plain", 0].top_logprobs == []
    only = found["only", 0]
    assert len(only.top_logprobs) == len(only.logprobs) and all(
        [t for t, _ in top] == [8, 4] for top in only.top_logprobs
    )
    for i in range(2):  # the first 3, then those that were asked for by name
        for top, everything in zip(found["also", i].top_logprobs, found["top", i].top_logprobs, strict=True):
            expected = everything[:3] + [pair for token in (4, 8) for pair in everything[3:] if pair[0] == token]
            assert [token for token, _ in top] == [token for token, _ in expected]
            assert [value for _, value in top] == pytest.approx([value for _, value in expected], abs=1e-5)
    for i in range(2):
        s = found["top", i]
        response = s.ids + ([] if s.stop_id is None else [s.stop_id])
        assert len(s.top_logprobs) == len(s.logprobs) == len(response)
        for token, logprob, top in zip(response, s.logprobs, s.top_logprobs):
            values = [value for _, value in top]
            assert values == sorted(values, reverse=True)
            assert dict(top)[token] == pytest.approx(logprob, abs=1e-5)


def test_cancel_and_partial(model):
    engine = engine_of(model, max_batch=3)
    expected = engine_of(model).generate([[9]], seeds=[3], max_new_tokens=10)[0][0].ids
    engine.submit([5, 6], "gone", n=2, max_new_tokens=10)
    engine.submit([9], "stays", seeds=[3], max_new_tokens=10)
    engine.submit([9, 9], "waits", max_new_tokens=10)
    assert engine.partial("stays") == []
    for _ in range(4):
        engine.step()
    so_far = engine.partial("stays")
    assert 0 < len(so_far) < 10 and so_far == expected[: len(so_far)]
    engine.cancel("gone")
    engine.cancel("waits")
    found = drain(engine)
    assert list(found) == [("stays", 0)] and found["stays", 0].ids == expected


def test_the_stop_token_is_never_shown(model):
    """On a GPU a row that has ended waits for the next look; what it has so far ends before its stop token."""
    ((free,),) = engine_of(model).generate([[5, 6]], temperature=0, max_new_tokens=20)
    stop, shown = free.ids[6], []
    response = free.ids[: free.ids.index(stop)]
    engine = engine_of(model, stop_ids=[stop])
    engine.runner.steps_per_poll = 8
    engine.submit([5, 6], temperature=0, max_new_tokens=20)
    while not engine.collect():
        engine.step()
        shown.append(engine.partial(None))
    assert [ids for ids in shown if ids != response[: len(ids)]] == [] and shown.count(response) > 1


def test_polls_come_after_decoding_whatever_arrives(model):
    """On a GPU a stream is sent after a step that ended with a poll: new requests in each step must not hide it."""
    engine = engine_of(model, max_batch=64)
    engine.runner.steps_per_poll = 8
    engine.submit([5, 6], "stays", max_new_tokens=60)
    engine.step()
    engine.step()
    polled = []
    for i in range(48):
        engine.submit([7, 8, i], i, max_new_tokens=60)
        engine.step()
        polled.append(engine.steps_since_poll == 0)
    assert sum(polled) >= 48 // 8


def test_a_gpu_without_room_for_the_longest_sequence(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    weight = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 4)
    on_gpu = SimpleNamespace(parameters=lambda: iter([weight]), config=model.config)
    n = int(0.9 * 2**20 / cache_size.kv_bytes_per_token(model.config, 4))
    assert cache_size.default_kv_tokens(on_gpu, n, 8) == n
    with pytest.raises(ValueError, match=f"of {n} tokens; expected {n + 1}, .*--kv-tokens"):
        cache_size.default_kv_tokens(on_gpu, n + 1, 8)


def test_refused_requests(model):
    engine = engine_of(model, max_len=8)
    for prompt in ([], [1] * 8, [1] * 20):
        with pytest.raises(ValueError, match=f"{len(prompt)} tokens; expected 1 to 7"):
            engine.submit(prompt)
    nan = float("nan")
    for problem, cases in {
        "expected n >= 1": (dict(n=2, seeds=[1]), dict(n=0), dict(max_new_tokens=0), dict(seeds=[2**63])),
        "expected 0 .the most likely token. or a temperature": (dict(temperature=t) for t in (-1, 1e-39, nan, 1e999)),
        "top_p in": (dict(top_p=p) for p in (0, nan, 1.5)),
        "vocabulary has 300": (
            dict(extra_logprob_ids=[300]),
            dict(extra_logprob_ids=[-1]),
            dict(top_logprobs=301),
            dict(top_logprobs=-1),
        ),
    }.items():
        for settings in cases:
            with pytest.raises(ValueError, match=problem):
                engine.submit([1, 2], **settings)
    for prompt in ([300], [5, -1]):
        with pytest.raises(ValueError, match="vocabulary has 300"):
            engine.submit(prompt)
    assert not engine.busy


def broken_model():
    """The embedding of token 299 is NaN."""
    model = random_model(tiny_config(tie_word_embeddings=False), std=0.3)
    with torch.no_grad():
        model.model.embed_tokens.weight[299] = float("nan")
    return model


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.8, 0.9)])
def test_logits_that_are_no_numbers_end_their_own_sample(temperature, top_p):
    """A token whose embedding is NaN, in a prompt: neighbours and who takes its row and blocks see no difference."""
    broken = broken_model()
    settings = dict(max_new_tokens=12, temperature=temperature, top_p=top_p)
    bad = [4] * 20 + [299, 4]

    def run(with_bad):
        engine = Engine(broken, [], 64, max_batch=4, kv_tokens=200)
        engine.submit(RAGGED[0], 0, n=2, seeds=[1, 2], **settings)
        engine.step()
        if with_bad:
            engine.submit(bad, "bad", seeds=[5], **settings)
        found = {}
        for key in (1, 2, 3):
            engine.submit(RAGGED[key], key, seeds=[key], **settings)
        while engine.busy:
            engine.step()
            found |= {(s.key, s.index): s for s in engine.collect(errors=True)}
        return engine, found

    engine, found = run(True)
    failed = found.pop(("bad", 0))
    assert (failed.ids, failed.logprobs, failed.finish_reason) == ([], [], "error")
    assert failed.error == "the logits of token 1 of the response are no finite numbers"
    _, expected = run(False)
    assert {k: (s.ids, s.error) for k, s in found.items()} == {k: (s.ids, None) for k, s in expected.items()}
    for key in found:
        assert found[key].logprobs == pytest.approx(expected[key].logprobs, abs=1e-5)
    assert engine.scheduler.blocks.lookup(bad) == []
    engine.submit(bad, "again", **settings)
    with pytest.raises(FloatingPointError, match="request 'again': the logits of token 1"):  # as trainers have it
        drain(engine)


def test_a_tiny_nucleus_is_the_most_likely_token(model):
    """Below the smallest fp32 number top_p would be 0, which kept everything."""
    greedy = engine_of(model).generate(RAGGED, temperature=0, max_new_tokens=10)
    nucleus = engine_of(model).generate(RAGGED, top_p=1e-60, max_new_tokens=10)
    assert [s.ids for (s,) in nucleus] == [s.ids for (s,) in greedy]


def test_finish_ends_one_sample_with_what_it_has(model):
    engine = engine_of(model)
    engine.submit([5, 6], "x", n=2, seeds=[1, 2], max_new_tokens=10, top_logprobs=2)
    for _ in range(4):
        engine.step()
    so_far = engine.partial("x", 1)
    engine.finish("x", 1)
    engine.finish("x", 7)  # there is none
    found = drain(engine)
    assert found["x", 1].ids == so_far and len(found["x", 1].top_logprobs) == len(so_far) == 5
    assert len(found["x", 0].ids) == 10


def test_reset_after_a_step_that_failed(model, monkeypatch):
    """Nothing of a prefill that broke off is found later, and no block is lost."""
    engine, plain = engine_of(model), engine_of(model)
    prompt, settings = [4] * 40, dict(seeds=[3], max_new_tokens=10)
    engine.submit(prompt, **settings)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(
            "engine.runner.PrefillContext.attend", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
        )
        engine.step()
    engine.reset()
    assert not engine.busy and len(engine.scheduler.blocks.free) == engine.n_blocks - 1
    assert engine.generate([prompt], **settings)[0][0].ids == plain.generate([prompt], **settings)[0][0].ids


def test_refresh_takes_new_weights(model):
    other = random_model(tiny_config(), seed=5, std=0.3)
    engine = engine_of(random_model(tiny_config(), std=0.3))
    engine.submit([5, 6], max_new_tokens=4)
    with pytest.raises(RuntimeError, match="while samples are running"):
        engine.sync_weights(other)
    drain(engine)
    engine.sync_weights(other)
    settings = dict(temperature=0, max_new_tokens=10)
    expected = engine_of(other).generate(RAGGED, **settings)
    assert [s.ids for (s,) in engine.generate(RAGGED, **settings)] == [s.ids for (s,) in expected]


# -- the command line --------------------------------------------------------------------------------------------------


def test_file_in_file_out(tiny, tmp_path):
    rows = [
        {"persona": {"name": "Mia"}, "question": "What about a trip?", "note": 1},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tea?"}]},
        {"prompt_ids": [10, 11, 12]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--model",
        tiny / "checkpoint",
        "--input",
        tmp_path / "rows.jsonl",
        "--output",
        tmp_path / "out.jsonl",
        "--answer-template",
        tiny / "answer.txt",
        "--max-new-tokens",
        6,
    ]
    run_script("generate.py", *flags, "--n", 2, "--temperature", 0.7)
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in out] == [0, 1] * 3
    chat = Chat(str(tiny / "checkpoint"))
    model = load_pretrained(str(tiny / "checkpoint"), torch.float32, "cpu")
    for i, row in enumerate(out):
        assert rows[i // 2].items() <= row.items()
        assert row["finish_reason"] in ("stop", "length") and len(row["token_ids"]) == len(row["logprobs"]) <= 6
        assert row["text"] == chat.decode(row["token_ids"])
    for row in out[4:]:
        expected = fresh_logprobs(model, [10, 11, 12], row["token_ids"], 0.7)
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"question": "Tea?"}', 'field "persona"'),
        ('{"text": "Tea?"}', 'expected "messages"'),
        ("[1]", "expected"),
        ('{"prompt_ids": [1, 99999]}', 'field "prompt_ids"'),
        ('{"prompt_ids": []}', 'field "prompt_ids"'),
        ('{"messages": []}', 'field "messages"'),
        (json.dumps({"prompt_ids": [1] * 512}), "512 tokens; expected 1 to 511"),
    ],
)
def test_bad_rows_are_named(line, problem, tiny, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt_ids": [10]}\n' + line + "\n")
    message = error_of(
        generate,
        capsys,
        "--model",
        tiny / "checkpoint",
        "--input",
        tmp_path / "rows.jsonl",
        "--output",
        tmp_path / "out.jsonl",
    )
    assert "rows.jsonl:2" in message and problem in message
    assert not (tmp_path / "out.jsonl").exists()


def test_a_sample_that_failed_costs_no_other(tmp_path):
    broken = broken_model()
    engine = Engine(broken, [], 64)
    args = generate.Args(input="rows.jsonl", output=str(tmp_path / "out.jsonl"), n=2, max_new_tokens=3)
    chat = SimpleNamespace(decode=str)
    with pytest.raises(FloatingPointError, match=r"2 samples are left out, the first one of rows.jsonl:1: the logits"):
        generate.generate_file([{"id": "bad"}, {"id": "good"}], [[299, 4], [5, 4]], args, engine, chat)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in written] == [("good", 0), ("good", 1)]


def chat_with(tiny, monkeypatch, capsys, typed, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    args = ["--model", str(tiny / "checkpoint"), "--max-new-tokens", "5", "--temperature", "0", *map(str, flags)]
    generate.main(tyro.cli(generate.Args, args=args))
    return capsys.readouterr().out


def reply_of(tiny, prompt_ids):
    chat = Chat(str(tiny / "checkpoint"))
    model = load_pretrained(str(tiny / "checkpoint"), torch.float32, "cpu")
    ((found,),) = Engine(model, chat.stop_ids, 512).generate([prompt_ids], temperature=0, max_new_tokens=5)
    return printable(chat.decode(found.ids))


def test_chat_keeps_the_conversation(tiny, monkeypatch, capsys):
    chat = Chat(str(tiny / "checkpoint"))
    messages = [{"role": "user", "content": "Tea?"}]
    first = reply_of(tiny, chat.messages(messages))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Jazz?"}]
    second = reply_of(tiny, chat.messages(messages))
    out = chat_with(tiny, monkeypatch, capsys, "Tea?\nJazz?\n\n/new\nTea?\n")
    end = " [cut off at --max-new-tokens, or the last of the model's positions]\n> "
    assert out.split("\n", 1)[1] == "> " + first + end + second + end + "> > " + first + end + "\n"


def test_a_message_that_is_too_long_is_forgotten(tiny, monkeypatch, capsys):
    out = chat_with(tiny, monkeypatch, capsys, "Tea?\n" + "word " * 600 + "\nJazz?\n")
    assert out.count("/new starts over\n") == 1 and out.count("cut off at") == 2


def test_a_word_after_a_slash_is_no_question(tiny, monkeypatch, capsys):
    for more, help_text in (((), generate.HELP), (("--persona", "Mia"), generate.HELP_WITH_PERSONA)):
        out = chat_with(tiny, monkeypatch, capsys, "/help\n/nonsense\n", *more)
        assert out.split("\n", 1)[1] == f"> {help_text}\n> {help_text}\n> \n"


def test_chat_with_a_person(tiny, monkeypatch, capsys):
    from prompts import answer_prompt, load_templates

    chat, templates = Chat(str(tiny / "checkpoint")), load_templates(None, answer_template=str(tiny / "answer.txt"))
    persona = {"name": "Mia", "likes": ["tea"]}
    expected = reply_of(tiny, answer_prompt(chat, templates, {"persona": persona, "question": "What about a trip?"}))
    for given in (json.dumps(persona), str(tiny / "persona.json")):
        (tiny / "persona.json").write_text(json.dumps(persona))
        out = chat_with(
            tiny,
            monkeypatch,
            capsys,
            "What about a trip?\n",
            "--persona",
            given,
            "--answer-template",
            tiny / "answer.txt",
        )
        assert expected in out
    message = error_of(generate, capsys, "--model", tiny / "checkpoint", "--persona", "mia.json")
    assert "--persona mia.json: no such file" in message
    assert "--persona" in error_of(generate, capsys, "--model", tiny / "checkpoint", "--persona", '{"name": ')
    assert generate.read_persona("Mia, a vegan") == "Mia, a vegan"
    (tiny / "persona.txt").write_text("Mia, a vegan")
    assert generate.read_persona(str(tiny / "persona.txt")) == "Mia, a vegan"


def test_a_terminal_obeys_no_text_of_a_model(capsys):
    hostile = "a\x1b]52;c;ZXZpbA==\x07b\x1b[2J\rc\x9b31m\u202ed\x00"
    shown = printable(hostile)
    assert shown == "a\\x1b]52;c;ZXZpbA==\\x07b\\x1b[2J\\rc\\x9b31m\\u202ed\\x00"
    assert printable("Zürich\t北京\n👍") == "Zürich\t北京\n👍"
    with pytest.raises(SystemExit), user_errors():
        raise ValueError(f"a server said {hostile}")
    assert "\x1b" not in capsys.readouterr().err
