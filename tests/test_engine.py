"""The cache and the scheduler: sharing, chunks, preemption, new weights; nothing leaks, and no sample depends on it."""

import random

import pytest
import torch
from conftest import random_model, tiny_config

from engine import Engine
from engine.block_manager import BLOCK_SIZE, BlockManager
from engine.cpu_runner import DenseCache
from engine.requests import SamplingParams
from engine.scheduler import PREFILL_TOKENS, Scheduler
from kernels import packed_linear
from kernels.dense_attention import TILE

SETTINGS = dict(max_new_tokens=20)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(tie_word_embeddings=False), std=0.3)


def tokens(n, seed=0):
    return torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def drain(engine, found=None):
    """-> {(key, index): Sample}"""
    found = {} if found is None else found
    while engine.busy:
        engine.step()
        found |= {(s.key, s.index): s for s in engine.collect()}
    return found


def check_blocks(engine):
    """A block is free, or its reference count is the number of lists that it is in; slots agree with the scheduler."""
    check_ref_counts(engine.scheduler)
    slots = engine.runner.slots
    for slot, s in enumerate(engine.scheduler.running):
        assert slots.block_table[slot, : len(s.blocks)].tolist() == s.blocks
        assert slots.length[slot] == s.length or (slots.done[slot] and slots.length[slot] < s.length)
    assert slots.done[len(engine.scheduler.running) :].all()


def check_ref_counts(scheduler):
    held = [0] * len(scheduler.blocks.ref_count)
    for s in [*scheduler.running, *scheduler.waiting, *([scheduler.prefilling] if scheduler.prefilling else [])]:
        for block in s.blocks + s.tail_blocks:
            held[block] += 1
    assert held == scheduler.blocks.ref_count
    assert set(scheduler.blocks.free) == {b for b in range(1, len(held)) if not held[b]}
    assert all(s.length <= s.allocated_tokens for s in scheduler.running)


def test_an_edit_and_a_judgement_find_what_is_there(model):
    engine = Engine(model, [], 200)
    prompt = tokens(40)
    ((first,),) = engine.generate([prompt], max_new_tokens=25)
    assert (engine.scheduler.computed_tokens, engine.scheduler.reused_tokens) == (40, 0)
    # 64 of the prompt's and the answer's 65 tokens have keys and values: four full blocks
    edit = prompt + first.ids + tokens(10, seed=1)
    ((found,),) = engine.generate([edit], **SETTINGS)
    assert (engine.scheduler.computed_tokens, engine.scheduler.reused_tokens) == (40 + 75 - 64, 64)
    assert found.ids == Engine(model, [], 200).generate([edit], **SETTINGS)[0][0].ids
    # the same prompt again: all of it is known, but its last token has to be computed for the logits
    before = engine.scheduler.computed_tokens
    engine.generate([edit], **SETTINGS)
    assert engine.scheduler.computed_tokens - before == 75 - 64
    check_blocks(engine)


@pytest.mark.parametrize("chunk", [4096, 24])
def test_requests_of_one_step_share_their_beginning(model, monkeypatch, chunk):
    """Judgements that arrive together: rubric and persona are computed once, in one pass or in chunks."""
    monkeypatch.setattr("engine.scheduler.PREFILL_TOKENS", chunk)
    prompts = [tokens(64) + tokens(20, seed=i) for i in range(1, 5)]
    engine = Engine(model, [], 200)
    together = engine.generate(prompts, **SETTINGS)
    assert (engine.scheduler.computed_tokens, engine.scheduler.reused_tokens) == (64 + 4 * 20, 3 * 64)
    for prompt, (found,) in zip(prompts, together):
        assert found.ids == Engine(model, [], 200).generate([prompt], **SETTINGS)[0][0].ids
    check_blocks(engine)


def test_a_long_prompt_does_not_hold_up_running_samples(model, monkeypatch):
    monkeypatch.setattr("engine.scheduler.PREFILL_TOKENS", 16)
    engine = Engine(model, [], 200)
    engine.submit([5, 6], "short", max_new_tokens=30)
    engine.step()
    engine.submit(tokens(150), "long", max_new_tokens=5)
    progress = []
    while not engine.partial("long"):
        engine.step()
        progress.append(len(engine.partial("short")))
    assert len(progress) == 10 and progress == list(range(progress[0], progress[0] + 10))  # 150 tokens in chunks of 16
    found = drain(engine)
    assert found["long", 0].ids == Engine(model, [], 200).generate([tokens(150)], max_new_tokens=5)[0][0].ids


@pytest.mark.parametrize("n_prompt", [1, 15, 16, 17, 33])
def test_forked_samples_do_not_write_into_each_other(model, n_prompt):
    prompt = tokens(n_prompt)
    (samples,) = Engine(model, [], 200).generate([prompt], n=5, seeds=[1, 2, 3, 4, 5], **SETTINGS)
    for seed, found in zip((1, 2, 3, 4, 5), samples):
        assert found.ids == Engine(model, [], 200).generate([prompt], seeds=[seed], **SETTINGS)[0][0].ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preempted_samples_go_on_as_if_nothing_had_happened(model, temperature):
    """Too few blocks for all: the youngest wait and are computed again, log-probs included."""
    prompts = [tokens(n, seed=n) for n in (10, 20, 30, 40)]
    settings = dict(n=2, seeds=[7, 8], max_new_tokens=60, temperature=temperature)
    small, large = Engine(model, [], 200, kv_tokens=240), Engine(model, [], 200)
    expected, found = large.generate(prompts, **settings), small.generate(prompts, **settings)
    assert small.scheduler.preemptions > 2 and large.scheduler.preemptions == 0
    for a, b in zip(sum(expected, []), sum(found, [])):
        assert a.ids == b.ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)
    check_blocks(small)


def test_what_can_never_fit_is_refused_with_its_numbers(model):
    engine = Engine(model, [], 200, kv_tokens=64)
    with pytest.raises(
        ValueError, match="60 tokens and a response of up to 20 need 5 blocks of 16 tokens; the whole cache has 4"
    ):
        engine.submit(tokens(60), max_new_tokens=20)
    assert not engine.busy
    # what fits alone but not with its siblings is sampled one after the other
    (samples,) = engine.generate([tokens(40)], n=6, max_new_tokens=24)
    assert [len(s.ids) for s in samples] == [24] * 6
    check_blocks(engine)


def test_new_weights_forget_the_old_cache(model):
    other = random_model(tiny_config(tie_word_embeddings=False), seed=5, std=0.3)
    engine, prompt = Engine(random_model(tiny_config(tie_word_embeddings=False), std=0.3), [], 200), tokens(50)
    engine.generate([prompt], **SETTINGS)
    engine.sync_weights(other)
    ((found,),) = engine.generate([prompt], temperature=0, **SETTINGS)
    assert engine.scheduler.reused_tokens == 0
    assert found.ids == Engine(other, [], 200).generate([prompt], temperature=0, **SETTINGS)[0][0].ids


@pytest.mark.parametrize("n_rows", [1, 2, 3, 17, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear(n_rows, bias):
    shapes = (n_rows, 512), (640, 512), (640,)
    x, weight, b = (torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes))
    found = packed_linear.packed_linear(x, weight, packed_linear.pack(weight), b if bias else None)
    # sums of 512 products in another order: values of about 20, up to 100, and some hundred roundings of 1e-6
    torch.testing.assert_close(found, packed_linear.reference(x, weight, b if bias else None), atol=1e-3, rtol=0)
    assert found.is_contiguous() and packed_linear.pack(weight[:64]) is None
    assert packed_linear.pack(weight.to("meta")) is None  # it has to be on the CPU


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN needs AVX-512 for bf16")
@pytest.mark.parametrize("n_rows", [1, 5, 40])
def test_packed_linear_in_bf16(n_rows):
    x, weight = (torch.randn(n, 512, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (n_rows, 640))
    found = packed_linear.packed_linear(x, weight, packed_linear.pack(weight))
    assert found.dtype == torch.bfloat16
    # sums in fp32, rounded once
    torch.testing.assert_close(found.float(), x.float() @ weight.float().T, rtol=2**-8, atol=1e-4)


def test_packed_weights_change_nothing_but_rounding(model, monkeypatch):
    """On a CPU large matrices are used in a packed copy; it follows new weights."""
    prompts = [tokens(n, seed=n) for n in (5, 40, 70)]
    others = [random_model(tiny_config(tie_word_embeddings=tied), seed=5, std=0.3) for tied in (False, True)]
    plain = [Engine(m, [], 200).generate(prompts, n=2, **SETTINGS) for m in (model, *others)]
    monkeypatch.setattr(packed_linear, "WORTH_PACKING", 1)
    fresh = random_model(tiny_config(tie_word_embeddings=False), std=0.3)
    engine = Engine(fresh, [], 200)
    assert fresh.packed_head.packed is not None and fresh.model.layers[0].self_attn.packed_qkv.packed is not None
    packed = [engine.generate(prompts, n=2, **SETTINGS)]
    engine.sync_weights(others[0])
    packed += [engine.generate(prompts, n=2, **SETTINGS), Engine(others[1], [], 200).generate(prompts, n=2, **SETTINGS)]
    for a, b in zip(sum(sum(plain, []), []), sum(sum(packed, []), []), strict=True):
        assert a.ids == b.ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


def test_a_thousand_requests_in_a_tiny_pool(model):
    """Random arrivals, lengths, forks, common beginnings and cancels: every result right, no block leaked."""
    rng = random.Random(0)
    beginnings = [tokens(n, seed=100 + n) for n in (0, 16, 23, 48)]
    stop_ids = [7, 11, 100, 200]
    requests = {}
    for key in range(1000):
        prompt = rng.choice(beginnings) + tokens(rng.randint(1, 30), seed=rng.randrange(200))
        n = rng.choice((1, 1, 1, 2, 4))
        requests[key] = (
            prompt,
            dict(
                n=n,
                seeds=[rng.getrandbits(60) for _ in range(n)],
                top_p=rng.choice((1.0, 0.9)),
                max_new_tokens=rng.randint(1, 24),
                temperature=rng.choice((0.0, 0.8, 1.0)),
            ),
        )
    plain, expected = Engine(model, stop_ids, 128, max_batch=64), {}
    for key, (prompt, settings) in requests.items():
        plain.submit(prompt, key, **settings)
    drain(plain, expected)

    engine, found, cancelled = Engine(model, stop_ids, 128, max_batch=12, kv_tokens=20 * BLOCK_SIZE), {}, set()
    arriving = list(requests)
    while arriving or engine.busy:
        for _ in range(min(len(arriving), rng.choice((0, 0, 1, 5)))):
            key = arriving.pop()
            engine.submit(requests[key][0], key, **requests[key][1])
        engine.step()
        found |= {(s.key, s.index): s for s in engine.collect()}
        if rng.random() < 0.02:
            unfinished = [s.key for s in [*engine.scheduler.waiting, *engine.scheduler.running]]
            if unfinished:
                key = rng.choice(unfinished)
                engine.cancel(key)
                cancelled.add(key)
        if rng.random() < 0.05:
            check_blocks(engine)
    check_blocks(engine)
    assert (
        len(engine.scheduler.blocks.free) == 20
        and engine.scheduler.preemptions > 10
        and engine.scheduler.reused_tokens > 1000
        and len(cancelled) > 5
    )
    for at, sample in expected.items():
        if at[0] not in cancelled or at in found:
            assert (found[at].ids, found[at].finish_reason) == (sample.ids, sample.finish_reason), at
    assert {s.finish_reason for s in found.values()} == {"stop", "length"}


def test_a_longer_neighbour_changes_no_bit(model):
    """Beside a row of 5 tokens and beside one of 250, in batches of one size."""

    def logprobs(neighbour):
        engine = Engine(model, [], 400, max_batch=2)
        engine.submit(tokens(20), "ours", seeds=[3], max_new_tokens=60)
        engine.step()  # alone: prompts in one pass would be products of another size
        engine.submit(tokens(neighbour), "neighbour", max_new_tokens=100)
        return drain(engine)["ours", 0].logprobs

    assert logprobs(5) == logprobs(250)


def test_dense_rows_keep_what_they_hold():
    """Filled from blocks, moved, grown within the bound, and written back."""
    max_tokens = 8 * TILE
    cache = torch.randn(2, 2, 8, BLOCK_SIZE, 2, 4, generator=torch.Generator().manual_seed(0))
    before, rows = cache.clone(), DenseCache(cache, max_rows=4, max_tokens=max_tokens)
    rows.reserve(3, 40)
    rows.load(0, [3, 5, 1], 40)
    rows.load(2, [2, 4], 17)
    rows.move([2], [1], 17)
    for n_rows, longest in ((3, 150), (2, 400), (4, 200), (1, 2000)):
        rows.reserve(n_rows, longest)
        shape = rows.data.shape
        assert shape[2] >= n_rows and shape[4] >= longest and shape[4] % TILE == 0
        assert n_rows == 1 or shape[2] * (shape[4] - TILE) < max_tokens  # a row's capacity is whole tiles
    cache.zero_()
    rows.store(0, [7, 6], 0)
    assert torch.equal(cache[:, :, [7, 6]], before[:, :, [3, 5]])
    rows = DenseCache(before, 4, max_tokens)
    rows.reserve(3, 40)
    rows.load(2, [2, 4], 17)
    rows.move([2], [1], 17)
    rows.reserve(2, 400)
    rows.store(1, [6], 0)
    assert torch.equal(before[:, :, 6], before[:, :, 2])


def test_blocks_are_known_by_all_that_precedes_them():
    blocks = BlockManager(10)
    one, two = tokens(32, seed=1), tokens(32, seed=2)
    a, b = blocks.allocate(2), blocks.allocate(2)
    blocks.cache_prefix(one, a)
    blocks.cache_prefix(two[:16] + one[16:], b)
    assert blocks.lookup(one) == a and blocks.lookup(two[:16] + one[16:]) == b
    assert (
        blocks.lookup(one[:16] + two[16:]) == a[:1]
        and blocks.lookup(one[16:]) == []
        and blocks.lookup(one[:31]) == a[:1]
    )
    blocks.release(a)
    assert blocks.lookup(one) == a  # free, but still there
    blocks.allocate(5)  # 9 blocks less b: takes those that never held anything
    assert blocks.lookup(one) == a
    blocks.allocate(1)  # the end of a goes first
    assert blocks.lookup(one) == a[:1]
    blocks.allocate(1)
    assert blocks.lookup(one) == [] and not blocks.free
    with pytest.raises(AssertionError):
        blocks.allocate(1)


def test_new_weights_start_again_from_the_lowest_blocks():
    """Otherwise memory creeps until the whole cache has been touched."""
    blocks = BlockManager(100)
    for _ in range(30):
        held = blocks.allocate(3), blocks.allocate(4)
        assert max(held[0] + held[1]) <= 7
        blocks.release(held[0])
        blocks.release(held[1])
        blocks.evict_all()


def test_the_scheduler_alone():
    """Without a model: what fits runs, no sample is lost, and the youngest is preempted."""
    rng = random.Random(1)
    scheduler = Scheduler(n_blocks=21, max_slots=6, max_padded_tokens=300)
    expected, responses = set(), {}
    for key in range(60):
        seeds = list(range(rng.choice((1, 1, 3, 8))))
        prompt = tokens(20, seed=99)[: rng.choice((0, 20))] + tokens(rng.randint(1, 30), seed=key)
        scheduler.add(prompt, key, seeds, SamplingParams(rng.randint(1, 40)))
        expected |= {(key, i) for i in seeds}

    def remove_finished():
        running = scheduler.running
        ended = {slot: tokens(s.n_sampled, seed=s.seeds[0]) for slot, s in enumerate(running) if not s.tokens_left}
        for slot, response in ended.items():
            responses[running[slot].key, running[slot].index] = response
        stay = {id(s) for slot, s in enumerate(running) if slot not in ended}
        moves = scheduler.remove(ended)
        assert {id(s) for s in scheduler.running} == stay and len(scheduler.running) == len(stay)
        assert all(source >= len(stay) > target for source, target in moves)

    while scheduler.waiting or scheduler.prefilling or scheduler.running:
        chunks = scheduler.schedule_prefill()
        assert sum(chunk.end - chunk.start for chunk in chunks) <= PREFILL_TOKENS
        scheduler.fork([chunk.sequence for chunk in chunks if chunk.sequence is not scheduler.prefilling])
        remove_finished()
        while scheduler.schedule_decode() is None:
            slot = scheduler.youngest()
            sample = scheduler.running[slot]
            assert sample.admission == max(s.admission for s in scheduler.running)
            sample.response = tokens(sample.n_sampled, seed=sample.seeds[0])
            scheduler.remove({slot: sample.response})
            scheduler.requeue(sample)
        check_ref_counts(scheduler)
        n, longest = len(scheduler.running), max((s.length + 1 for s in scheduler.running), default=0)
        assert n <= 6 and n * longest <= 300
        for s in scheduler.running:
            s.n_sampled += 1
        remove_finished()
    assert responses.keys() == expected
    assert scheduler.preemptions > 5 and scheduler.reused_tokens > 500 and len(scheduler.blocks.free) == 20
    with pytest.raises(ValueError, match="need 21 blocks of 16 tokens; the whole cache has 20"):
        scheduler.add(tokens(300), "long", [0], SamplingParams(21))


def test_a_block_is_cached_once_all_its_keys_are_there(model):
    """The last token of a response has no keys yet: of 40 + 24 tokens three blocks are used again, not four."""
    engine = Engine(model, [], 200)
    ((first,),) = engine.generate([tokens(40)], max_new_tokens=24)
    longer = tokens(40) + first.ids + tokens(10, seed=1)
    ((found,),) = engine.generate([longer], temperature=0, **SETTINGS)
    assert engine.scheduler.reused_tokens == 3 * BLOCK_SIZE
    assert found.ids == Engine(model, [], 200).generate([longer], temperature=0, **SETTINGS)[0][0].ids
