"""The generation engine: ids in, sampled ids and their log-probs out.

    from engine import Engine

    engine = Engine(model, chat.stop_ids, max_len=4096)
    engine.submit(prompt_ids, key="p1", n=4, seeds=[1, 2, 3, 4], max_new_tokens=512)
    while engine.busy:
        engine.step()                   # a chunk of the prompts, then one token for every running sample
        for sample in engine.collect():
            ...                         # finished since the last call; more can be submitted at any time

How it works:
1. The KV cache is a pool of blocks of 16 tokens. A sequence has a list of blocks, its row of the block table. A block
   may be in several lists, and is free when it is in none (block_manager.py).
2. Full blocks stay in a prefix cache, keyed by their tokens and all tokens before them, until they are allocated again.
   So an edit reuses its prompt and answer, a judgement the rubric, persona and question of others. New weights empty
   the cache.
3. A step admits waiting sequences while slots and blocks are free, prefills up to PREFILL_TOKENS of them (a long prompt
   in chunks), and decodes one token for each slot (scheduler.py). A prompt is prefilled once and then forked: its
   samples share the full blocks, and the last block is copied. More than SAMPLES_AT_ONCE enter in groups, which find
   the prompt in the cache.
4. When blocks run out, the youngest sample gives up its own and waits again. Later it is recomputed from its ids.
5. The random number of a sample's i-th token is a hash of (its seed, i), and no sum runs over the batch. So a sample
   does not depend on the others, beyond the rounding of matrix products of different sizes. Logits that are not finite
   end only their own sample.
6. On a CPU the running samples are decoded in a dense copy of their keys and values, padded to the longest. The copy is
   at most as large as the cache; where it would be larger, the youngest wait as in 4 (cpu_runner.py).
7. On a GPU a decode step with its sampler is a CUDA graph for each of a few batch sizes, and the host looks for ended
   samples only every few steps (gpu_runner.py).
"""

from engine.engine import Engine
from engine.requests import Sample

__all__ = ["Engine", "Sample"]
