"""The statistics of pairwise comparisons: win rates, length-controlled win rates, intervals, tests, agreement.

Verdicts are numbers in [0, 1], the share of a win that the *model* gets against the baseline on one prompt: 1 won,
0 lost, 0.5 a draw, between them the probability that the judge gave it; NaN where there is no verdict. Rates and their
errors are in percent here, as in AlpacaEval's leaderboards.

Length-controlled win rates follow AlpacaEval 0.6.6, all its incidental choices included (solver, tolerance, random
stream), because the figure moves by up to 1.3 points with them. The folds of its cross-validation are written out
here: scikit-learn changed theirs at some release, so the same annotations gave two figures. Where the figure means
little (an L1 penalty that removed the model term, one class only), `notes` says so and `unpenalized` stands beside it.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Sequence

import numpy as np
import pandas
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from sklearn.linear_model import LogisticRegression

PENALTIES = np.logspace(-4, 4, 10)  # the C's that cross-validation chooses from
FOLDS = 5
SEED = 123  # of AlpacaEval's liblinear
GAMED_WEIGHT = 0.2 / 2  # a regularization of 0.2, shared by the two gamed copies of each answer
ALPACA_ROWS = 805
VARIANTS = ("minimal", "v1")


def verdicts_from_preferences(preferences: list) -> np.ndarray:
    """AlpacaEval's preferences (1 baseline, 2 model, 0 or 1.5 draw, None) -> verdicts fp64 [n], NaN without one."""
    values = np.array([np.nan if p is None else float(p) for p in preferences], dtype=np.float64)
    values[values == 0] = 1.5
    with np.errstate(invalid="ignore"):
        values[~((values >= 1) & (values <= 2))] = np.nan
    return values - 1


def plain(verdicts: np.ndarray) -> dict:
    """The win rate and its counts, by AlpacaEval's names. None where there are too few verdicts."""
    y = verdicts[~np.isnan(verdicts)]
    draws, wins, losses = int((y == 0.5).sum()), int((y > 0.5).sum()), int((y < 0.5).sum())
    return dict(
        win_rate=100 * float(y.mean()) if len(y) else None,
        standard_error=100 * float(y.std(ddof=1)) / len(y) ** 0.5 if len(y) > 1 else None,
        n_wins=wins,
        n_wins_base=losses,
        n_draws=draws,
        n_total=len(y),
        discrete_win_rate=100 * (wins + draws / 2) / len(y) if len(y) else None,
    )


# -- length control ----------------------------------------------------------------------------------------------------


def length_feature(model_lengths: Sequence[int], baseline_lengths: Sequence[int]) -> np.ndarray | None:
    """tanh of the standardized, not centred, baseline length minus model length (characters), fp64 [n].

    Over all rows, those without a verdict too. None where all differences are equal to 0: nothing to control for.
    """
    difference = np.asarray(baseline_lengths, dtype=np.float64) - np.asarray(model_lengths, dtype=np.float64)
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    if deviation == 0:
        # a constant gap divides by 0: infinitely many deviations, whose tanh is its sign
        return np.sign(difference) if difference.any() else None
    return np.tanh(difference / deviation)


def _fit(x, y, weight, penalty, random):
    """L1-penalized logistic regression on soft labels: each row once as a win, once as a loss, by its share of each."""
    model = LogisticRegression(
        l1_ratio=1, solver="liblinear", C=penalty, fit_intercept=False, tol=1e-4, max_iter=100, random_state=random
    )
    labels = np.repeat([1, 0], len(y))
    with warnings.catch_warnings():  # few iterations are part of the protocol
        warnings.filterwarnings("ignore", category=UserWarning)
        model.fit(np.vstack([x, x]), labels, sample_weight=np.concatenate([weight * y, weight * (1 - y)]))
    return model.coef_[0]


@contextlib.contextmanager
def _without_solver_output():
    """liblinear writes a line to the process's stderr for every fit that sees one class; `notes` say it once."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def _log_likelihood(x, y, weight, coefficients):
    p = np.clip(sigmoid(x @ coefficients), 1e-15, 1 - 1e-15)
    return np.mean(weight * (y * np.log(p) + (1 - y) * np.log(1 - p)))


def choose_penalty(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """The C with the greatest mean held-out log-likelihood over five folds; of equals the smallest."""
    fold = (len(y) - 1 - np.arange(len(y))) % FOLDS
    scores = np.zeros((FOLDS, len(PENALTIES)))
    for k in range(FOLDS):
        held_out, random = fold == k, np.random.RandomState(SEED)  # one stream for the ten fits of a fold
        for i, penalty in enumerate(PENALTIES):
            coefficients = _fit(x[~held_out], y[~held_out], weight[~held_out], penalty, random)
            scores[k, i] = _log_likelihood(x[held_out], y[held_out], weight[held_out], coefficients)
    return PENALTIES[scores.mean(0).argmax()]


def _fit_unpenalized(x, y, weight):
    """Newton's method on the plain likelihood -> coefficients, or None where it has no finite maximum."""
    coefficients = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ coefficients)
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x
        if np.linalg.cond(hessian) > 1e12:
            return None
        step = np.linalg.solve(hessian, x.T @ (weight * (y - p)))
        coefficients = coefficients + step
        if np.abs(coefficients).max() > 20:  # a probability of 1 - 2e-9: the data are separable
            return None
        if np.abs(step).max() < 1e-10:
            return coefficients
    return None


def read_gamed(path: str) -> dict[str, np.ndarray]:
    """AlpacaEval's df_gamed.csv (data set tatsu-lab/alpaca_eval) -> rows of v1's regularization.

    path: the file, or the data set's hub name. -> {"x": length feature and difficulty [1610, 2], "y": [1610],
    "difficulty": of the 805 instructions}. ValueError: not that file.
    """
    if not os.path.isfile(path):
        try:
            path = hf_hub_download(path, "df_gamed.csv", repo_type="dataset")
        except (HFValidationError, OSError) as error:
            raise ValueError(
                f"--gamed-data {path}: neither a file nor fetched from the hub ({error}); expected "
                "df_gamed.csv of the data set tatsu-lab/alpaca_eval"
            ) from error
    table = pandas.read_csv(path)
    needed = ["preference", "index", "std_delta_len", "instruction_difficulty"]
    if len(table) != 2 * ALPACA_ROWS or not set(needed) <= set(table.columns):
        raise ValueError(
            f"{path}: {len(table)} rows with columns {list(table.columns)}; expected {2 * ALPACA_ROWS} "
            f"rows with {', '.join(needed)} (df_gamed.csv)"
        )
    difficulty = table["instruction_difficulty"].to_numpy(np.float64)
    length = np.tanh(table["std_delta_len"].to_numpy(np.float64))
    return dict(
        x=np.stack([length, difficulty], 1),
        y=table["preference"].to_numpy(np.float64),
        difficulty=difficulty[:ALPACA_ROWS],
    )


def _design(verdicts, model_lengths, baseline_lengths, gamed, rows):
    """Training rows (x, y, weight) and the prediction's x, of these rows. Columns: length, difficulty (v1), model."""
    length = length_feature(model_lengths, baseline_lengths)
    columns = [] if length is None else [length]
    if gamed is not None:
        columns.append(gamed["difficulty"][rows])
    x = np.stack([*columns, np.ones(len(verdicts))], 1)
    judged = ~np.isnan(verdicts)
    train, y, weight = x[judged], verdicts[judged], np.ones(judged.sum())
    if gamed is not None:
        extra = gamed["x"] if length is not None else gamed["x"][:, 1:]
        train = np.vstack([np.column_stack([extra, np.zeros(len(extra))]), train])
        y = np.concatenate([gamed["y"], y])
        weight = np.concatenate([np.full(len(extra), GAMED_WEIGHT), weight])
    test = x.copy()
    if length is not None:
        test[:, 0] = 0
    return train, y, weight, test


def length_controlled(
    verdicts: np.ndarray,
    model_lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    variant: str = "minimal",
    gamed: dict[str, np.ndarray] | None = None,
    same: bool = False,
) -> dict:
    """AlpacaEval's length-controlled win rate, `length_controlled_minimal` or `_v1` (needs gamed: read_gamed).

    verdicts [n]; lengths in characters; same: the model is the baseline itself, 50 by construction.
    -> dict: length_controlled_winrate and lc_standard_error (None where there is no figure), unpenalized, penalty (C),
    coefficients, predictions [n], notes (what is wrong with the figure; empty if nothing). lc_standard_error is
    AlpacaEval's: the spread over instructions, without any sampling error. ValueError: v1 on other than the 805 rows.
    """
    n, judged = len(verdicts), int((~np.isnan(verdicts)).sum())
    if variant == "v1" and (gamed is None or n != ALPACA_ROWS):
        raise ValueError(
            f"the variant v1 needs AlpacaEval's {ALPACA_ROWS} rows in their order (null where there is no "
            f"verdict) and --gamed-data: its difficulties belong to them; got {n} rows"
        )
    result = dict(
        variant=variant,
        length_controlled_winrate=None,
        lc_standard_error=None,
        unpenalized=None,
        penalty=None,
        coefficients=None,
        predictions=None,
        notes=[],
    )
    if same:
        notes = ["the model is the baseline: 50 by construction, nothing was fitted"]
        return result | dict(
            length_controlled_winrate=50.0, lc_standard_error=0.0, predictions=np.full(n, 0.5), notes=notes
        )
    if judged < FOLDS:
        return result | dict(notes=[f"no figure: {judged} verdicts, fewer than the {FOLDS} folds of the fit"])

    gamed = gamed if variant == "v1" else None
    train, y, weight, test = _design(verdicts, model_lengths, baseline_lengths, gamed, np.arange(n))
    with _without_solver_output():
        penalty = choose_penalty(train, y, weight)
        coefficients = _fit(train, y, weight, penalty, np.random.RandomState(SEED))
    predictions = sigmoid(test @ coefficients)
    rate = 100 * float(predictions.mean())
    free = _fit_unpenalized(train, y, weight)
    unpenalized = None if free is None else 100 * float(sigmoid(test @ free).mean())
    names = ["length", *(["difficulty"] if gamed is not None else []), "model"][-train.shape[1] :]
    gaps = np.asarray(baseline_lengths) - np.asarray(model_lengths)
    notes = _notes(verdicts, (gaps == gaps[0]).all(), rate, unpenalized, dict(zip(names, coefficients)))
    return result | dict(
        length_controlled_winrate=rate,
        lc_standard_error=100 * float(predictions.std(ddof=1)) / n**0.5,
        unpenalized=unpenalized,
        penalty=float(penalty),
        coefficients=dict(zip(names, coefficients.tolist())),
        predictions=predictions,
        notes=notes,
    )


def _notes(verdicts, constant_gap, rate, unpenalized, coefficients):
    y = verdicts[~np.isnan(verdicts)]
    win_rate, notes = 100 * y.mean(), []
    beside = "; unpenalized it " + ("has no finite fit" if unpenalized is None else f"is {unpenalized:.2f}")
    if "length" not in coefficients:
        notes.append("all answers are as long as the baseline's: the length term was left out")
    elif constant_gap:
        notes.append("the gap in length is the same in all rows: length and model cannot be told apart")
    if coefficients["model"] == 0:
        notes.append(f"the L1 penalty set the model term to 0: the figure is 50.0 whatever the win rate{beside}")
    if not y.any():
        notes.append("all verdicts are losses: the solver sees one class, its sign flips, do not use the figure")
    elif (y > 0).sum() < FOLDS:
        notes.append(
            f"only {(y > 0).sum()} verdicts are not clear losses: a fold of the fit may see one class only, "
            f"do not use the figure{beside}"
        )
    low, high = min(win_rate * 3 / 4, win_rate - 10), max(win_rate + (100 - win_rate) / 4, win_rate + 10)
    if not low <= rate <= high:
        notes.append(f"far from the plain win rate of {win_rate:.1f}: the fit may have failed{beside}")
    return notes


# -- intervals and tests -----------------------------------------------------------------------------------------------


def _clusters(groups, n):
    """groups: one label a row, or None (each row by itself) -> list of index arrays."""
    if groups is None:
        return [np.array([i]) for i in range(n)]
    members = {}
    for i, label in enumerate(groups):
        members.setdefault(label, []).append(i)
    return [np.array(rows) for rows in members.values()]


def bootstrap_mean(
    values: np.ndarray, seed: int, groups: list | None = None, draws: int = 10_000
) -> tuple[float | None, float | None]:
    """95 % percentile interval of the mean of `values` (NaN left out) -> (low, high), or (None, None) without values.

    groups: labels of rows that are drawn together, such as the person that several rows belong to.
    """
    kept = ~np.isnan(values)
    clusters = _clusters(None if groups is None else [g for g, k in zip(groups, kept) if k], int(kept.sum()))
    if not clusters:
        return None, None
    values = values[kept]
    sums = np.array([values[rows].sum() for rows in clusters])
    sizes = np.array([len(rows) for rows in clusters])
    rng, means = np.random.default_rng(seed), []
    for start in range(0, draws, 500):  # a block of draws at a time: the indices of all would be large
        drawn = rng.integers(len(clusters), size=(min(500, draws - start), len(clusters)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_length_controlled(
    verdicts: np.ndarray,
    model_lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    result: dict,
    seed: int,
    gamed: dict[str, np.ndarray] | None = None,
    groups: list | None = None,
    draws: int = 1000,
) -> tuple[float | None, float | None]:
    """95 % interval of a length-controlled win rate: rows (or groups) drawn again, lengths standardized and the model
    fitted again each time, at the C of `result`: cross-validation over rows that were drawn twice would see its own
    training rows. -> (low, high), or (None, None) where `result` has no fit or sees one class only.
    """
    judged = verdicts[~np.isnan(verdicts)]
    if result["penalty"] is None or not judged.any() or (judged == 1).all():
        return None, None
    gamed = gamed if result["variant"] == "v1" else None
    lengths = np.asarray(model_lengths), np.asarray(baseline_lengths)
    clusters, rng, rates = _clusters(groups, len(verdicts)), np.random.default_rng(seed), []
    for _ in range(draws):
        rows = np.concatenate([clusters[i] for i in rng.integers(len(clusters), size=len(clusters))])
        if np.isnan(verdicts[rows]).all():
            continue
        train, y, weight, test = _design(verdicts[rows], lengths[0][rows], lengths[1][rows], gamed, rows)
        if (y == y[0]).all() and y[0] in (0, 1):  # one class has no finite fit: its limit
            rates.append(100 * y[0])
            continue
        coefficients = _fit(train, y, weight, result["penalty"], np.random.RandomState(SEED))
        rates.append(100 * sigmoid(test @ coefficients).mean())
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)


def paired_test(
    first: np.ndarray, second: np.ndarray, seed: int, groups: list | None = None, draws: int = 10_000
) -> dict:
    """Two models on the same prompts: verdicts [n] each (or any scores), NaN where missing.

    -> dict: difference (mean of first - second), low and high (95 %, bootstrap), p_permutation (two-sided, the signs of
    the differences flipped at random, those of a group together), better, equal, worse, p_sign (two-sided, exact), n,
    left_out.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    kept = ~np.isnan(difference)
    labels = None if groups is None else [g for g, k in zip(groups, kept) if k]
    left_out, difference = int((~kept).sum()), difference[kept]
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    result = dict(
        difference=None,
        low=None,
        high=None,
        p_permutation=None,
        better=better,
        worse=worse,
        equal=len(difference) - better - worse,
        p_sign=sign_test(better, worse),
        n=len(difference),
        left_out=left_out,
    )
    if not len(difference):
        return result
    sums = np.array([difference[rows].sum() for rows in _clusters(labels, len(difference))])
    rng, extreme, observed = np.random.default_rng(seed), 0, abs(sums.sum())
    for start in range(0, draws, 500):
        signs = rng.choice([-1.0, 1.0], size=(min(500, draws - start), len(sums)))
        extreme += int((np.abs(signs @ sums) >= observed - 1e-9).sum())
    low, high = bootstrap_mean(difference, seed, labels, draws)
    return result | dict(
        difference=float(difference.mean()), low=low, high=high, p_permutation=(extreme + 1) / (draws + 1)
    )  # the observed signs are one of the draws


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value of so uneven a split or a more uneven one, ties left out, under even odds."""
    n, few = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)


# -- agreement ---------------------------------------------------------------------------------------------------------


def cohens_kappa(first: np.ndarray, second: np.ndarray) -> dict:
    """Agreement of two raters over win / draw / loss beyond chance (docs/evaluation.md 6). verdicts [n] each.

    Soft verdicts are rounded, exactly 0.5 is a draw. -> dict: kappa (None where both raters are constant: undefined),
    agreement (share), n, left_out (rows that either lacks).
    """
    kept = ~(np.isnan(first) | np.isnan(second))
    a, b = np.sign(first[kept] - 0.5), np.sign(second[kept] - 0.5)
    n = int(kept.sum())
    agreement = float((a == b).mean()) if n else None
    chance = sum((a == c).mean() * (b == c).mean() for c in (-1, 0, 1)) if n else 1.0
    kappa = None if chance == 1 else float((agreement - chance) / (1 - chance))
    return dict(kappa=kappa, agreement=agreement, n=n, left_out=int((~kept).sum()))
