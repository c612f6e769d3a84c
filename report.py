"""Run folders in, one HTML page out: what a run said, what was criticised and edited, and how its figures moved.

The page is one file that needs no network; it can be made while the run goes on, and made again later (its address
keeps the place). It holds rollouts with critiques and edits as word-level diffs, their tokens by log-prob, ratio,
weight and advantage (`ppo_cpe.py --log-tokens`), curves of everything in metrics.jsonl, and lights that warn by a rule
in words; of evaluations the answers of both sides; of annotated data its quality sheet (data/quality.py). Of many
rollouts it has a sample of each step, and says so.

    python report.py out/ppo_cpe                                    # out/ppo_cpe/report.html
    python report.py out/ppo_cpe --compare out/ppo out/evaluate     # more runs, side by side by prompt
    python report.py out/ppo_cpe --compare out/ppo --figures out/figures    # the curves as PNG and SVG, too
"""

from dataclasses import dataclass

import tyro

from runtime import flags


@dataclass(kw_only=True)
class Args:
    run: tyro.conf.Positional[str]
    """Folder that a training script, evaluate.py or data/annotate.py wrote."""
    compare: tuple[str, ...] = ()
    """More such folders, for the same page."""
    out: str | None = None
    """File of the page; none: RUN/report.html."""
    figures: str | None = None
    """Folder for the curves of all runs as by_step.png, by_step.svg and so on."""
    max_mb: flags.Positive = 20
    """Megabytes of rollouts in the page, over all runs; of more a sample is taken."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take a moment

import glob
import itertools
import json
import math
import os
import re
import time
import zlib
from collections import defaultdict
from typing import Any

from reporting.evaluations import VERDICTS, annotation_run, evaluation_run, judgement_pair
from reporting.folders import DIMENSIONS, read_lines, read_object, rows_of
from reporting.lights import held_out_light, lights
from reporting.old_names import FLAG_NAMES, METRIC_NAMES, renamed
from runtime.rows import SURROGATE, step_files, write_text

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reporting", "page")


# -- what is drawn -----------------------------------------------------------------------------------------------------

# section: {title: ({metric: label}, what it means)}; a metric that no panel names gets its own, last
PANELS = {
    "Quality": {
        "Reward": ({"original/reward": "answers", "edit/reward": "edits"}, "By the judge of the run."),
        "Held-out reward": (
            {"held_out/original/reward": "answers", "held_out/edit/reward": "edits"},
            "By the same judge, on prompts that are not trained on (--eval-data).",
        ),
        "Exact score": (
            {"exact/original": "answers", "exact/edit": "edits"},
            "By the generated world's own rules, which no training sees; of at most 64 answers a step.",
        ),
        "Helpfulness": ({"original/helpfulness": "answers", "edit/helpfulness": "edits"}, "From -5 to 5."),
        "Personalization": ({"original/personalization": "answers", "edit/personalization": "edits"}, "From -5 to 5."),
        "Naturalness": ({"original/naturalness": "answers", "edit/naturalness": "edits"}, "From -5 to 5."),
        "Length": (
            {"original/length": "answers", "edit/length": "edits", "lost/length": "judgement failed"},
            "Tokens of a response.",
        ),
        "Recitation": (
            {"original/recited": "answers", "edit/recited": "edits"},
            "Share of the profile's values that a response repeats word for word.",
        ),
        "Distinct pairs of words": (
            {"original/distinct_2": "answers", "edit/distinct_2": "edits"},
            "Over all pairs of 32 answers: low where answers are all alike.",
        ),
        "Persona swap": (
            {"held_out/swap": "lost under another profile"},
            "Held-out reward less that under another person's profile: near 0 where answers are generic.",
        ),
        "Audit": ({"audit/own": "own judge", "audit/second": "second judge"}, "The same answers (--audit-share)."),
        "Audit noise": ({"audit/noise": "|difference|"}, "Of two judgements of the same answer."),
    },
    "Edits": {
        "Gain of edits": (
            {"edit/gain": "training", "held_out/edit/gain": "held out", "exact/gain": "exact"},
            "Reward of an edit less that of its answer.",
        ),
        "Edits better and worse": ({"edit/improved": "better", "edit/worse": "worse"}, "Shares of all edits."),
        "Ratio r": (
            {"edit/kept_ratio": "kept", "edit/inserted_ratio": "inserted", "edit/branch_ratio": "branches"},
            "Policy over what sampled the edit, mean per token; a branch is inserted with p below 0.1.",
        ),
        "Gradient mass": (
            {"edit/kept_mass": "kept", "edit/inserted_mass": "inserted", "edit/branch_mass": "branches"},
            "|weight x advantage|, mean per token of edits.",
        ),
        "Without gradient": (
            {"edit/kept_clipfrac": "kept", "edit/inserted_clipfrac": "inserted", "original/clipfrac": "answers"},
            "Share of tokens whose weight is 0.",
        ),
        "Critique credit": ({"sdpo/credit": "mean", "sdpo/credit_size": "size"}, "Of a token, --edit-ratio sdpo."),
    },
    "Optimization": {
        "Loss": (
            {"loss": "training", "held_out_loss": "held out", "sft_loss": "SFT term"},
            "Mean over what is trained.",
        ),
        "Accuracy": (
            {"accuracy": "training", "held_out_accuracy": "held out"},
            "Chosen above rejected, ties left out.",
        ),
        "Margin": ({"margin": "training", "held_out_margin": "held out"}, "Chosen less rejected."),
        "Rewards of pairs": ({"chosen_reward": "chosen", "rejected_reward": "rejected"}, "By the model."),
        "Log-probs of pairs": ({"chosen_logprob": "chosen", "rejected_logprob": "rejected"}, "Of whole answers."),
        "Learning rate": ({"lr": "learning rate"}, "With warm-up and decay."),
        "KL": ({"original/approx_kl": "answers"}, "From the policy that sampled, mean of r - 1 - log r."),
        "Entropy": ({"entropy": "entropy"}, "Of the next token, nats."),
        "Policy loss": ({"policy_loss": "policy"}, "Mean over trained tokens."),
        "Value loss": ({"value_loss": "critic"}, "Mean over trained tokens."),
        "Explained variance": ({"explained_variance": "critic"}, "Of the returns by the values; 1 is all of it."),
        "Gradient norm": (
            {"grad_norm_policy": "policy", "grad_norm_critic": "critic", "grad_norm": "model"},
            "Before clipping.",
        ),
        "Trainer against engine": (
            {"logprob_gap": "mean", "logprob_gap_max": "largest", "refresh_gap": "after a refresh"},
            "|difference| of the log-probs of the same tokens under the same weights.",
        ),
        "Judge failures": (
            {"judge_unparsed": "unparsed", "lost/originals": "lost answers", "lost/edits": "lost edits"},
            "A step's number of judgements that were none; responses that left the batch for want of one.",
        ),
    },
    "Machine": {
        "Tokens per second": (
            {
                "generated_tokens_per_second": "generated",
                "trained_tokens_per_second": "trained",
                "tokens_per_second": "trained",
            },
            "Over all ranks.",
        ),
        "Seconds by phase": (
            {f"seconds/{phase}": phase for phase in ("rollout", "update", "score", "diagnostics", "refresh")}
            | {"seconds": "step"},
            "Of a step.",
        ),
        "Memory": ({"peak_memory_gib": "peak"}, "GiB, the most that a rank held."),
        "Model FLOPs utilization": ({"mfu": "score and update"}, "Share of the device's peak."),
    },
}
OTHER = "Other metrics"
AXES = {"step": None, "generated tokens": "generated_tokens", "judge calls": "judge_calls", "trained tokens": "tokens"}


# -- reading a run folder ----------------------------------------------------------------------------------------------


def kind_of(folder: str) -> str:
    """rl | grm | bt | dpo | sft | evaluation | annotation. ValueError: nothing of that."""
    if os.path.isfile(os.path.join(folder, "args.json")):
        args = read_object(os.path.join(folder, "args.json"))
        if "edit_rate" in args or os.path.isdir(os.path.join(folder, "rollouts")):
            return "rl"
        return args.get("objective") or ("dpo" if "beta" in args else "sft")
    if os.path.isfile(os.path.join(folder, "results.json")):
        return "evaluation"
    if os.path.isfile(os.path.join(folder, "annotation.json")):
        return "annotation"
    inside = glob.glob(os.path.join(glob.escape(folder), "*", "args.json"))
    hint = f"; it holds runs: {', '.join(sorted(map(os.path.dirname, inside)))}" if inside else ""
    raise ValueError(f"{folder}: expected a run's args.json, an evaluation's results.json or an annotation.json{hint}")


KINDS = {"grm": "Generative reward model", "bt": "Bradley-Terry reward model", "dpo": "DPO", "sft": "SFT"}


def kind_text(kind: str, args: dict) -> str:
    if kind == "rl":
        if not args.get("edit_rate"):
            return "PPO"
        return "PPO with critique credit" if args.get("edit_loss") == "sdpo" else "PPO with critique-post-edit"
    return "Pretraining from scratch" if args.get("from_scratch") else KINDS.get(kind, kind)


# -- rollouts ----------------------------------------------------------------------------------------------------------


class Budget:
    """Lets through as many bytes as its share of what comes, evenly over all that comes."""

    def __init__(self, share: float):
        self.share, self.credit = share, 0.0

    def earn(self, size: int) -> None:
        self.credit += self.share * size

    def spend(self, size: int) -> bool:
        allowed = self.share >= 1 or self.credit >= size
        if allowed:
            self.credit -= size
        return allowed


def by_interest(rows: list[dict]) -> list[int]:
    """Indices of a step's rows, those that a sample should not lack first.

    The most improved, most worsened and longest, those with tokens, one that left the batch, one that was cut off; then
    by prompt, in an order that is the same in every step, so that prompts which come again are kept again.
    """

    def gain(i):
        edit = rows[i].get("edit")
        known = edit and edit.get("reward") is not None and rows[i].get("reward") is not None
        return edit["reward"] - rows[i]["reward"] if known else None

    gains = sorted((i for i in range(len(rows)) if gain(i) is not None), key=gain)
    longest = max(range(len(rows)), key=lambda i: rows[i].get("n_tokens") or 0, default=None)
    firsts = [*gains[-1:], *gains[:1], *([] if longest is None else [longest])]
    for name in ("tokens", "left", "truncated"):
        have = [i for i, row in enumerate(rows) if row.get(name) or (row.get("edit") or {}).get(name)]
        firsts += have if name == "tokens" else have[:1]
    rest = sorted(range(len(rows)), key=lambda i: (zlib.crc32(str(rows[i].get("prompt_id")).encode()), i))
    return list(dict.fromkeys(firsts + rest))


def renamed_rollout(row: dict) -> dict:
    row = renamed(row, METRIC_NAMES)
    if row.get("edit"):
        row["edit"] = renamed(row["edit"], METRIC_NAMES)
    return row


SAMPLE = ("prompt_id", "sample_id")  # what a response belongs to


def attach(row: dict, part: dict, is_edit: bool) -> None:
    if not is_edit:
        row["tokens"] = part
    elif row.get("edit"):
        row["edit"]["tokens"] = part


def add_tokens(file: str, rows: list[dict], places: dict[tuple, int], budget: Budget) -> None:
    """Puts OUT/tokens of a step into its rows, as far as the budget goes: row["tokens"], row["edit"]["tokens"].

    places: {(prompt_id, sample_id): index into rows}.
    """
    of_sample = defaultdict(list)
    for line, tokens in read_lines(file, (*SAMPLE, "edit")):
        budget.earn(len(line))
        of_sample[tuple(tokens.pop(name) for name in SAMPLE)].append((len(line), tokens.pop("edit"), tokens))
    for sample, parts in of_sample.items():
        if sample in places and budget.spend(sum(size for size, *_ in parts)):
            for _, is_edit, tokens in parts:
                attach(rows[places[sample]], tokens, is_edit)


def add_lost(file: str, rows: list[dict], sizes: list[int], places: dict[tuple, int]) -> None:
    """Puts OUT/lost of a step into its rows: an answer as a row of its own, an edit into that of its answer."""
    for line, lost in read_lines(file, SAMPLE):
        row = renamed_rollout(lost)
        i = places.get(tuple(row[name] for name in SAMPLE))
        if i is None:
            rows.append(row)
            sizes.append(len(line))
        else:
            rows[i] = rows[i] | {"edit": row["edit"]}


def read_rollouts(folder: str, last_step: int, max_bytes: float) -> tuple[list[dict], dict[str, int], dict[int, list]]:
    """A sample of a run's rollouts -> (rows with step and held_out, {"shown", "of"}, {step: its first 64 rows}).

    A quarter of max_bytes is for tokens. Rows of steps after last_step (of a run that was killed and will do them
    again) are left out.
    """
    files = {
        kind: {step: file for step, file in step_files(folder, kind) if step <= last_step}
        for kind in ("rollouts", "held_out", "lost", "tokens")
    }
    size = {kind: sum(map(os.path.getsize, files[kind].values())) for kind in files}
    budget = Budget(0.75 * max_bytes / max(1, size["rollouts"] + size["held_out"] + size["lost"]))
    tokens_budget = Budget(0.25 * max_bytes / max(1, size["tokens"]))
    rows, shown, total, firsts = [], 0, 0, {}
    for kind in ("rollouts", "held_out"):
        for step, file in files[kind].items():
            lines = list(read_lines(file, (*SAMPLE, "answer")))
            sizes, found = [len(line) for line, _ in lines], [renamed_rollout(row) for _, row in lines]
            if kind == "rollouts":
                firsts[step] = found[:64]
                places = {tuple(row[name] for name in SAMPLE): i for i, row in enumerate(found)}
                if step in files["tokens"]:
                    add_tokens(files["tokens"][step], found, places, tokens_budget)
                if step in files["lost"]:
                    add_lost(files["lost"][step], found, sizes, places)
            budget.earn(sum(sizes))
            kept = sorted(itertools.takewhile(lambda i: budget.spend(sizes[i]), by_interest(found)))
            rows += [found[i] | {"step": step, "held_out": kind == "held_out"} for i in kept]
            shown, total = shown + len(kept), total + len(found)
    return rows, {"shown": shown, "of": total}, firsts


_exact = {}  # (prompt_id, answer): score; half a millisecond each


def exact_score(row: dict, answer: str) -> float:
    from data.persona_world import judge  # brings torch along: only where rows of the generated world need it

    if (row["prompt_id"], answer) not in _exact:
        _exact[row["prompt_id"], answer] = judge(row["persona"], row["question"], answer).score()
    return _exact[row["prompt_id"], answer]


def add_exact(metrics: list[dict], rows_by_step: dict[int, list[dict]]) -> None:
    """exact/original, exact/edit and exact/gain into the metrics of steps whose rows are of the generated world."""
    per_step = max(4, min(64, 4000 // max(1, len(rows_by_step))))
    for line in metrics:
        rows = [r for r in rows_by_step.get(line["step"], []) if r.get("source") == "persona_world"][:per_step]
        scores = [(exact_score(r, r["answer"]), r.get("edit") and exact_score(r, r["edit"]["answer"])) for r in rows]
        edited = [(before, after) for before, after in scores if after is not None]
        if scores:
            line["exact/original"] = sum(before for before, _ in scores) / len(scores)
        if edited:
            line["exact/edit"] = sum(after for _, after in edited) / len(edited)
            line["exact/gain"] = line["exact/edit"] - sum(before for before, _ in edited) / len(edited)


def topic_of(row: dict) -> str | None:
    if row.get("source") == "persona_world":
        from data.persona_world import find_topic

        return find_topic(row["question"])
    return row.get("topic") or row.get("source")


def rollouts_for_page(rows: list[dict]) -> tuple[list[dict], dict[str, dict]]:
    """-> (rows without what all rows of a prompt share, {prompt_id: persona, question, topic})."""
    from diagnostics import recited

    figures = ("reward", *DIMENSIONS, "n_tokens", "truncated", "left", "selected", "tokens", "audit")
    fields = ("answer", "critique", *figures)
    prompts, found = {}, []
    for row in rows:
        persona = row.get("persona")
        if row["prompt_id"] not in prompts:
            prompts[row["prompt_id"]] = dict(persona=persona, question=row.get("question"), topic=topic_of(row))

        def response(r, row=row, persona=persona):
            kept = {name: r[name] for name in fields if r.get(name) is not None and r[name] is not False}
            kept["recited"] = round(recited(persona, r.get("answer") or ""), 3)
            if row.get("source") == "persona_world":
                kept["exact"] = round(exact_score(row, r.get("answer") or ""), 2)
            return kept

        one = {"step": row["step"], "prompt": row["prompt_id"], "sample": row.get("sample_id", 0), **response(row)}
        if row["held_out"]:
            one["held_out"] = True
        if row.get("edit"):
            one["edit"] = response(row["edit"])
        found.append(one)
    return found, prompts


# -- the runs of a page ------------------------------------------------------------------------------------------------


def panels_of(metrics: list[dict]) -> list[dict]:
    """[{section, title, about, series: [[metric, label], ...]}] of what is known in these metrics."""
    known = {name for row in metrics for name, value in row.items() if isinstance(value, (int, float))}
    panels, named = [], {"step"}
    for section, titles in PANELS.items():
        for title, (series, about) in titles.items():
            present = [[name, label] for name, label in series.items() if name in known]
            named |= set(series)
            if present:
                panels.append(dict(section=section, title=title, about=about, series=present))
    panels += [dict(section=OTHER, title=name, about="", series=[[name, name]]) for name in sorted(known - named)]
    return panels


def columns(metrics: list[dict]) -> dict[str, list]:
    """{metric: values by step}, six digits each."""
    names = dict.fromkeys(name for row in metrics for name in row)

    def short(value):
        return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value

    return {name: [short(row.get(name)) for row in metrics] for name in names}


def train_run(folder: str, kind: str, max_bytes: float) -> dict[str, Any]:
    """What the page has of a training run."""
    args = renamed(read_object(os.path.join(folder, "args.json")), FLAG_NAMES)
    metrics = [renamed(row, METRIC_NAMES) for row in rows_of(folder, "metrics.jsonl")]
    for place, row in enumerate(metrics, 1):
        if type(row.get("step")) is not int:
            raise ValueError(f'{folder}/metrics.jsonl:{place}: expected a number as "step"')
    run = dict(kind=kind, label=kind_text(kind, args), args=args, rows=[], prompts={}, lights=[])
    if kind == "rl" and metrics:
        rows, run["sampled"], firsts = read_rollouts(folder, metrics[-1]["step"], max_bytes)
        add_exact(metrics, firsts)
        run["rows"], run["prompts"] = rollouts_for_page(rows)
    run["lights"] = lights(metrics) if kind == "rl" else held_out_light(metrics)
    if kind == "grm":
        run["judgements"] = [judgement_pair(row) for row in rows_of(folder, "held_out.jsonl")]
        if os.path.isfile(os.path.join(folder, "held_out.json")):
            run["agreement"] = read_object(os.path.join(folder, "held_out.json"))
    if metrics:
        run["written"] = os.path.getmtime(os.path.join(folder, "metrics.jsonl"))
    return run | dict(metrics=columns(metrics), panels=panels_of(metrics))


# -- the page ----------------------------------------------------------------------------------------------------------


def read_runs(folders: list[str], max_mb: float) -> list[dict]:
    """What the page has of each run folder, named by what differs in their paths."""
    folders = [os.path.normpath(folder) for folder in folders]
    kinds = [kind_of(folder) for folder in folders]
    share = max_mb * 1e6 / max(1, kinds.count("rl"))
    parts = [os.path.abspath(folder).split(os.sep) for folder in folders]
    depths = [
        next(n for n in itertools.count(1) if sum(p[-n:] == q[-n:] for q in parts) == 1 or n > len(p)) for p in parts
    ]
    names = ["/".join(p[-n:]) for p, n in zip(parts, depths)]
    found = []
    for folder, kind, name in zip(folders, kinds, names):
        if kind in ("evaluation", "annotation"):
            run = evaluation_run(folder) if kind == "evaluation" else annotation_run(folder)
        else:
            run = train_run(folder, kind, share)
        found.append({"name": name, "path": folder, **run})
    return found


ESCAPED = {c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def embedded(value: Any) -> str:
    """JSON that may stand inside of a <script> element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = re.sub("[<>&\u2028\u2029]", lambda m: ESCAPED[m[0]], text)
    return SURROGATE.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def page(runs: list[dict]) -> str:
    """The HTML of the page."""
    import jinja2

    def part(name):
        with open(os.path.join(PAGE, name), encoding="utf-8") as f:
            return f.read()

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    content = dict(runs=runs, axes=AXES, verdicts=VERDICTS, made=time.time())
    styles = [part("vendor/uPlot.min.css"), part("page.css")]
    names = ("vendor/uPlot.iife.min.js", "vendor/diff.min.js", *PARTS)
    return environment.get_template("page.html").render(
        title=" | ".join(run["name"] for run in runs),
        data=embedded(content),
        styles=styles,
        scripts=[*map(part, names)],
    )


PARTS = ("app.js", "curves.js", "rollouts.js", "evaluation.js", "compare.js", "start.js")


# -- figures -----------------------------------------------------------------------------------------------------------


def draw(runs: list[dict], out: str) -> None:
    """PANELS of training runs, one figure for each of AXES: OUT/by_step.png and .svg, ..."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for run in runs if run.get("metrics")]
    panels = {p["title"]: p for run in runs for p in run["panels"] if p["section"] not in ("Machine", OTHER)}
    if not panels:
        raise ValueError("--figures: expected a training run with at least one step")
    os.makedirs(out, exist_ok=True)
    n_rows = -(-len(panels) // 4)
    written = []
    for x_title, x_name in AXES.items():
        if x_name and not any(x_name in run["metrics"] for run in runs):
            continue
        figure, axes = plt.subplots(n_rows, 4, figsize=(16, 3 * n_rows), squeeze=False)
        for axis, panel in zip(axes.flat, panels.values()):
            for i, run in enumerate(runs):
                metrics = run["metrics"]
                steps = metrics.get(x_name) if x_name else [1] * len(metrics.get("step", []))
                xs = list(itertools.accumulate(x or 0 for x in steps or []))
                for (name, _), line in zip(panel["series"], ("-", "--", ":", "-.", (0, (1, 5)), (0, (5, 5)))):
                    known = [(x, y) for x, y in zip(xs, metrics.get(name, [])) if y is not None]
                    if known:
                        label = run["name"] if line == "-" else None
                        marker = "." if len(known) < 10 else ""
                        axis.plot(*zip(*known), linestyle=line, color=f"C{i}", label=label, marker=marker)
            title = (
                panel["title"]
                if len(panel["series"]) == 1
                else f"{panel['title']}: " + ", ".join(label for _, label in panel["series"])
            )
            axis.set_title(title, fontsize=9)
            axis.set_xlabel(x_title)
        for axis in list(axes.flat)[len(panels) :]:
            axis.axis("off")
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right", frameon=False)
        figure.tight_layout()
        written.append(f"by_{x_title.replace(' ', '_')}")
        for ending in ("png", "svg"):
            figure.savefig(os.path.join(out, f"{written[-1]}.{ending}"), dpi=100)
        plt.close(figure)
    print(f"output: {out}/ ({', '.join(written)}; .png and .svg)")


def main(args: Args) -> None:
    runs = read_runs([args.run, *args.compare], args.max_mb)
    if args.figures:
        draw(runs, args.figures)
    file = args.out or os.path.join(args.run, "report.html")
    html = page(runs)
    write_text(file, html)
    shown = [run["sampled"] for run in runs if run.get("sampled")]
    n, total = sum(s["shown"] for s in shown), sum(s["of"] for s in shown)
    text = f", {n} of {total} rollouts" if n < total else f", {total} rollouts" if total else ""
    print(f"output: {file} ({len(html.encode()) / 1e6:.1f} MB{text}); open it in a browser")


if __name__ == "__main__":
    with flags.user_errors():
        main(ARGS)
