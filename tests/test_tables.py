"""recipes/tables.py: its cells, its runner, and the tables that recipes/results.py makes of finished cells."""

import json

import numpy as np
import pytest
from scipy import stats

from recipes import results, tables
from recipes.tables import Args, Cell, cells_of, run


def writes(path, text="x"):
    return f'-c \'open("{path}", "a").write("{text}")\''


def test_cells_are_run_once_in_the_order_of_their_needs(tmp_path):
    log = tmp_path / "log"
    cells = [Cell("b", [writes(log, "b"), writes(log, "c")], ["a"]), Cell("a", [writes(log, "a")], alone=True)]
    run(cells, str(tmp_path), jobs=2)
    assert log.read_text() == "abc"
    run(cells, str(tmp_path), jobs=2)
    assert log.read_text() == "abc"  # finished: not run again
    assert json.loads((tmp_path / "b/done.json").read_text())["commands"] == cells[0].commands
    with pytest.raises(ValueError, match="b/done.json: this cell was run with other commands"):
        run([Cell("b", [writes(log, "d")])], str(tmp_path), jobs=1)


def test_a_cell_that_fails_stops_the_others_and_is_run_again(tmp_path):
    fails = Cell("fails", ["-c 'raise SystemExit(\"the gate is closed\")'"])
    slow = Cell("slow", ["-c 'import time; time.sleep(60)'"])
    with pytest.raises(ValueError, match=r"(?s)fails failed .*fails.log.*the gate is closed"):
        run([slow, fails, Cell("after", [writes(tmp_path / "log")], ["fails"])], str(tmp_path), jobs=2)
    assert not (tmp_path / "log").exists() and not (tmp_path / "slow/done.json").exists()
    run([Cell("fails", [writes(tmp_path / "log")])], str(tmp_path), jobs=2)
    assert (tmp_path / "log").read_text() == "x"


def test_every_cell_is_there_and_differs_from_cpe_in_one_thing():
    full = {cell.name: cell for cell in cells_of(Args(), "out")}
    assert all(need in full for cell in full.values() for need in cell.needs)
    names = {name.split("/")[1] for name in full if name.startswith("seed0/")}
    assert names == set(tables.variants()) | {"sft", "grm", "bt", "gates", "accuracy", "dpo"}
    flags = list(tables.variants().values())
    assert len(set(flags)) == len(flags) - 1  # the two PPO baselines differ in their judge
    train = {name: full[f"seed0/{name}"].commands[0] for name in tables.variants()}
    assert "--judge bt:out/seed0/bt/model" in train["ppo_bt"] and "--judge out/seed0/grm/model" in train["ppo_grm"]
    for name in tables.variants():
        seeds = 5 if name in (*results.MAIN, *results.FOLLOWED_UP) else 3
        assert {cell for cell in full if cell.endswith(f"/{name}")} == {f"seed{s}/{name}" for s in range(seeds)}
    quick, search = ({cell.name for cell in cells_of(Args(**{k: True}), "out")} for k in ("quick", "search"))
    assert {f"seed0/{name}" for name in tables.QUICK} <= quick and len(quick) < 15
    searched = cells_of(Args(search=True), "out")
    assert sum("prompts_dev" in cell.commands[-1] for cell in searched) == sum(map(len, tables.LRS.values()))
    assert not search & set(full) - {"world", "base"}  # no seed that is reported


def test_difference_over_seeds_is_a_paired_t_interval():
    numbers = {
        "cpe": {0: {"reward": 3.0}, 1: {"reward": 3.5}, 2: {"reward": 3.1}, 4: {"reward": 9.0}},
        "ppo_grm": {0: {"reward": 2.8}, 1: {"reward": 2.9}, 2: {"reward": 3.0}, 3: {"reward": 0.0}},
    }
    found = results.difference(numbers, "cpe", "ppo_grm", "reward")
    gaps = np.array([0.2, 0.6, 0.1])  # of the seeds that both have
    reference = stats.ttest_rel([3.0, 3.5, 3.1], [2.8, 2.9, 3.0])
    interval = reference.confidence_interval()
    assert found["seeds"] == 3 and np.isclose(found["mean"], gaps.mean()) and np.isclose(found["p"], reference.pvalue)
    assert np.allclose([found["low"], found["high"]], [interval.low, interval.high])
    assert results.difference(numbers, "cpe", "dpo", "reward") is None


def test_what_is_missing_leaves_a_gap():
    numbers = {
        "cpe": {0: {"reward": 1.0, "lc": 50.0}, 1: {"reward": 2.0, "lc": 60.0}},
        "random_0.1": {0: {"reward": 3.0, "lc": 70.0}},
    }
    lines = results.grid(numbers, ("random", "batch_rank"), (0.1, 0.5, 1.0)).splitlines()
    assert lines[2] == "| random, score | 3.00 | 1.50 ± 0.71 | - |"
    assert lines[3] == "| batch_rank, score | - | - | - |"
    assert lines[4] == "| random, LC, % | 70.0 | 55.0 ± 7.1 | - |"
    table = results.method_table({"cpe": "CPE", "dpo": "DPO"}, numbers, ["reward", "swap"]).splitlines()
    assert table[2:] == ["| CPE | 2 | 1.50 ± 0.71 | - |"]


def test_seeds_that_had_a_part_in_a_choice_are_told_apart():
    scores = {"ppo_grm": (3.0, 3.2, 3.4), "loss_sdpo": (3.5, 3.7, 4.1)}
    numbers = {name: {s: {"reward": score} for s, score in enumerate(some)} for name, some in scores.items()}
    del numbers["ppo_grm"][1]
    lines = results.seed_table({"ppo_grm": "PPO", "loss_sdpo": "sdpo"}, numbers, chosen_on={0}).splitlines()
    assert lines[2:] == [
        "| PPO | 3.00 | - | 3.40 | 3.40 | 3.20 ± 0.28 |",
        "| sdpo | 3.50 | 3.70 | 4.10 | 3.90 ± 0.28 | 3.77 ± 0.31 |",
    ]
