"""The generation engine: ids in, sampled ids and their log-probs out.

    from engine import Engine

    engine = Engine(model, chat.stop_ids, max_len=4096)
    engine.submit(prompt_ids, key="p1", n=4, seeds=[1, 2, 3, 4], max_new_tokens=512)
    while engine.busy:
        engine.step()                   # a chunk of what was submitted, then one token for every running sample
        for sample in engine.collect():
            ...                         # what finished since the last call; more can be submitted at any time

How it works:
1. The KV cache is a pool of blocks of 16 tokens. A sequence holds a list of blocks, its row of the block table; a block
   may be in several lists, and is free when it is in none (kv_cache.py).
2. Full blocks are found again by the tokens in them and before them, until they are given to somebody else. So an edit
   finds its prompt and answer, a judgement the rubric, persona and question of its neighbours. New weights forget all.
3. A step admits waiting requests while rows and blocks are free, prefills at most PREFILL_TOKENS of them (a long prompt
   in chunks), and decodes one token for each row. A prompt is prefilled once and then forked: its n samples share the
   full blocks, the last one is copied.
4. Where the blocks run out, the youngest sample gives up its own and waits again; later it is recomputed from its ids.
5. The random number of a sample's i-th token is a hash of (its seed, i), and no sum runs over the batch. So a sample
   does not depend on its neighbours, beyond the rounding of matrix products of different sizes. Logits that are no
   numbers end their own sample.
6. On a CPU the running rows are decoded in a dense copy of their keys and values, at most as large as the cache itself:
   rows times the longest of them; where that would be more, the youngest wait as in 4.
7. On a GPU a decode step with its sampler is a CUDA graph per bucket of batch sizes; the host polls every few steps.
"""

from engine.engine import Engine
from engine.requests import Sample

__all__ = ["Engine", "Sample"]
