"""One table of finished evaluations (evaluate.py): a row a model, one or two columns a benchmark.

    python recipes/benchmark_table.py --folder out/qwen7b/evaluate --benchmarks prompts_eval --models sft cpe

FOLDER/BENCHMARK/MODEL holds the evaluation of a model on a benchmark. Writes FOLDER/table.md; NOTE explains it.
"""

import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from evaluation.tables import interval_text, markdown_table, number_text, percent_text
from json_files import read_json
from runtime import flags
from runtime.rows import write_text

NOTE = """\
LC: length-controlled win rate; * marks an unreliable one, and BENCHMARK/table.md says why. tokens: mean length of
answers. swap: mean score under the own persona, less that under another's. (...): 95 % interval. [288 of 300]: only so
many rows have a verdict or an answer; running the evaluation again asks for the others. -: no figure."""


@dataclass
class Args:
    folder: str
    """Folder of the evaluations, and of table.md."""
    benchmarks: tuple[str, ...]
    """Subfolders, in the order of the columns."""
    models: tuple[str, ...]
    """Their subfolders, in the order of the rows."""


def figures_of(results: dict) -> dict[str, str]:
    """The figures of one evaluation as text, by title: a results.json of any task of evaluate.py."""
    task = results["args"]["task"]
    if task == "reward-accuracy":
        total = results["total"]
        return {"accuracy, %": percent_text(total, "accuracy") + counted(total["n"], total["without_verdict"])}
    if task == "personamem":
        total = results["by choice"]["total"]
        return {"choice, %": percent_text(total, "accuracy") + counted(total["n"], total["not_answered"])}
    if task == "persona-swap":
        swap = results["difference"]["reward"]
        interval = interval_text(swap["difference"], swap["low"], swap["high"], digits=2)
        return {"swap": interval + counted(swap["n"], swap["left_out"] + len(results["missing"]))}
    controlled = results["length_controlled"]["minimal"]
    rate = interval_text(controlled["length_controlled_winrate"], controlled["low"], controlled["high"])
    tokens = number_text(results["model"]["n_tokens"]["mean"], digits=0)
    left_out = results["win_rate"]["left_out"]
    mark = (" *" if controlled["notes"] else "") + counted(results["rows"] - left_out, left_out)
    return {"LC, %": rate + mark, "tokens": tokens}


def counted(n: int, n_missing: int) -> str:
    """A mark of a figure that some rows lack."""
    return f" [{n} of {n + n_missing}]" if n_missing else ""


def main(args: Args) -> None:
    columns: dict[str, dict[str, str]] = {}  # {title: {model: text}}
    for benchmark in args.benchmarks:
        for model in args.models:
            file = os.path.join(args.folder, benchmark, model, "results.json")
            if os.path.exists(file):
                for title, text in figures_of(read_json(file)).items():
                    columns.setdefault(f"{benchmark}: {title}", {})[model] = text
    if not columns:
        raise ValueError(f"--folder {args.folder}: no results.json of evaluate.py in BENCHMARK/MODEL/")
    rows = [[model, *(texts.get(model, "-") for texts in columns.values())] for model in args.models]
    table = "\n".join([*markdown_table(["model", *columns], rows), "", NOTE]) + "\n"
    write_text(os.path.join(args.folder, "table.md"), table)
    print(table)


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
