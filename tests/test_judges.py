"""judges: verdicts of models in this process and of functions; nothing lost, nothing made up."""

import json
import math
import random
import re
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, tiny_config
from test_prompts import write_tokenizer

from attention import Packed
from chat import Chat
from data import persona_world
from judges import BradleyTerryJudge, GenerativeJudge, JudgeSettings, fingerprint, open_judge
from judges.asking import EngineBackend
from judges.models import scalar_rewards
from judges.pairs import probability_of_first
from model import save_pretrained
from prompts import Judgement, Templates, bt_ids, grm_prompt, judgement_text, pair_request, parse_pair
from runtime.distributed import Ranks

WEIGHTS = (0.35, 0.40, 0.25)
TEMPLATES = Templates(answer="{persona} {question}", grm="judge {persona} {question} <<{answer}>>")
ROW = {"prompt_id": "p", "persona": {"Name": "Ada"}, "question": "Where to?"}
RANKS = Ranks(0, 1, torch.device("cpu"), torch.float32, None)
GOOD = judgement_text("Cut the intro.", 4, -2, 1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """open_judge with the templates above, as flags."""
    folder, flags = tmp_path_factory.mktemp("templates"), {}
    for name in ("answer", "grm"):
        flags[f"{name}_template"] = str(folder / f"{name}.txt")
        (folder / f"{name}.txt").write_text(getattr(TEMPLATES, name))
    return lambda spec, **settings: open_judge(spec, JudgeSettings(**flags, **settings), RANKS)


def verdicts(judge, seconds=30):
    """Polls until the judge is idle -> {key: verdict}."""
    found, deadline = {}, time.monotonic() + seconds
    while judge.busy:
        assert time.monotonic() < deadline, "the judge never finished"
        for verdict in judge.poll():
            assert verdict.key not in found
            found[verdict.key] = verdict
    return found


# -- a generative reward model in this process


class ScriptedEngine:
    """Answers each prompt with the next text of its script; finishes one sample a step."""

    def __init__(self, chat, script, max_len=10**6):
        self.chat, self.script, self.max_len = chat, script, max_len
        self.queue, self.done, self.seeds = [], [], defaultdict(list)

    @property
    def busy(self):
        return bool(self.queue)

    def submit(self, prompt_ids, key=None, seeds=None, temperature=1.0, max_new_tokens=512):
        if len(prompt_ids) + 1 > self.max_len:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens, over {self.max_len}")
        prompt = self.chat.decode(prompt_ids)
        self.queue.append((key, prompt[prompt.index("<<") + 2 : prompt.index(">>")], *seeds))

    def step(self):
        key, answer, seed = self.queue.pop(0)
        text = self.script[answer][len(self.seeds[answer])]
        self.seeds[answer].append(seed)
        reason = "length" if text.endswith("...") else "stop"
        ids = self.chat.encode(text.removesuffix("..."))
        self.done.append(SimpleNamespace(key=key, ids=ids, finish_reason=reason, error=None))

    def collect(self, errors):
        done, self.done = self.done, []
        return done


@pytest.fixture
def chat(tmp_path):
    return Chat(write_tokenizer(tmp_path / "chat"))


def scripted(chat, script, attempts=3, temperature=0.9, max_len=10**6):
    engine = ScriptedEngine(chat, script, max_len)
    settings = JudgeSettings(attempts=attempts, temperature=temperature)
    judge = GenerativeJudge(EngineBackend(engine, chat), TEMPLATES, settings)
    return judge, engine


def test_generative_judge_asks_again_and_gives_up(chat):
    script = {
        "fine": [GOOD],
        "second": ["no tags", GOOD],
        "cut": [GOOD + "...", GOOD],
        "never": ["", "<critique>x</critique>", GOOD.replace("4", "7"), GOOD],
    }
    judge, engine = scripted(chat, script)
    for n, answer in enumerate(script):
        judge.submit(answer, ROW, answer, seed=n)
    found = verdicts(judge)
    for answer, attempts in (("fine", 1), ("second", 2), ("cut", 2)):
        verdict = found[answer]
        assert (verdict.reward, verdict.attempts, verdict.error) == (0.85, attempts, None)
        assert verdict.judgement == Judgement("Cut the intro.", 4, -2, 1)
    lost = found["never"]
    assert (lost.reward, lost.judgement, lost.attempts) == (None, None, 3)
    assert "in no readable form" in lost.error and "Helpfulness: 7" in lost.error  # one reply is shown
    assert judge.take_counts() == (8, 5) and judge.take_counts() == (0, 0)
    assert len(set(engine.seeds["never"])) == 3  # another seed each time

    again, engine_again = scripted(chat, script)  # the same seeds in another order
    for n, answer in reversed(list(enumerate(script))):
        again.submit(answer, ROW, answer, seed=n)
    verdicts(again)
    assert engine_again.seeds == engine.seeds


def test_a_greedy_judgement_is_not_asked_again(chat):
    judge, _ = scripted(chat, {"a": ["nothing"]}, temperature=0.0)
    judge.submit("a", ROW, "a", seed=0)
    assert verdicts(judge)["a"].attempts == 1


def test_a_prompt_over_the_limit_is_a_lost_judgement(chat, capsys):
    limit = len(grm_prompt(chat, TEMPLATES, ROW, "fine")) + 10
    judge, _ = scripted(chat, {"fine": [GOOD]}, max_len=limit)
    judge.submit("long", ROW, "word " * 50, seed=0)
    judge.submit("fine", ROW, "fine", seed=0)
    found = verdicts(judge)
    assert found["fine"].reward == 0.85
    assert found["long"].reward is None and f"over {limit}" in found["long"].error
    assert "judge: an answer got no judgement" in capsys.readouterr().err


def test_what_finished_survives_an_error(chat):
    judge, engine = scripted(chat, {"a": [GOOD], "b": [GOOD]})
    judge.submit("a", ROW, "a", seed=0)
    judge.submit("b", ROW, "b", seed=0)
    judge.advance()
    step, engine.step = engine.step, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        judge.poll()
    engine.step = step
    assert set(verdicts(judge)) == {"a", "b"}


def test_with_the_real_engine_a_random_model_judges_nothing(tmp_path, opened):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    save_pretrained(random_model(tiny_config(vocab_size=500)), str(tmp_path / "grm"), tokenizer)
    judge = opened(str(tmp_path / "grm"), attempts=2, max_new_tokens=6)
    assert judge.writes_critiques and not judge.busy
    for n in range(3):
        judge.submit(n, ROW, "tea " * n, seed=n)
    judge.submit("long", ROW, "word " * 600, seed=0)
    found = verdicts(judge)
    assert all(verdict.reward is None and verdict.error for verdict in found.values())
    assert [found[n].attempts for n in (0, 1, 2, "long")] == [2, 2, 2, 0]
    assert judge.take_counts() == (6, 6)


# -- judges that compare two answers


def test_pairs_in_process(tmp_path, opened):
    """The odds of the two names as the first token, by a forward pass over the same ids."""
    model = random_model(tiny_config(vocab_size=500, max_position_embeddings=2048))
    save_pretrained(model, str(tmp_path / "lm"), write_tokenizer(tmp_path / "tokenizer"))
    judge = opened(f"pair:{tmp_path / 'lm'}")
    judge.likely = 500  # a random model likes neither name
    answers = [("tea", "a walk in the hills"), ("a walk in the hills", "tea"), ("x<|im_end|>", '"M"')]
    for n, pair in enumerate(answers):
        judge.submit(n, ROW, pair, seed=n)
    judge.submit("long", ROW, ("word " * 900, ""), seed=0)
    found, chat = verdicts(judge), Chat(str(tmp_path / "lm"))
    for n, pair in enumerate(answers):
        ids = chat.messages([{"role": "user", "content": pair_request(Templates(), ROW, *pair)}])
        assert ids.count(chat.turn_end) == 1 + (chat.system is not None)
        context = Packed([len(ids)])
        logits = model(torch.tensor(ids), context.position_ids, context, index=torch.tensor([len(ids) - 1]))[0]
        first, second = logits[[chat.encode("m")[0], chat.encode("M")[0]]].tolist()
        assert found[n].reward == pytest.approx(1 / (1 + math.exp(second - first)), abs=1e-4)
    assert found[0].method == "logprobs" and found["long"].failure == "too long"

    better = int((logits >= max(first, second)).sum())  # the rank of the likelier name; the other's is behind it
    for judge.likely, failure in ((better, None), (better - 1, "unparsable")):
        judge.submit("edge", ROW, answers[2], seed=0)
        edge = verdicts(judge)["edge"]
        assert edge.failure == failure and (failure or edge.reward == pytest.approx(found[2].reward, abs=1e-6))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_no_judgement(chat, tmp_path, value):
    """Of a Bradley-Terry model, and of a model that names the better answer."""
    model = random_model(tiny_config(vocab_size=500), scalar_head=True)
    with torch.no_grad():
        model.score.weight.fill_(value)
    judge = BradleyTerryJudge(model, chat, TEMPLATES)
    judge.submit(0, ROW, "tea", seed=0)
    found = verdicts(judge)[0]
    assert (found.reward, found.failure, judge.take_counts()) == (None, "not a number", (1, 1))
    assert probability_of_first([("m", math.nan), ("M", -1.0)]) is None


@pytest.mark.parametrize("spec", ["{}", "pair:{}"])
def test_a_model_whose_logits_are_no_numbers_judges_nothing(tmp_path, opened, spec):
    """The answers are lost and counted, each with the reason; the run is not."""
    model = random_model(tiny_config(vocab_size=500, max_position_embeddings=2048))
    save_pretrained(model, str(tmp_path / "lm"), write_tokenizer(tmp_path / "tokenizer"))
    judge = opened(spec.format(tmp_path / "lm"))
    with torch.no_grad():
        judge.backend.engine.model.model.norm.weight.fill_(math.nan)
    for n in range(2):
        judge.submit(n, ROW, ("tea", "a walk") if spec.startswith("pair") else "tea", seed=n)
    found = verdicts(judge)
    assert all(
        (v.reward, v.failure) == (None, "not a number") and "no finite numbers" in v.error for v in found.values()
    )
    assert judge.take_counts() == (2, 2)


def test_names_of_the_better_answer():
    assert [parse_pair(t) for t in ("m", "M", ' "M". ', "**m**", "(M)")] == [0, 1, 1, 0, 1]
    assert parse_pair("<think>m or M? Rather m.</think>\n\nM") == 1
    assert [parse_pair(t) for t in ("", "mM", "m or M", "The answer is m", "n", "model m")] == [None] * 6


# -- Bradley-Terry


def test_bradley_terry_rewards_are_those_of_each_sequence_alone(chat):
    model = random_model(tiny_config(vocab_size=500), scalar_head=True)
    judge = BradleyTerryJudge(model, chat, TEMPLATES)
    judge.tokens_per_batch = 150  # several batches
    answers = ["tea", "a walk in the hills " * 5, "", "x"]
    for n, answer in enumerate(answers):
        judge.submit(n, ROW, answer, seed=0)
    judge.submit("long", ROW, "word " * 600, seed=0)
    found = verdicts(judge)
    for n, answer in enumerate(answers):
        (alone,) = scalar_rewards(model, [bt_ids(chat, TEMPLATES, ROW, answer)])
        assert found[n].judgement is None and found[n].reward == pytest.approx(alone, abs=1e-5)
    assert len({found[n].reward for n in range(4)}) == 4
    assert found["long"].reward is None and "512" in found["long"].error
    assert not judge.writes_critiques and judge.take_counts() == (5, 1)


def test_open_bradley_terry(tmp_path, opened):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    scalar = random_model(tiny_config(vocab_size=500), scalar_head=True)
    save_pretrained(scalar, str(tmp_path / "bt"), tokenizer)
    judge = opened(f"bt:{tmp_path / 'bt'}")
    judge.submit(0, ROW, "tea", seed=0)
    (alone,) = scalar_rewards(scalar, [bt_ids(Chat(tokenizer), TEMPLATES, ROW, "tea")])
    assert verdicts(judge)[0].reward == pytest.approx(alone, abs=1e-5)

    save_pretrained(random_model(tiny_config(vocab_size=500)), str(tmp_path / "lm"), tokenizer)
    with pytest.raises(ValueError, match="--judge bt:.*no score.weight"):
        opened(f"bt:{tmp_path / 'lm'}")
    with pytest.raises(ValueError, match="--judge nowhere/at/all"):
        opened("nowhere/at/all")


# -- the generated world


def test_world_judge(opened):
    judge = opened("world")
    rows = list(persona_world.prompt_rows(random.Random(0), "train", 3))
    for n, row in enumerate(rows):
        judge.submit(n, row, "Tea.", seed=0)
    found = verdicts(judge)
    for n, row in enumerate(rows):
        expected = persona_world.judge(row, "Tea.")
        assert (found[n].judgement, found[n].reward) == (expected, expected.score(WEIGHTS))
    judge.submit("fine", rows[0], "Tea.", seed=0)
    judge.submit("alien", ROW, "Tea.", seed=0)
    found = verdicts(judge)  # what came before the error is kept
    assert found["fine"].reward is not None and found["alien"].reward is None and "persona_world" in judge.down


# -- a function in a file

FUNCTIONS = """
from prompts import Judgement

def length(row, answer) -> float:
    return min(len(answer), 9) / 9

def unknown(row, answer):
    if answer == "none":
        return None
    if answer == "judged":
        return Judgement("Cut the intro.", 4, -2, 1)
    if answer == "exit":
        raise SystemExit(0)
    if answer == "half":
        return Judgement("Cut \\ud83d.", 4, -2, 1)
    return {"nan": float("nan"), "huge": 10**400, "text": "5", "high": Judgement("x", 6, 0, 0), "two": 2}[answer]

def critic(row, answer) -> Judgement | None:
    return Judgement(f"Say more about {row['question']}", 1, 2, 3)
"""


def test_a_function_in_a_file_judges(tmp_path, capsys):
    file = tmp_path / "my.py"
    file.write_text(FUNCTIONS)

    def opened(name, **settings):
        return open_judge(f"{file}:{name}", JudgeSettings(**settings), RANKS)

    found = [opened(name).writes_critiques for name in ("length", "unknown", "critic")]
    assert found == [False, None, True]
    judge = opened("unknown", weights=(1, 0, 0))
    for answer in ("none", "judged", "two", "half"):
        judge.submit(answer, ROW, answer, seed=0)
    found = verdicts(judge)
    assert (found["judged"].reward, found["judged"].judgement) == (4.0, Judgement("Cut the intro.", 4, -2, 1))
    assert (found["two"].reward, found["two"].judgement) == (2.0, None)
    assert (found["none"].reward, found["none"].failure) == (None, "no judgement")
    assert found["half"].judgement.critique == "Cut \ufffd."  # it goes into prompts and files
    assert judge.take_counts() == (4, 1) and "gave None" in capsys.readouterr().err
    judge = opened("length")
    for n in range(40):  # more than it looks at in one poll
        judge.submit(n, ROW, "x" * n, seed=0)
    assert len(judge.poll()) == judge.answers_per_poll
    assert {n: v.reward for n, v in verdicts(judge).items()}[39] == 1.0


@pytest.mark.parametrize(
    "answer, problem",
    [
        ("?", "KeyError: '?'"),
        ("nan", "float nan, expected a finite number"),
        ("huge", "int 1000.*expected a finite number"),
        ("text", "str '5', expected a finite number, a Judgement or None"),
        ("high", "integers from -5 to 5"),
        ("exit", "SystemExit: 0"),
    ],
)
def test_what_a_function_must_not_give_stops_the_run(tmp_path, answer, problem):
    """As a server that is down does, so that the steps before are saved; nothing more is asked."""
    (tmp_path / "my.py").write_text(FUNCTIONS)
    judge = open_judge(f"{tmp_path}/my.py:unknown", JudgeSettings(), RANKS)
    for key, text in enumerate((answer, "none")):
        judge.submit(key, ROW, text, seed=0)
    found = verdicts(judge)
    assert re.search(f'/my.py:unknown, prompt "p": .*{problem}', judge.down)
    assert [(v.reward, v.failure) for v in found.values()] == [(None, "request")] * 2 and not judge.busy


def test_files_without_such_a_function(tmp_path):
    (tmp_path / "my.py").write_text("import nowhere_at_all")
    (tmp_path / "other.py").write_text("x = 1")
    (tmp_path / "script.py").write_text("import sys\ndef f(row, answer): return 1\nsys.exit(0)")
    for spec, problem in (
        ("my.py", "expected FILE.py:FUNCTION"),
        ("my.py:f", "does not run: ModuleNotFoundError: .*nowhere_at_all"),
        ("other.py:f", "has no function f"),
        ("other.py:x", "has no function x"),
        ("gone.py:f", "gone.py: no such file"),
        ("script.py:f", "script.py does not run: SystemExit: 0"),
    ):
        with pytest.raises(ValueError, match=f"--judge .*{problem}"):
            open_judge(f"{tmp_path}/{spec}", JudgeSettings(), RANKS)


def test_fingerprints_follow_what_judges(tmp_path):
    """Code, weights and the text of the template that is used; not names, nor templates that it does not fill."""
    file = tmp_path / "my.py"
    file.write_text("def f(row, answer): return 1\ndef g(row, answer): return 1\n")
    one, other = (fingerprint(f"{file}:{name}", JudgeSettings()) for name in "fg")
    file.write_text("def f(row, answer): return -1\ndef g(row, answer): return 1\n")
    assert len({json.dumps(x) for x in (one, other, fingerprint(f"{file}:f", JudgeSettings()))}) == 3
    judge = open_judge(f"{file}:f", JudgeSettings(), RANKS)  # the new one, though a module of that file is loaded
    judge.submit(0, ROW, "x", seed=0)
    assert verdicts(judge)[0].reward == -1
    text = tmp_path / "a.txt"
    text.write_text("{persona} {question} {answer}")
    url = "http://127.0.0.1:9#m"
    before = fingerprint(url, JudgeSettings(grm_template=str(text)))
    assert before == fingerprint(url, JudgeSettings(grm_template=str(text), answer_template="not used"))
    text.write_text("{persona} {question} <{answer}>")
    assert before != fingerprint(url, JudgeSettings(grm_template=str(text)))


def test_a_judge_fills_the_templates_that_it_was_trained_with(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    save_pretrained(
        random_model(tiny_config(vocab_size=500)), str(tmp_path / "grm"), tokenizer, templates={"grm": TEMPLATES.grm}
    )
    scalar = random_model(tiny_config(vocab_size=500), scalar_head=True)
    save_pretrained(scalar, str(tmp_path / "bt"), tokenizer, templates={"answer": TEMPLATES.answer})
    grm = open_judge(str(tmp_path / "grm"), JudgeSettings(), RANKS)
    assert grm.templates.grm == TEMPLATES.grm
    assert open_judge(f"bt:{tmp_path / 'bt'}", JudgeSettings(), RANKS).templates.answer == TEMPLATES.answer
    (tmp_path / "grm.txt").write_text("{persona}{question}{answer}")
    settings = JudgeSettings(grm_template=str(tmp_path / "grm.txt"))
    assert open_judge(str(tmp_path / "grm"), settings, RANKS).templates.grm == "{persona}{question}{answer}"
    assert fingerprint(str(tmp_path / "grm"), settings)[1] == {"grm": "{persona}{question}{answer}"}
