"""LoRA against full fine-tuning in the generated world: score, rare content, seconds per step.

PPO and CPE from the same SFT policies, at a rate of rare content where edits matter. Full training is that of the table
`rarity`: where its experiments are done under the same OUT, they are taken over, since their commands are the same.
Seconds are means over the steps of a run, with two runs side by side on half of the cores each.
"""

from dataclasses import replace

from results.make import rarity
from results.make.draw import RARE_CONTENT, figure_table
from results.make.experiments import RL_STEPS, Training
from results.make.figures import Figures, seconds_by_phase, with_rare_content
from runtime.rows import write_text

RATE = rarity.RARE
METHODS = ("ppo", "unclipped")  # of rarity.METHODS; unclipped is CPE with its default loss
RANKS = (4, 32)  # the model is 128 wide
LRS = (1e-4, 3e-4, 1e-3)  # of full training: 1e-4
LR = {"ppo": 1e-3, "unclipped": 3e-4}  # the best of them (results/lora/search.md)
COLUMNS = ("reward", *(name for name in RARE_CONTENT if name != "advice_right"), "rollout", "score", "update")


def adapter(seed: int, method: str, rank: int, lr: float) -> Training:
    flags = f"{rarity.METHODS[method]} --lora-rank {rank}"
    return Training(seed, f"{method}_lora{rank}", lr, flags, rate=RATE)


def trainings(seeds: int) -> list[Training]:
    wanted = []
    for seed in range(seeds):
        for method in METHODS:
            wanted += rarity.diagram(seed, [RATE], [method])
            wanted += [adapter(seed, method, rank, LR[method]) for rank in RANKS]
    return wanted


def searched() -> list[Training]:
    """The search for learning rates: another seed, the dev prompts."""
    wanted = []
    for method in METHODS:
        for lr in LRS:
            training = adapter(rarity.SEARCH_SEED, method, RANKS[-1], lr)
            wanted.append(replace(training, name=f"{training.name}_lr{lr:g}", split="dev"))
    return wanted


def table(out: str, finished: list[str]) -> str:
    """A row per way of training; mean ± standard deviation over seeds."""
    runs: dict[str, list[Figures]] = {}
    for experiment in finished:
        name = experiment.split("/")[-1]
        if name.startswith(METHODS):
            run = f"{out}/{experiment}"
            runs.setdefault(name, []).append(with_rare_content(run) | seconds_by_phase(run))
    rows = []
    for name, figures in sorted(runs.items()):
        method, _, trained = name.partition("_")
        rows.append(([rarity.LABELS[method], trained or "all weights", len(figures)], figures))
    return figure_table(["", "trained", "seeds"], rows, COLUMNS)


def write_table(out: str, finished: list[str], folder: str, search: bool) -> None:
    """Writes lora.md, or search.md of the search for learning rates."""
    name = "search" if search else "lora"
    lrs = ", ".join(
        f"{rarity.LABELS[method]} {rarity.lr_of(RATE, method):g} (all weights) and {LR[method]:g} (adapters)"
        for method in METHODS
    )
    setting = f"Seed {rarity.SEARCH_SEED}, dev prompts. " if search else f"Learning rates: {lrs}. "
    command = "python results/make/tables.py lora" + (" --search" if search else "")
    note = (
        f"Made by `{command}`: rate of rare content R = {RATE:g}, {RL_STEPS} steps, exact judge. {setting}"
        "Seconds of a step: means."
    )
    text = table(out, finished)
    write_text(f"{folder}/{name}.md", f"# LoRA against full fine-tuning\n\n{note}\n\n{text}\n")
    print(f"{text}\n\nwritten: {folder}/{name}.md")
