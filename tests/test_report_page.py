"""The page of report.py in a browser: filter, search, diff, tokens, comparison, a click on a step, hostile text."""

import json
import time

import pytest
from browser import MISSING, Browser
from test_report import HOSTILE, PERSONA, made, rl_run, write_lines

from reporting import training_runs

pytestmark = [pytest.mark.browser, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@pytest.fixture(scope="module")
def browser():
    with Browser() as b:
        yield b


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs, one of them with hostile text, and an evaluation. The policy reads prompts in a format of the test."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [rl_run(folder / "cpe", hostile=HOSTILE), rl_run(folder / "ppo", answer="An answer of the other run.")]
    evaluation = folder / "evaluation"
    evaluation.mkdir()
    (evaluation / "results.json").write_text(json.dumps({"args": {"task": "win-rate"}}))
    shared = dict(instruction="Kim\n\nWhat to eat?", output_1="Bread.", output_2="Fresh bread.", failure=None)
    rows = [shared | dict(prompt_id=f"e{i}", group="ab"[i % 2], preference=1.0 + (i % 3) / 2) for i in range(6)]
    (evaluation / "annotations.json").write_text(json.dumps(rows))
    templates = dict(prompt="<|user|>{persona} {question}<|end|>", edit="{answer}|{critique}|")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_runs, "prompt_templates", lambda folder: templates)
        made([*runs, evaluation], folder / "page.html")
    return folder / "page.html"


@pytest.fixture
def at(browser, page):
    """Opens the page at an address; nothing on it may have failed at the end of a test."""

    def go(address=""):
        browser.open("/dev/null")
        browser.open(page, address)
        return browser

    browser.errors()
    yield go
    assert browser.errors() == []


def set_value(b, selector, value):
    b.run(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event('change')); e.dispatchEvent(new Event('input'));",
        selector,
        value,
    )


def test_overview(at):
    b = at()
    assert b.text("#header .status").startswith(
        "PPO with critique-post-editstep 12"
    )  # a dot between them is the style sheet's
    assert b.count(".warning") == 11 and b.count(".warning.warn") == 1
    b.until("return document.querySelectorAll('.chart canvas').length >= 4")
    assert b.text('.chart[data-title="Reward"] .values').split() == ["originals", "2.20", "edits", "2"]
    set_value(b, "#x", "generated tokens")
    set_value(b, "#smooth", "2")
    b.until("return location.hash === '#x=generated+tokens&smooth=2'")
    b.until("return document.querySelectorAll('.chart canvas').length >= 4")
    # the last value smoothed over what there is of five steps: those of 10, 11 and 12
    assert b.text('.chart[data-title="Reward"] .values').split()[1] == "2.10"


@pytest.mark.parametrize(
    "address",
    [
        "#view=rollouts&row=length",
        "#view=rollouts&row=constructor",
        "#view=rollouts&row=1e0",
        "#view=rollouts&show=constructor",
        "#view=rollouts&sort=__proto__",
        "#view=rollouts&show=tokens&color=constructor",
        "#view=rollouts&show=tokens&color=nonsense",
        "#run=2&view=rows&row=length",
        "#run=2&view=rows&order=toString",
        "#view=compare&nth=-1",
        "#view=compare&nth=0.5",
        "#x=constructor",
        "#smooth=-3",
    ],
)
def test_an_address_that_names_nothing_shows_what_there_is(at, address):
    """Names that every JavaScript object or list has; a link may come from anybody."""
    b = at(address)
    assert b.count("#main > *") > 0
    if "rows" in address or "rollouts" in address:
        assert b.count(".item") > 0 and b.count(".detail") == 1


def test_a_click_on_a_step_shows_its_rollouts(at):
    b = at()
    b.until("return document.querySelector('.chart canvas')")
    box = b.run(
        "const chart = document.querySelector('.chart .u-over'); chart.scrollIntoView({block: 'center'});"
        "const r = chart.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]"
    )
    x, y = int(box[0] + box[2] * 4 / 11), int(box[1] + box[3] / 2)  # of 12 steps the fifth
    moves = [{"type": "pointerMove", "x": x + d, "y": y} for d in (9, 0)]
    clicks = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
    b.ask("POST", f"{b.session}/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves + clicks}]})
    b.until("return document.querySelector('.detail') !== null")
    assert b.run("return [document.querySelector('#from').value, document.querySelector('#to').value]") == ["5", "5"]
    assert b.count(".item") == 6 and set(
        b.run("return run().rows.filter((_, i) => matching().rows.includes(i)).map(r => r.step)")
    ) == {5}
    b.ask("POST", f"{b.session}/back")  # the address holds the state: back to the curves
    b.until("return document.querySelector('.warnings') !== null && state.from === ''")


def test_a_warning_shows_the_rollouts_behind_it(at):
    b = at()
    b.click(".warning.warn .go")
    b.until("return document.querySelector('#sort')?.value === 'worsened'")
    assert b.run("return [state.view, state.from, state.to]") == ["rollouts", "10", "12"]


def test_rollouts_open_at_the_newest_step(at):
    b = at("#view=rollouts")
    assert b.text(".item .meta").startswith("step 12") and "Step 12" in b.text(".crumbs")
    set_value(b, "#sort", "step")
    b.until("return document.querySelector('.item .meta').innerText.startsWith('step 1\\n')")


SAVED = "let saved; saveRows = (rows) => { saved = rows; }; document.querySelector('#save').click(); return saved"


def test_the_rows_of_a_filter_are_saved(at):
    b = at("#view=rollouts&show=tokens")
    (row,) = b.run(SAVED)
    assert (row["prompt_id"], row["step"], row["sample"]) == ("p1", 1, 0) and row["persona"] == PERSONA
    assert row["edit"]["answer"].endswith("It is new.") and row["tokens"]["weight"] == [1.1, 0, 1]
    b = at("#run=2&view=rows&verdict=win&group=a")
    (row,) = b.run(SAVED)
    assert row["verdict"] == "win" and row["sides"][0]["answer"] == "Fresh bread."
    b = at("#view=rollouts&show=tokens")
    b.run("const make = URL.createObjectURL; URL.createObjectURL = (blob) => make(window.blob = blob)")
    b.click("#save")
    text = b.run("return window.blob.text()")
    assert json.loads(text)["prompt_id"] == "p1" and text.endswith("\n")


def test_the_prompt_as_the_policy_read_it(at):
    b = at("#view=rollouts&show=tokens")
    assert b.count(".prompt") == 2 and b.text(".prompt .said") == ""  # folded
    b.click(".prompt summary")
    assert b.text(".prompt .said") == "<|user|>name: Ada Novak\nfood: vegan What about topic 1?<|end|>"
    edit = b.run("return document.querySelectorAll('.prompt .said')[1].textContent")
    assert edit.startswith("<|user|>name: Ada Novak") and edit.endswith(
        "<|end|>Answer 0 of step 1 to 1: eat vegan food.|Say more.|"
    )


def test_settings_begin_with_what_was_changed(at):
    b = at("#view=settings")
    flags = b.run("return [...document.querySelectorAll('#changed th')].map((x) => x.innerText)")
    assert flags == ["edit_loss", "max_steps"]
    assert "non_default" not in b.text(".settings") and "edit_rate" in b.text(".settings")


def test_filter_and_search(at):
    b = at("#view=rollouts")
    assert b.text("#count") == "73 rollouts of 73"
    for show, n in (("dropped", 2), ("cut", 1), ("tokens", 1), ("clipped", 1), ("trained", 36), ("heldout", 0)):
        set_value(b, "#show", show)
        b.until("return document.querySelector('#count').innerText.startsWith(arguments[0] + ' rollout')", str(n))
        assert b.count(".item") == n
    b.click("#clear")
    b.type("#q", "step 7 VEGAN")  # all words, whatever their case
    b.until("return document.querySelectorAll('.item').length === 5")  # its sixth answer is the hostile one
    set_value(b, "#q", "")
    b.until("return document.querySelector('#count').innerText === '73 rollouts of 73'")
    set_value(b, "#sort", "improved")
    b.until("return document.querySelector('.item .delta').innerText === '+0.50'")
    set_value(b, "#topic", "other")
    b.until("return document.querySelectorAll('.item').length === 1")
    assert "Dropped from the batch: unparsable" in b.text(".badges")
    b.click("#clear")
    b.click('.item[data-row="3"]')
    b.until("return document.querySelector('#same-prompt') !== null && state.row === '3'")
    b.click("#same-prompt")
    b.until("return document.querySelector('#only .chip') !== null")
    assert b.text("#count").startswith("24 rollouts") and b.run("return state.prompt") == "p1"


def test_diff_and_tokens(at):
    b = at("#view=rollouts&show=tokens")
    assert b.text(".diff ins").strip() == "It is new." and b.count(".diff del") == 0
    scores = b.run("return [...document.querySelectorAll('.scores tr.reward td')].map(x => x.innerText)")
    assert scores == ["0.50", "0", "−0.50"]
    b.click('#text [data-value="plain"]')
    b.until("return document.querySelector('.diff') === null")
    b.click('#color [data-value="ratio"]')
    b.until("return document.querySelectorAll('.token').length === 6")
    assert b.count(".token.none") == 2 and b.count(".token.inserted") == 1
    b.click(".block:nth-of-type(3) .token.inserted")
    assert b.text(".readout code") == "wer"
    figures = b.text(".readout:not(.muted)").replace("\n", " ")
    assert "r 0.368" in figures and "weight 0" in figures and "advantage −0.500" in figures and "inserted" in figures
    b.keys("\ue014")  # the right arrow
    b.until("return document.querySelector('.readout code').innerText === '<|im_end|>'")


def test_words_of_a_diff(at):
    b = at()
    kept = b.run("return changes('Go by bus. Eat bread. Sleep well.', 'Go by bike. Eat bread. Sleep well. Rest.')")
    assert kept[:5] == [
        ["same", "Go by "],
        ["del", "bus"],
        ["ins", "bike"],
        ["same", "."],
        ["same", " Eat bread. Sleep well."],
    ]
    assert "".join(text for kind, text in kept if kind != "ins") == "Go by bus. Eat bread. Sleep well."
    assert "".join(text for kind, text in kept if kind != "del") == "Go by bike. Eat bread. Sleep well. Rest."
    assert b.run("return changes('', 'new')") == [["ins", "new"]] and b.run("return changes('a', 'a')") == [
        ["same", "a"]
    ]
    assert ["ins", "喝茶"] in b.run("return changes('我喜欢喝水', '我喜欢喝茶')")  # without spaces between words


def test_keyboard(at):
    b = at()
    b.keys("r")
    b.until("return state.view === 'rollouts'")
    b.keys("j")
    b.until("return state.row !== ''")
    first = b.run("return state.row")
    b.keys("j")
    b.until("return state.row !== arguments[0]", first)
    b.keys("k")
    b.until("return state.row === arguments[0]", first)
    b.keys("n")
    b.until("return state.from === '1' && state.to === '1'")
    b.keys("n")
    b.until("return state.from === '2'")
    b.keys("x")
    b.until("return state.from === ''")
    b.keys("/")
    assert b.run("return document.activeElement.id") == "q"
    b.keys("\ue00c")  # Escape
    b.keys("?")
    assert b.run("return document.getElementById('help').open") is True


def test_comparison(at):
    b = at("#view=compare")
    assert b.text(".legend").split("\n")[:2] == ["cpe", "ppo"]
    b.until("return document.querySelector('.chart canvas') !== null")
    assert b.text('.chart[data-title="Reward"] .values').split() == ["cpe", "2.20", "ppo", "2.20"]
    assert "originals solid, edits dashed" in b.text('.chart[data-title="Reward"] figcaption')
    assert b.run("return charts[0].u.axes[0].label") == "step"
    assert b.text(".by-prompt h2").endswith("4 prompts in at least two of the runs")
    b.click('.item[data-row="p1"]')
    b.until("return state.prompt === 'p1' && document.querySelectorAll('.column').length === 2")
    assert b.text(".column:nth-child(1) .said").startswith("Answer 0 of step 12")
    assert b.text(".column:nth-child(2) .said") == "An answer of the other run."
    b.click('#pair [data-value="diff"]')
    b.until("return document.querySelector('.column:nth-child(2) .diff ins') !== null")
    b.click("#next-sample")
    b.until("return document.querySelector('.column h3').innerText.includes('2 of 2')")
    b.click('#at [data-value="first"]')
    b.until("return document.querySelector('.column h3').innerText.includes('step 1,')")


def test_runs_are_smoothed_over_their_own_steps(at):
    """Over generated tokens the points of two runs lie between one another."""
    b = at("#view=compare")
    smooth = "return smoothed([0, 1, 0, 1, 0], 1).map((y) => y.toFixed(2)).join()"
    assert b.run(smooth) == "0.50,0.33,0.67,0.33,0.50"
    made_card = (
        "state.smooth = 1; "
        "const line = (xs) => ({ label: 'a', color: '--c1', dash: 0, xs, ys: [0, 1, 0], steps: [1, 2, 3] }); "
        "chartCard('t', '', [line([1, 3, 5]), line([2, 4, 6])]); charts.at(-1).draw(); "
        "return charts.at(-1).u.data.map((ys) => ys.map((y) => y ?? '-').join()).join(' ')"
    )
    xs, raw, soft, *_ = b.run(made_card).split(" ")
    assert (xs, raw, soft[:7]) == ("1,2,3,4,5,6", "0,-,1,-,0,-", "0.5,-,0")


def test_tokens_without_a_log_prob(at):
    """Those of an update that was left out have no colour."""
    b = at()
    tokens = "const tokens = { logp: [null, -6], logq: [-1, -1], weight: [null, 1], advantage: [null, 1] }; "
    for coloring in ("logp", "ratio", "weight", "advantage"):
        assert b.run(f"{tokens}return shadeOf(tokens, 0, '{coloring}')") == ["--hue-a", 0]
    assert b.run(f"{tokens}return shadeOf(tokens, 1, 'logp')") == ["--hue-a", 1]


def test_evaluation(at):
    b = at("#run=2&view=rows")
    assert b.text("#count") == "6 rows of 6"
    set_value(b, "#verdict", "win")
    b.until("return document.querySelectorAll('.item').length === 2")
    assert "model wins" in b.text(".badge.verdict") and b.count(".sides .said") == 2
    set_value(b, "#group", "a")
    b.until("return document.querySelectorAll('.item').length === 1")
    b.click('#pair [data-value="diff"]')
    b.until("return document.querySelector('.sides .diff del') !== null")
    options = "return [...document.querySelectorAll('#order option')].map((option) => option.value)"
    assert b.run(options) == ["file", "longer", "shorter", "ahead", "behind"]
    b.run("run().task = 'reward-accuracy'; set({ view: 'overview' }); set({ view: 'rows' })")
    assert b.run(options) == ["file", "ahead", "behind"]  # the others name a model and a baseline


def test_hostile_text_is_shown_as_text(at):
    b = at("#view=rollouts&from=1&to=1&row=0")
    assert b.run("return window.hacked ?? null") is None
    assert b.count("main script") == b.count("main img") == b.count("main .said b") == 0
    shown = b.text(".block .said")
    assert "</script><script>window.hacked = 1</script> <!-- <img src=x" in shown and "&lt;b&gt;" in shown
    assert (
        "null⟨U+0000⟩ line⟨U+2028⟩sep⟨U+2029⟩ ⟨U+202E⟩drow⟨U+202C⟩ ⟨U+2066⟩isolate⟨U+2069⟩".translate({0x27E8: "⟨"})
        or True
    )
    for mark in ("0000", "D800", "2028", "2029", "202E", "202C", "2066", "2069"):
        assert f"\u27e8U+{mark}\u27e9" in shown  # what can't be seen is written out
    assert not set(shown) & set("\x00\u2028\u2029\u202e\u202c\u2066\u2069")
    assert "עברית" in b.text(".question") and b.text(".persona dt") == b.text(".persona dd") == b.text(".question")


@pytest.mark.parametrize("phone", [False, True])
def test_nothing_is_wider_than_the_window(page, phone):
    size = dict(width=390, height=844) if phone else dict(width=1280, height=800)
    with Browser(**size, phone=phone) as b:
        for address in ("", "#view=rollouts&row=4", "#view=compare&prompt=p1", "#view=settings", "#run=2&view=rows"):
            b.open("/dev/null")
            b.open(page, address)
            b.until("return document.querySelector('main').children.length > 0")
            assert b.run("return document.documentElement.scrollWidth - innerWidth") <= 0, address
            assert b.run("return document.querySelector('#help-button').offsetWidth") > 0
        paper = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        assert min(b.run(paper)) > 240
        b.media(dark=True)
        assert max(b.run(paper)) < 60
        b.media(dark=True, kind="print")  # on paper always light
        assert b.run(paper) == [255, 255, 255]
        assert b.errors() == []


def test_a_large_page_opens_quickly(tmp_path, browser):
    """1,000 steps with as many rollouts as a page takes: drawn within two seconds (some 0.5 s on a quiet machine)."""
    run = rl_run(tmp_path / "run", steps=1, prompts=8, answer="A word of it. " * 60)
    rows = [json.loads(line) for line in (run / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    figures = {f"figure/{i}": 0.5 for i in range(60)}
    write_lines(run / "metrics.jsonl", [json.loads(line) | figures | {"step": step} for step in range(1, 1001)])
    for step in range(1, 1001):
        write_lines(run / "rollouts" / f"step_{step:06d}.jsonl", rows)
    html = made([run], tmp_path / "page.html")
    assert 10e6 < len(html) < 30e6
    seconds = []
    for _ in range(3):
        browser.open("/dev/null")
        began = time.perf_counter()
        browser.open(tmp_path / "page.html")
        browser.until("return document.querySelectorAll('.chart canvas').length >= 4")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
