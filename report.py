"""Makes one HTML page from run folders: rollouts with critiques and edits, curves of all metrics, warnings.

The page is a single file that needs no network. Make it while the run goes on, and again later: its address keeps
your place. It shows

- rollouts with their prompts, edits as word-level diffs, tokens coloured by log-prob, ratio, weight or advantage
  (`--log-tokens` of ppo_cpe.py). A page of many rollouts holds a sample of each step, and says so;
- curves of everything in metrics.jsonl, and warnings, each by a rule in words (reporting/warnings.py);
- evaluations with the answers of both sides; annotated data with its quality sheet (data/quality.py).

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
    """More such folders for the same page."""
    out: str | None = None
    """File of the page. Default: RUN/report.html."""
    figures: str | None = None
    """Folder for the curves of all runs as by_step.png, by_step.svg and so on."""
    exact_judge: str | None = None
    """FILE.py:FUNCTION with the signature of a --judge: its scores are shown beside the rewards of rollouts."""
    max_mb: flags.Positive = 20
    """Megabytes of rollouts in the page, over all runs. Larger runs are sampled."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take a moment

import glob
import itertools
import os

from json_files import read_json
from reporting.evaluations import annotation_run, evaluation_run
from reporting.page import html_page
from reporting.training_runs import training_run
from runtime.rows import write_text


def kind_of(folder: str) -> str:
    """rl | grm | bt | dpo | sft | evaluation | annotation. ValueError: the folder is none of these."""
    if os.path.isfile(os.path.join(folder, "args.json")):
        args = read_json(os.path.join(folder, "args.json"))
        if "edit_rate" in args or os.path.isdir(os.path.join(folder, "rollouts")):
            return "rl"
        return args.get("objective") or ("dpo" if "beta" in args else "sft")
    if os.path.isfile(os.path.join(folder, "results.json")):
        return "evaluation"
    if os.path.isfile(os.path.join(folder, "annotation.json")):
        return "annotation"
    runs = sorted(os.path.dirname(file) for file in glob.glob(os.path.join(glob.escape(folder), "*", "args.json")))
    hint = f"; it holds runs: {', '.join(runs)}" if runs else ""
    raise ValueError(f"{folder}: expected a run's args.json, an evaluation's results.json or an annotation.json{hint}")


def names_of(folders: list[str]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    paths = [os.path.abspath(folder).split(os.sep) for folder in folders]
    names = []
    for path in paths:
        for n in itertools.count(1):
            if n > len(path) or sum(other[-n:] == path[-n:] for other in paths) == 1:
                break
        names.append("/".join(path[-n:]))
    return names


def read_runs(folders: list[str], max_mb: float, exact_judge: str | None = None) -> list[dict]:
    """The page's entry for each folder. max_mb: megabytes of rollouts, divided among the RL runs."""
    folders = [os.path.normpath(folder) for folder in folders]
    kinds = [kind_of(folder) for folder in folders]
    max_bytes = max_mb * 1e6 / max(1, kinds.count("rl"))
    runs = []
    for folder, kind, name in zip(folders, kinds, names_of(folders)):
        if kind == "evaluation":
            run = evaluation_run(folder)
        elif kind == "annotation":
            run = annotation_run(folder)
        else:
            run = training_run(folder, kind, max_bytes, exact_judge)
        runs.append({"name": name, "path": folder, **run})
    return runs


def main(args: Args) -> None:
    file = args.out or os.path.join(args.run, "report.html")
    if os.path.isdir(file):
        raise ValueError(f"--out {file}: expected a file, found a folder")
    runs = read_runs([args.run, *args.compare], args.max_mb, args.exact_judge)
    if args.figures:
        from reporting.figures import draw  # brings matplotlib along

        draw(runs, args.figures)
    html = html_page(runs)
    write_text(file, html)
    sampled = [run["sampled"] for run in runs if run.get("sampled")]
    n_shown = sum(s["shown"] for s in sampled)
    n_logged = sum(s["of"] for s in sampled)
    text = f", {n_logged} rollouts" if n_logged else ""
    if n_shown < n_logged:
        text = f", {n_shown} of {n_logged} rollouts"
    print(f"output: {file} ({len(html.encode()) / 1e6:.1f} MB{text}); open it in a browser")


if __name__ == "__main__":
    with flags.user_errors():
        main(ARGS)
