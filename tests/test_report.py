"""report.py: what a page holds of each kind of run, how it is embedded, its warnings, its samples, its figures."""

import json
import os
import re
import shutil

import pytest
from conftest import ROOT, TEMPLATES, error_of

import report
from chat import Chat
from prompts import Templates, answer_prompt, edit_prompt, load_templates, persona_text
from reporting import figures, training_runs
from reporting.evaluations import evaluation_run
from reporting.warnings import rl_warnings
from weights import save_templates

HOSTILE = (
    "</script><script>window.hacked = 1</script> <!-- <img src=x onerror='window.hacked = 1'> &lt;b&gt; "
    "null\x00 line\u2028sep\u2029 \u202edrow\u202c \u2066isolate\u2069 \ud800 <b>bold</b> עברית"
)
PERSONA = {"name": "Ada Novak", "food": "vegan"}


def response(answer, reward, **more):
    scores = dict(critique="Say more.", helpfulness=0, personalization=1, naturalness=-2)
    return dict(answer=answer, reward=reward, **scores, n_tokens=len(answer.split()), truncated=False, **more)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_run(folder, steps=12, hostile=None, samples=2, prompts=3, answer=None):
    """A run of PPO with critique-post-edit as ppo_cpe.py leaves it, without weights."""
    args = dict(
        edit_rate=0.5, edit_loss="unclipped", max_steps=steps, judge="out/grm/model", lr=1e-6, inputs={"--model": "f00"}
    )
    args["non_default"] = ["edit_loss", "max_steps"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(args))
    lines = []
    for step in range(1, steps + 1):
        figures = {"original/reward": 1 + 0.1 * step, "edit/reward": 2.0, "edit/gain": 1 - 0.1 * step, "entropy": 1.0}
        figures |= {"edit/improved": 0.5, "edit/worse": 0.1}
        figures |= {"original/length": 20.0 + step, "judge_calls": 10, "judge_unparsed": 0, "generated_tokens": 500}
        lines.append({"step": step, **figures, "own/figure": step, "seconds/rollout": 2.0, "seconds/update": 1.0})
        rows = []
        for p in range(prompts):
            prompt = dict(prompt_id=f"p{p}", persona=PERSONA, question=f"What about topic {p}?", source="test")
            for sample in range(samples):
                text = answer or f"Answer {sample} of step {step} to {p}: eat vegan food."
                edit = response(f"{text} It is new.", 1.0 * sample, selected=sample == 0)
                rows.append({**prompt, "sample_id": sample, **response(text, 0.5), "edit": edit})
        if hostile:
            rows[0]["question"] = rows[0]["answer"] = rows[0]["critique"] = rows[0]["edit"]["answer"] = hostile
            rows[0]["persona"] = {hostile: hostile}
        write_lines(folder / "rollouts" / f"step_{step:06d}.jsonl", rows)
    write_lines(folder / "metrics.jsonl", lines)
    tokens = dict(text=["Ans", "wer", "<|im_end|>"], logp=[-0.1, -2.0, -0.5], logq=[-0.2, -1.0, -0.5])
    tokens |= dict(weight=[1.1, 0.0, 1.0], advantage=[0.5, -0.5, 0.1])
    one = dict(prompt_id="p1", sample_id=0, edit=False, **tokens)
    write_lines(folder / "tokens" / "step_000001.jsonl", [one, one | dict(edit=True, kept=[True, False, True])])
    lost = dict(prompt_id="p9", persona=PERSONA, question="Lost?", source="other", sample_id=0)
    lost |= dict(answer="Nobody could judge it.", reward=None, n_tokens=4, truncated=False, drop_reason="unparsable")
    cut = dict(answer="Too lo", reward=None, n_tokens=2, truncated=True, drop_reason="cut off at --max-new-tokens")
    of_edit = dict(prompt_id="p2", persona=PERSONA, question="What about topic 2?", sample_id=1, edit=cut)
    write_lines(folder / "lost" / "step_000002.jsonl", [lost | {"edit": None}, of_edit])
    return folder


def made(folders, out, **more):
    report.main(report.Args(run=str(folders[0]), compare=tuple(map(str, folders[1:])), out=str(out), **more))
    return out.read_text()


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_a_page_holds_what_the_run_left(tmp_path, capsys):
    run = rl_run(tmp_path / "cpe")
    last = run / "rollouts" / "step_000012.jsonl"
    last.write_text(last.read_text().replace("of step 12 to 2", "<critique> to 2"))
    html = made([run], run / "report.html")
    assert "72 rollouts" not in html and "73 rollouts" in capsys.readouterr().out  # 12 steps x 6, and a lost one
    (found,) = data_of(html)["runs"]
    assert found["label"] == "PPO with critique-post-edit" and found["sampled"] == {"shown": 73, "of": 73}
    rows = found["rows"]
    assert rows[0]["answer"].startswith("Answer 0 of step 1") and rows[0]["helpfulness"] == 0  # a zero is a score
    assert rows[0]["edit"]["selected"] and "selected" not in rows[1]["edit"]
    prompt = dict(persona=PERSONA, persona_text="name: Ada Novak\nfood: vegan", question="What about topic 0?")
    assert found["prompts"]["p0"] == prompt | dict(topic="test")
    (lost,) = [r for r in rows if r.get("drop_reason")]
    assert lost["drop_reason"] == "unparsable" and "reward" not in lost
    (cut,) = [r for r in rows if r.get("edit", {}).get("drop_reason")]
    assert (cut["step"], cut["prompt"], cut["sample"]) == (2, "p2", 1) and cut["reward"] == 0.5
    (tokens,) = [r for r in rows if "tokens" in r]
    assert (tokens["step"], tokens["prompt"]) == (1, "p1") and tokens["tokens"]["weight"] == [1.1, 0, 1]
    assert tokens["edit"]["tokens"]["kept"] == [True, False, True]
    assert rows[0]["recited"] == 0.5  # "vegan", not the name
    panels = {p["title"]: p for p in found["panels"]}
    assert panels["Reward"]["series"] == [["original/reward", "originals"], ["edit/reward", "edits"]]
    assert panels["own/figure"]["section"] == "Other metrics"  # a fork's own metrics get a curve
    assert found["metrics"]["original/length"][:2] == [21, 22]
    leaked = [(r["step"], r["prompt"], r["edit"]["control_text"]) for r in rows if "control_text" in r]
    assert leaked == [(12, "p2", True)] * 2
    assert found["templates"] is None  # there is no checkpoint yet


def test_a_page_has_the_prompts_as_the_policy_read_them(tiny, tmp_path):
    run = rl_run(tmp_path / "cpe", steps=1)
    policy = shutil.copytree(tiny / "checkpoint", run / "policy")
    save_templates(Templates(**TEMPLATES).texts("answer", "edit"), str(policy))
    (found,) = data_of(made([run], tmp_path / "page.html"))["runs"]
    row = {"persona": PERSONA | {"likes": ["{question}", "<|im_end|>"]}, "question": "What to {eat}? Nothing!"}
    texts = dict(persona=persona_text(row["persona"]), question=row["question"], answer="Some bread.", critique="More.")

    def filled(template):  # as the page does
        return re.sub(r"\{(persona|question|answer|critique)\}", lambda match: texts[match[1]], template)

    chat, templates = Chat(str(policy)), load_templates(str(policy))
    prompt = answer_prompt(chat, templates, row)
    assert filled(found["templates"]["prompt"]) == chat.decode(prompt)
    edit = edit_prompt(chat, templates, prompt, chat.encode(texts["answer"]), texts["critique"])
    assert filled(found["templates"]["prompt"] + found["templates"]["edit"]) == chat.decode(edit)


def test_the_page_needs_no_network(tmp_path):
    html = made([rl_run(tmp_path / "run")], tmp_path / "page.html")
    assert "default-src 'none'" in html
    code = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", code) and "@import" not in code
    with open(os.path.join(ROOT, "reporting", "page", "vendor", "README.md")) as f:
        table = f.read()
    for name, version in (("uPlot.iife.min.js", "1.6.32"), ("diff.min.js", "9.0.0")):
        assert name in table and version in table


def test_hostile_text_stays_text(tmp_path):
    """In the file nothing but the two escapes of its own ends the element that holds the data."""
    html = made([rl_run(tmp_path / "run", hostile=HOSTILE)], tmp_path / "page.html")
    begin = html.index('id="data">') + len('id="data">')
    data = html[begin : html.index("</script>", begin)]
    assert not set(data) & set("<>&\u2028\u2029\x00") and "\ud800" not in data
    (found,) = data_of(html)["runs"]
    row = found["rows"][0]
    assert row["answer"] == row["critique"] == row["edit"]["answer"] == HOSTILE
    assert found["prompts"]["p0"]["persona"] == {HOSTILE: HOSTILE}
    named = rl_run(tmp_path / "<b>run & co")  # a folder's name is the title
    assert "<title>&lt;b&gt;run &amp; co</title>" in made([named], tmp_path / "named.html")


def test_a_run_that_goes_on(tmp_path):
    """Half a line at the end of a file, rows of a step that will be run again, no step yet."""
    run = rl_run(tmp_path / "run", steps=3)
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(metrics[:2]) + '{"step": 3, "orig')
    (found,) = data_of(made([run], tmp_path / "page.html"))["runs"]
    assert found["metrics"]["step"] == [1, 2] and {r["step"] for r in found["rows"]} == {1, 2}
    (run / "metrics.jsonl").unlink()
    (found,) = data_of(made([run], tmp_path / "page.html"))["runs"]
    assert found["rows"] == [] and found["metrics"] == {}


def test_what_is_no_run_is_refused(tmp_path, capsys):
    rl_run(tmp_path / "out" / "cpe")
    line = error_of(report, capsys, tmp_path / "out")
    assert "args.json" in line and line.endswith(f"it holds runs: {tmp_path}/out/cpe")
    assert "--out" in error_of(report, capsys, tmp_path / "out" / "cpe", "--out", tmp_path)
    (tmp_path / "out" / "cpe" / "rollouts" / "step_000001.jsonl").write_text(
        json.dumps(dict(prompt_id="a", sample_id=0, answer="b")) + "\nno json\n{}\n"
    )
    assert "step_000001.jsonl:2: not JSON" in error_of(report, capsys, tmp_path / "out" / "cpe")


def steady(**changes):
    """20 steps of a healthy run; changes: functions of the step."""
    figures = {"original/length": 30, "original/reward": 1, "exact/original": 1, "edit/gain": 1, "edit/improved": 0.8}
    figures |= {
        "edit/worse": 0.1,
        "judge_calls": 100,
        "judge_unparsed": 1,
        "train_inference_mismatch": 1e-3,
        "value_loss": 1,
    }
    figures |= {"explained_variance": 0.5, "entropy": 1, "original/recited": 0.1, "edit/inserted_ratio": 0.9}
    figures |= {"original/control_text": 0, "bad_steps": 0}
    changed = {name.replace("__", "/"): f for name, f in changes.items()}
    return [{"step": s, **figures, **{n: f(s) for n, f in changed.items()}} for s in range(1, 21)]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("Length", dict(original__length=lambda s: 30 + 2 * s)),
        ("Reward hacking", dict(original__reward=lambda s: s, exact__original=lambda s: -abs(s - 10))),
        ("Edits no better", dict(edit__gain=lambda s: 1 - s / 18)),
        ("Judge failures", dict(judge_unparsed=lambda s: s)),
        ("Train-inference mismatch", dict(train_inference_mismatch=lambda s: s / 100)),
        ("Ratio on inserted tokens", dict(edit__inserted_ratio=lambda s: s / 2)),
        ("Value loss", dict(value_loss=lambda s: 1 + s, explained_variance=lambda s: 0.5 - s / 10)),
        ("Entropy", dict(entropy=lambda s: 1 / s)),
        ("Control text", dict(original__control_text=lambda s: 0.05 * (s == 3))),
        ("Updates left out", dict(bad_steps=lambda s: s > 12)),
        ("Persona values repeated", dict(original__recited=lambda s: 0.1 + s / 100)),
    ],
)
def test_each_warning_has_its_rule(name, changes):
    assert {warning["state"] for warning in rl_warnings(steady())} == {"ok"}
    metrics = steady(**changes)
    found = {warning["name"]: warning for warning in rl_warnings(metrics)}
    assert [n for n, warning in found.items() if warning["state"] == "warn"] == [name]
    steps = None if name in ("Control text", "Persona values repeated") else [17, 20]  # these look at the whole run
    assert found[name]["rule"].endswith(".") and found[name]["found"] and found[name]["link"]["steps"] == steps
    assert all(warning["rule"].startswith("Raised if") for warning in found.values())  # no statement about this run


def test_a_lost_edit_of_a_held_out_answer_stands_in_its_row(tmp_path):
    run = rl_run(tmp_path / "run", steps=1)
    rows = [json.loads(line) for line in (run / "rollouts/step_000001.jsonl").read_text().splitlines()]
    lost = {name: rows[0][name] for name in ("prompt_id", "persona", "question", "sample_id")}
    lost["edit"] = {"answer": "tea", "reward": None, "drop_reason": "unparsed"}
    rows[0]["edit"] = None
    write_lines(run / "held_out/step_000001.jsonl", [*rows, lost])
    sampled, n_logged, _ = training_runs.read_rollouts(str(run), 1, 1e6, 1)
    held_out = [row for row in sampled if row["held_out"]]
    assert len(held_out) == len(rows) == n_logged / 2 and lost["edit"] in [row["edit"] for row in held_out]


def test_a_warning_by_held_out_rewards_that_are_few():
    """Held-out prompts are judged in some steps: the fifths without them are left out."""
    held_out = {2: 1.0, 7: 2.0, 17: 1.2}  # nothing in two of the fifths
    metrics = [{k: v for k, v in row.items() if k != "exact/original"} for row in steady(original__reward=lambda s: s)]
    for step, reward in held_out.items():
        metrics[step - 1]["held_out/original/reward"] = reward
    (warning,) = [warning for warning in rl_warnings(metrics) if warning["name"] == "Reward hacking"]
    assert warning["state"] == "warn" and "held-out reward 1.00, best 2.00, last 1.20" in warning["found"]


def test_noise_of_a_judge_is_no_hacking():
    """Held-out rewards that stay where they are differ by less than 0.3."""
    noise = [0.0, 0.1, -0.1, 0.15, -0.1]
    metrics = steady(original__reward=lambda s: s, exact__original=lambda s: noise[(s - 1) // 4])
    assert {warning["state"] for warning in rl_warnings(metrics)} == {"ok"}


def test_a_warning_leads_to_the_steps_that_it_is_about():
    metrics = [row if row["step"] <= 12 else row | {"edit/gain": None} for row in steady(edit__gain=lambda s: 0.01)]
    (warning,) = [warning for warning in rl_warnings(metrics) if warning["name"] == "Edits no better"]
    assert warning["state"] == "warn" and warning["link"]["steps"] == [9, 12]


def test_warnings_of_what_was_not_measured_or_is_short():
    metrics = [{k: v for k, v in row.items() if not k.startswith(("edit/", "exact/"))} for row in steady()]
    states = {warning["name"]: warning["state"] for warning in rl_warnings(metrics)}
    assert states["Edits no better"] == states["Reward hacking"] == "none" and states["Length"] == "ok"
    assert rl_warnings(steady()[:9]) == []


def test_supervised_runs(tmp_path):
    run = tmp_path / "grm"
    run.mkdir()
    (run / "args.json").write_text(json.dumps(dict(objective="grm", lr=1e-4)))
    losses = [0.5, 0.4, 0.45]
    write_lines(run / "metrics.jsonl", [dict(step=s, loss=1 / (s + 1), held_out_loss=x) for s, x in enumerate(losses)])
    label = dict(critique="Say it.", helpfulness=1, personalization=2, naturalness=3)
    row = dict(prompt_id="a", persona="likes tea", question="Q?", answer="Drink tea.", **label)
    judged = [
        label,
        label | dict(helpfulness=0),
        dict(critique="", helpfulness=5, personalization=5, naturalness=5),
        None,
    ]
    write_lines(run / "held_out.jsonl", [row | {"judged": j} for j in judged])
    (found,) = data_of(made([run], tmp_path / "page.html"))["runs"]
    assert found["label"] == "Generative reward model" and [p["title"] for p in found["panels"]] == ["Loss"]
    assert [j["verdict"] for j in found["judgements"]] == ["win", "tie", "loss", "none"]
    assert [side["title"] for side in found["judgements"][0]["sides"]] == ["label", "this model"]
    assert [(warning["name"], warning["state"]) for warning in found["warnings"]] == [("Overfitting", "warn")]
    for args, label in ((dict(beta=0.2), "DPO"), (dict(objective="bt"), "Bradley-Terry reward model")):
        (run / "args.json").write_text(json.dumps(args))
        assert data_of(made([run], tmp_path / "page.html"))["runs"][0]["label"] == label


def test_evaluations(tmp_path):
    """One folder of each task: who won, by what, and both sides' texts."""

    def folder(task, results=None, **files):
        out = tmp_path / task
        out.mkdir()
        (out / "results.json").write_text(json.dumps({"args": {"task": task}, **(results or {})}))
        for name, rows in files.items():
            write_lines(out / f"{name}.jsonl", rows)
        return out

    prompt = dict(prompt_id="a", persona=PERSONA, question="Q?")
    verdict = dict(reward=1.0, helpfulness=1, personalization=1, naturalness=1, critique="Fine.")
    low = verdict | dict(reward=0.5)
    answers = dict(answers_model=[prompt | dict(answer="Long answer.", n_tokens=3)])
    answers["answers_baseline"] = [prompt | dict(answer="Short.", n_tokens=2)]
    out = folder("win-rate", verdicts=[dict(side="model", prompt_id="a", **verdict)], **answers)
    shared = dict(prompt_id="a", instruction="i", output_1="Short.", output_2="Long answer.", group="g", failure=None)
    annotations = [shared | dict(preference=2.0), shared | dict(preference=1.5), shared | dict(preference=None)]
    (out / "annotations.json").write_text(json.dumps(annotations))
    rows = evaluation_run(str(out))["rows"]
    assert [r["verdict"] for r in rows] == ["win", "tie", "none"] and rows[0]["gap"] == 6
    assert rows[0]["sides"][0]["answer"] == "Long answer." and rows[0]["sides"][0]["reward"] == 1.0
    assert rows[0]["sides"][1]["answer"] == "Short." and rows[0]["persona"] == PERSONA and rows[0]["group"] == "g"

    verdicts = [low | {"side": "chosen"}, verdict | {"side": "rejected"}]
    pair = dict(**prompt, chosen="Good one.", rejected="Bad.", outcome=0.0, verdicts=verdicts)
    (row,) = evaluation_run(str(folder("reward-accuracy", verdicts=[pair])))["rows"]
    assert row["verdict"] == "loss" and [s["answer"] for s in row["sides"]] == ["Good one.", "Bad."]
    assert [s["reward"] for s in row["sides"]] == [0.5, 1.0]

    swap = dict(prompt_id="a", persona={"name": "Kim"}, own=verdict, swapped=low)
    (row,) = evaluation_run(str(folder("persona-swap", verdicts=[swap], **answers)))["rows"]
    assert row["verdict"] == "win" and row["sides"][1]["persona"] == {"name": "Kim"}

    choice = dict(prompt_id="a", question="Which?", options=list("wxyz"), correct="c", question_type="t", answer="(a)")
    replies = [dict(right=0.0), dict(right=None), dict(right=None, answer=None)]  # the last: no reply
    row, *others = evaluation_run(str(folder("personamem", choices=[choice | reply for reply in replies])))["rows"]
    assert row["verdict"] == "loss" and row["sides"][1]["answer"] == "y" and row["note"] is None
    assert [(r["verdict"], r["note"]) for r in others] == [("loss", "no letter"), ("none", None)]
    html = made([out, tmp_path / "persona-swap"], tmp_path / "page.html")
    assert [r["name"] for r in data_of(html)["runs"]] == ["win-rate", "persona-swap"]


def test_a_sample_keeps_what_matters(tmp_path):
    """Of more rollouts than fit each step keeps its extremes, and prompts that come again come again."""
    run = rl_run(tmp_path / "run", steps=10, samples=5, prompts=40)
    for step in (1, 5, 10):
        file = run / "rollouts" / f"step_{step:06d}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[77]["edit"]["reward"], rows[78]["edit"]["reward"], rows[79]["n_tokens"] = 5.0, -5.0, 999
        write_lines(file, rows)
    html = made([run], tmp_path / "page.html", max_mb=0.2)
    assert len(html) < 0.5e6
    (found,) = data_of(html)["runs"]
    shown = found["sampled"]["shown"]
    assert (
        shown == len(found["rows"]) < found["sampled"]["of"] == 10 * 200
    )  # p9, which is lost in other tests, is one of these prompts
    for step in (1, 5, 10):
        rows = [r for r in found["rows"] if r["step"] == step]
        assert 5 < len(rows) < 60
        assert {(r["prompt"], r["sample"]) for r in rows} >= {("p15", 2), ("p15", 3), ("p15", 4)}
    of_step = [{r["prompt"] for r in found["rows"] if r["step"] == s} for s in (2, 3, 4)]
    assert len(of_step[0] & of_step[1] & of_step[2]) >= 2


def test_a_large_run_makes_a_page_of_a_size(tmp_path):
    """1,000 steps: below 30 MB from ten times as much. One step's file stands in for all of them, to be quick."""
    run = rl_run(tmp_path / "run", steps=1, prompts=40, answer="A word of it. " * 60)
    first = run / "rollouts" / "step_000001.jsonl"
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    lines = [json.dumps(json.loads(line) | {"step": step}) + "\n" for step in range(1, 1001)]
    (run / "metrics.jsonl").write_text("".join(lines))
    for step in range(2, 1001):
        os.link(first, run / "rollouts" / f"step_{step:06d}.jsonl")
    html = made([run], tmp_path / "page.html")
    assert 10e6 < len(html.encode()) < 30e6
    (found,) = data_of(html)["runs"]
    assert len({r["step"] for r in found["rows"]}) == 1000  # each step is there
    assert found["sampled"] == {"shown": len(found["rows"]), "of": 80 * 1000}


def test_figures(tmp_path):
    runs = [rl_run(tmp_path / name) for name in ("a", "b")]
    made(runs, tmp_path / "page.html", figures=str(tmp_path / "figures"))
    names = [f"by_{x}.{end}" for x in ("generated_tokens", "judge_calls", "step") for end in ("png", "svg")]
    assert sorted(os.listdir(tmp_path / "figures")) == sorted(names)
    assert (tmp_path / "figures" / "by_step.png").read_bytes().startswith(b"\x89PNG")


def test_figures_show_what_any_of_the_runs_has(tmp_path, monkeypatch):
    """PPO has no edits: the curves of CPE's are drawn nevertheless, whichever run comes first."""
    runs = [rl_run(tmp_path / name, steps=3) for name in ("cpe", "ppo")]
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    write_lines(runs[1] / "metrics.jsonl", [{k: v for k, v in x.items() if not k.startswith("edit/")} for x in lines])
    drawn = {}
    monkeypatch.setattr(figures, "draw_panel", lambda axis, panel, runs, x: drawn.update({panel["title"]: panel}))
    for order in runs, runs[::-1]:
        drawn.clear()
        made(order, tmp_path / "page.html", figures=str(tmp_path / "figures"))
        assert [name for name, _ in drawn["Reward"]["series"]] == ["original/reward", "edit/reward"]
        assert "Gain of edits" in drawn


def test_training_never_imports_it():
    for name in os.listdir(ROOT):
        if name.endswith(".py") and name != "report.py":
            with open(os.path.join(ROOT, name)) as f:
                assert not re.search(r"^\s*(import|from) report", f.read(), re.M), name


def test_names_tell_runs_apart(tmp_path):
    runs = [rl_run(tmp_path / name) for name in ("x/cpe", "y/cpe", "x/ppo")]
    found = report.read_runs(list(map(str, runs)), 20)
    assert [r["name"] for r in found] == ["x/cpe", "y/cpe", "ppo"]


def test_exact_scores(tmp_path):
    """--exact-judge: a function of row and answer, whose score or Judgement stands beside the rewards."""
    (tmp_path / "truth.py").write_text(
        "from prompts import Judgement\n"
        "def score(row, answer):\n    return len(answer) + len(row['question'])\n"
        "def judgement(row, answer):\n    return Judgement('Fine.', 1, 2, 3)\n"
    )
    run = rl_run(tmp_path / "run", steps=2)
    html = made([run], tmp_path / "page.html", exact_judge=f"{tmp_path}/truth.py:score")
    (found,) = data_of(html)["runs"]
    row = found["rows"][0]
    assert row["exact"] == len(row["answer"]) + len(found["prompts"][row["prompt"]]["question"])
    assert found["metrics"]["exact/gain"] == [len(" It is new.")] * 2 and row["edit"]["exact"] == row["exact"] + 11
    (found,) = report.read_runs([str(run)], 20, f"{tmp_path}/truth.py:judgement")
    assert found["metrics"]["exact/original"] == [0.35 + 0.8 + 0.75] * 2
    args = json.loads((run / "args.json").read_text()) | {"score_weights": [0, 0, 1]}
    (run / "args.json").write_text(json.dumps(args))
    (found,) = report.read_runs([str(run)], 20, f"{tmp_path}/truth.py:judgement")
    assert found["metrics"]["exact/original"] == [3] * 2
    assert "exact/original" not in report.read_runs([str(run)], 20)[0]["metrics"]


def test_answers_without_an_exact_score(tmp_path):
    """Their place stays empty, and means are over the others."""
    text = (
        "def score(row, answer):\n    return None if 'Answer 0' in answer else float('nan') if 'new' in answer else 2\n"
    )
    (tmp_path / "some.py").write_text(text)
    (found,) = report.read_runs([str(rl_run(tmp_path / "run", steps=2))], 20, f"{tmp_path}/some.py:score")
    assert found["metrics"]["exact/original"] == [2, 2] and "exact/gain" not in found["metrics"]
    assert {row.get("exact") for row in found["rows"]} == {2, None}
