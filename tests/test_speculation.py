"""Drafts: fewer steps, the same samples; on a GPU's bookkeeping as well, where the host looks every few steps."""

import random

import pytest
import torch
from conftest import random_model, tiny_config
from test_engine import check_blocks, tokens

from generate import Engine
from kv_cache import BLOCK
from speculation import DRAFT_TOKENS, lay_out, propose, write_down

STOPS = [7, 11]


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(tie_word_embeddings=False), std=0.3)


class Unpolled(Engine):
    """A GPU's bookkeeping on a CPU: the paged cache, batch sizes by buckets, a look at the rows every eighth step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dense, self.poll_steps = None, 8

    def _replay(self, n, drafted):
        return self._decode_rows(self._bucket(n), drafted)


def edited(ids, rng):
    """A draft whose response is `ids`: half of it in stretches, words between them that the response has not."""
    draft, at = [], 0
    while at < len(ids):
        kept = rng.randint(3, 10)
        draft += ids[at : at + kept] + [rng.randrange(300) for _ in range(rng.randint(0, 6))]
        at += kept + rng.randint(0, 6)
    return draft


def requests_of(n):
    """{key: (prompt, settings)}, some with several samples, some that share their beginning."""
    rng = random.Random(0)
    found = {}
    for key in range(n):
        samples = rng.choice((1, 1, 3))
        found[key] = (
            rng.choice(([], tokens(20, seed=99))) + tokens(rng.randint(1, 20), seed=key),
            dict(
                n=samples,
                seeds=[rng.getrandbits(60) for _ in range(samples)],
                top_p=rng.choice((1.0, 0.9)),
                temperature=rng.choice((0.0, 0.8, 1.0)),
                max_new_tokens=rng.choice((2, 30, 45)),
            ),
        )
    return found


def run(engine, requests, drafts, cancel=()):
    """-> {(key, index): Sample}, steps; half of the requests join later; `cancel`: keys that are dropped at step 10."""
    found, steps = {}, 0
    for key, (prompt, settings) in requests.items():
        engine.submit(prompt, key, draft=drafts.get(key, ()), **settings)
        if key % 8 == 0:
            engine.step()
            steps += 1
    while engine.busy:
        engine.step()
        steps += 1
        if steps == 10:
            for key in cancel:
                engine.cancel(key)
        found |= {(s.key, s.index): s for s in engine.collect()}
    check_blocks(engine)
    return found, steps


@pytest.mark.parametrize("kind", [Engine, Unpolled])
def test_a_draft_changes_no_sample(model, kind):
    """Forks, nucleus, greedy, stop tokens, cancelled neighbours, a cache so small that samples wait and go on."""
    requests, rng, cancelled = requests_of(30), random.Random(1), {3, 4, 21}
    plain, _ = run(Engine(model, STOPS, 96, max_batch=16), requests, {})
    drafts = {key: edited(plain[key, 0].ids, rng) for key in requests if key % 5}  # a fifth has none
    engine = kind(model, STOPS, 96, max_batch=16, kv_tokens=20 * BLOCK)
    found, _ = run(engine, requests, drafts, cancelled)
    assert engine.preemptions > 3 and len(engine.blocks.free) == 20
    assert {at for at in plain if at[0] not in cancelled} <= set(found)
    for at, s in found.items():
        expected = plain[at]
        assert (s.ids, s.stop_id, s.finish_reason) == (expected.ids, expected.stop_id, expected.finish_reason), at
        torch.testing.assert_close(torch.tensor(s.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)
    assert {s.finish_reason for s in found.values()} == {"stop", "length"}


@pytest.mark.parametrize("kind", [Engine, Unpolled])
def test_a_right_draft_saves_steps(model, kind):
    """Of 41 tokens the prompt gives the first, each step then 1 + DRAFT_TOKENS."""
    settings = dict(max_new_tokens=41, seeds=[5])
    ((plain,),) = Engine(model, [], 96).generate([tokens(20)], **settings)
    engine = kind(model, [], 96)
    engine.submit(tokens(20), draft=plain.ids, **settings)
    engine.step()
    steps = 1
    while engine.busy and len(engine.partial(None)) < 41 and not engine.finished:
        engine.step()
        steps += 1
    assert steps == 40 // (1 + DRAFT_TOKENS)
    engine.step()  # the host looks, if it has not yet
    (found,) = engine.collect()
    assert (found.ids, found.finish_reason) == (plain.ids, "length")


def test_alternatives_are_listed_without_a_draft(model):
    plain = Engine(model, [], 64).generate([tokens(9)], max_new_tokens=12, top_logprobs=2)
    found = Engine(model, [], 64).generate([tokens(9)], max_new_tokens=12, top_logprobs=2, draft=plain[0][0].ids)
    assert found == plain and len(found[0][0].top_logprobs) == 12
    with pytest.raises(ValueError, match="vocabulary has 300"):
        Engine(model, [], 64).submit([5], draft=[300])


def rows_of(**changes):
    """Two rows: the first stands at `6 7` of its draft, the second has none."""
    rows = dict(
        token=torch.tensor([7, 7]),
        position=torch.tensor([3, 3]),
        length=torch.tensor([12, 12]),
        limit=torch.tensor([40, 40]),
        active=torch.tensor([1, 1]),
        done=torch.tensor([False, False]),
        ids=torch.tensor([[5, 6, 7] + [0] * 45] * 2),
        logprobs=torch.zeros(2, 48),
        draft=torch.tensor([[7, 1, 2, 6, 7, 8, 9, 7]] * 2),
        draft_length=torch.tensor([8, 0]),
    )
    return rows | changes


def test_what_is_proposed():
    def proposed(most=DRAFT_TOKENS, **changes):
        proposals, counts = propose(rows_of(**changes), 8, most)
        return proposals[0, : counts[0]].tolist(), int(counts[1])

    assert proposed() == ([8, 9, 7], 0)  # the end of the draft
    assert proposed(token=torch.tensor([1, 1])) == ([2, 6, 7, 8], 0)  # no `6 1`: the first 1
    assert proposed(token=torch.tensor([3, 3])) == ([], 0)
    assert proposed(2) == ([8, 9], 0)
    assert proposed(limit=torch.tensor([5, 5])) == ([8], 0)  # the fifth token is sampled behind the fourth
    assert proposed(done=torch.tensor([True, False])) == ([], 0)


def test_how_proposals_are_laid_out():
    owner, place = lay_out(torch.tensor([2, 0, 1]))
    assert (owner.tolist(), place.tolist()) == ([0, 1, 2, 0, 0, 2], [0, 0, 0, 1, 2, 1])
    owner, place = lay_out(torch.tensor([1, 0, 0]), 3)
    assert (owner.tolist(), place.tolist()) == ([0, 1, 2, 0, 3, 3], [0, 0, 0, 1, 0, 0])


@pytest.mark.parametrize(
    "sampled, kept, done",
    [
        ([8, 9, 7, 4], [8, 9, 7, 4], False),  # all three were right
        ([8, 3, 7, 4], [8, 3], False),
        ([3, 9, 7, 4], [3], False),
        ([8, 100, 7, 4], [8, 100], True),  # a stop token
    ],
)
def test_what_is_written_down(sampled, kept, done):
    rows = rows_of()
    proposals, _ = propose(rows, 8, DRAFT_TOKENS)
    if 100 in sampled:
        proposals[0, 1] = 100
    owner, place = lay_out(torch.tensor([3, 0]))
    logprobs = -torch.arange(5.0)
    both = torch.tensor([sampled[0], 2, *sampled[1:]])
    write_down(rows, proposals, owner, place, both, logprobs, torch.tensor([100]))
    n = len(kept)
    assert rows["position"].tolist() == [3 + n, 4] and rows["length"].tolist() == [12 + n, 13]
    assert rows["ids"][0, : 3 + n].tolist() == [5, 6, 7, *kept] and rows["ids"][1, :4].tolist() == [5, 6, 7, 2]
    assert rows["logprobs"][0, 3 : 3 + n].tolist() == [0, -2, -3, -4][:n] and rows["logprobs"][1, 3] == -1
    assert rows["token"].tolist() == [kept[-1], 2] and rows["done"].tolist() == [done, False]
    write_down(rows, proposals, owner, place, both, logprobs, torch.tensor([100]))
    assert rows["position"].tolist() == [3 + n + (0 if done else n), 5]  # nothing joins what is done
