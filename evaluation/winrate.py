"""Statistics of pairwise comparisons: win rates, length-controlled win rates, intervals, tests, agreement.

A verdict is a number in [0, 1] for one prompt: the probability that the judge prefers the *model* to the baseline. So 1
is a win, 0 a loss and 0.5 a draw. NaN means that there is no verdict. Rates and their errors are in percent here, as in
AlpacaEval's leaderboards.

Length-controlled win rates follow AlpacaEval 0.6.6 in every incidental choice (solver, tolerance, random stream),
because these choices move the rate by up to 1.3 points. The folds of its cross-validation are written out, because
scikit-learn changed its own between releases. Some fits mean little, such as one whose L1 penalty removed the model
term. Then `notes` says so, and `unpenalized` gives the rate without a penalty.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from scipy.optimize import linprog
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

PENALTIES = np.logspace(-4, 4, 10)  # values of C that cross-validation chooses from
FOLDS = 5
SEED = 123  # AlpacaEval's, for liblinear
GAMED_WEIGHT = 0.2 / 2  # a regularization of 0.2, divided between the two gamed copies of each answer
ALPACA_ROWS = 805
VARIANTS = ("minimal", "v1")
BLOCKS = 20  # a bootstrap of a mean and a permutation test draw 10,000 times, in blocks that bound the memory
BLOCK_DRAWS = 500

Lengths = Sequence[int] | np.ndarray  # characters, [n]; NaN for a missing answer, whose row has no verdict


def verdicts_from_preferences(preferences: Sequence[float | None]) -> np.ndarray:
    """AlpacaEval's preferences (1 baseline, 2 model, 0 or 1.5 draw, None) -> verdicts, fp64 [n]."""
    values = np.array([np.nan if p is None else float(p) for p in preferences], dtype=np.float64)
    values[values == 0] = 1.5
    with np.errstate(invalid="ignore"):
        values[~((values >= 1) & (values <= 2))] = np.nan
    return values - 1


def plain(verdicts: np.ndarray) -> dict:
    """The win rate and its counts, under AlpacaEval's names. Rates are None where there are too few verdicts."""
    y = verdicts[~np.isnan(verdicts)]
    wins = int((y > 0.5).sum())
    draws = int((y == 0.5).sum())
    return dict(
        win_rate=100 * float(y.mean()) if len(y) else None,
        standard_error=100 * float(y.std(ddof=1)) / len(y) ** 0.5 if len(y) > 1 else None,
        n_wins=wins,
        n_wins_base=int((y < 0.5).sum()),
        n_draws=draws,
        n_total=len(y),
        discrete_win_rate=100 * (wins + draws / 2) / len(y) if len(y) else None,
    )


# -- length control ----------------------------------------------------------------------------------------------------


class SoftLabels(NamedTuple):
    """Rows of a logistic regression whose labels are probabilities."""

    x: np.ndarray  # [n, features]
    y: np.ndarray  # [n], in [0, 1]
    weight: np.ndarray  # [n]

    def select(self, mask: np.ndarray) -> "SoftLabels":
        return SoftLabels(self.x[mask], self.y[mask], self.weight[mask])


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def length_feature(model_lengths: Lengths, baseline_lengths: Lengths) -> np.ndarray | None:
    """tanh of the baseline's length minus the model's (characters), divided by its standard deviation: fp64 [n].

    The deviation is over all rows with both answers, including those without a verdict. The difference is not centred.
    Returns None where every difference is 0, because there is nothing to control for.
    """
    difference = np.asarray(baseline_lengths, dtype=np.float64) - np.asarray(model_lengths, dtype=np.float64)
    known = difference[~np.isnan(difference)]
    deviation = known.std(ddof=1) if len(known) > 1 else 0.0
    if deviation == 0:
        # a constant difference is infinitely many deviations, and the tanh of that is its sign
        return np.sign(difference) if known.any() else None
    return np.tanh(difference / deviation)


def _fit(train: SoftLabels, penalty: float, random: np.random.RandomState) -> np.ndarray:
    """L1-penalized logistic regression: each row counts once as a win and once as a loss, weighted by its label."""
    x, y, weight = train
    model = LogisticRegression(
        l1_ratio=1, solver="liblinear", C=penalty, fit_intercept=False, tol=1e-4, max_iter=100, random_state=random
    )
    labels = np.repeat([1, 0], len(y))
    with warnings.catch_warnings():  # it may not converge: so few iterations are AlpacaEval's protocol
        warnings.filterwarnings("ignore", category=UserWarning)
        model.fit(np.vstack([x, x]), labels, sample_weight=np.concatenate([weight * y, weight * (1 - y)]))
    return model.coef_[0]


@contextlib.contextmanager
def _without_solver_output() -> Iterator[None]:
    """Silences liblinear, which writes to the process's stderr whenever a fit sees a single class."""
    saved = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


def _log_likelihood(rows: SoftLabels, coefficients: np.ndarray) -> float:
    x, y, weight = rows
    p = np.clip(sigmoid(x @ coefficients), 1e-15, 1 - 1e-15)
    return np.mean(weight * (y * np.log(p) + (1 - y) * np.log(1 - p)))


def choose_penalty(train: SoftLabels) -> float:
    """The C with the greatest mean held-out log-likelihood over five folds; the smallest one among equals."""
    n = len(train.y)
    fold = (n - 1 - np.arange(n)) % FOLDS
    scores = np.zeros((FOLDS, len(PENALTIES)))
    for k in range(FOLDS):
        held_out = fold == k
        random = np.random.RandomState(SEED)  # one stream for the ten fits of a fold, as upstream
        for i, penalty in enumerate(PENALTIES):
            coefficients = _fit(train.select(~held_out), penalty, random)
            scores[k, i] = _log_likelihood(train.select(held_out), coefficients)
    return PENALTIES[scores.mean(0).argmax()]


def is_separated(train: SoftLabels) -> bool:
    """Whether the likelihood has no maximum in the model term, so that the penalty alone makes the rate.

    So it is where coefficients with a model term (the last one) lower no win and raise no loss, and leave rows with a
    label between 0 and 1 where they are. A linear program finds them, as in Konis 2007.
    """
    x, y, _ = train
    is_soft = (y > 0) & (y < 1)
    rising = np.where(y == 1, 1, -1)[~is_soft, None] * x[~is_soft]
    soft = x[is_soft]
    model_term = np.eye(x.shape[1])[-1]
    for target in (model_term, -model_term):
        found = linprog(target, -rising, np.zeros(len(rising)), soft, np.zeros(len(soft)), bounds=(-1, 1))
        if found.fun < -1e-6:
            return True
    return False


def _fit_unpenalized(train: SoftLabels) -> np.ndarray | None:
    """Coefficients of the greatest likelihood by Newton's method; None where it has no finite maximum."""
    if is_separated(train):
        return None
    x, y, weight = train
    coefficients = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ coefficients)
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x
        if np.linalg.cond(hessian) > 1e12:
            return None
        step = np.linalg.solve(hessian, x.T @ (weight * (y - p)))
        coefficients = coefficients + step
        if np.abs(step).max() < 1e-10:
            return coefficients
    return None


def read_gamed(path: str) -> dict[str, np.ndarray]:
    """Reads AlpacaEval's df_gamed.csv, the extra rows that regularize the variant v1.

    path: the file, or the data set on the hub (tatsu-lab/alpaca_eval).

    Returns:
        "x": length feature and difficulty [1610, 2]; "y": verdicts [1610]; "difficulty": of the instructions [805]

    Raises:
        ValueError: the file is another one, or cannot be fetched.
    """
    if not os.path.isfile(path):
        try:
            path = hf_hub_download(path, "df_gamed.csv", repo_type="dataset")
        except (HFValidationError, OSError) as error:
            raise ValueError(
                f"--gamed-data {path}: not a file, and not fetched from the hub ({error}); expected df_gamed.csv of "
                "the data set tatsu-lab/alpaca_eval"
            ) from error
    table = pandas.read_csv(path)
    columns = ["preference", "index", "std_delta_len", "instruction_difficulty"]
    if len(table) != 2 * ALPACA_ROWS or not set(columns) <= set(table.columns):
        raise ValueError(
            f"{path}: {len(table)} rows with columns {list(table.columns)}; expected {2 * ALPACA_ROWS} rows with "
            f"{', '.join(columns)} (df_gamed.csv)"
        )
    difficulty = table["instruction_difficulty"].to_numpy(np.float64)
    length = np.tanh(table["std_delta_len"].to_numpy(np.float64))
    return dict(
        x=np.stack([length, difficulty], 1),
        y=table["preference"].to_numpy(np.float64),
        difficulty=difficulty[:ALPACA_ROWS],
    )


def _design(
    verdicts: np.ndarray,
    model_lengths: Lengths,
    baseline_lengths: Lengths,
    difficulty: np.ndarray | None,
    gamed: dict[str, np.ndarray] | None,
) -> tuple[SoftLabels, np.ndarray]:
    """Training rows, and the features [n, k] for the prediction, whose length term is 0.

    Columns: length (where the lengths differ), difficulty (v1), and the constant 1 of the model term.
    """
    length = length_feature(model_lengths, baseline_lengths)
    columns = [column for column in (length, difficulty) if column is not None]
    x = np.stack([*columns, np.ones(len(verdicts))], 1)
    judged = ~np.isnan(verdicts)
    train = SoftLabels(x[judged], verdicts[judged], np.ones(judged.sum()))
    if gamed is not None:
        extra = gamed["x"] if length is not None else gamed["x"][:, 1:]
        n = len(extra)
        train = SoftLabels(
            np.vstack([np.column_stack([extra, np.zeros(n)]), train.x]),
            np.concatenate([gamed["y"], train.y]),
            np.concatenate([np.full(n, GAMED_WEIGHT), train.weight]),
        )
    test = x.copy()
    if length is not None:
        test[:, 0] = 0
    return train, test


def length_controlled(
    verdicts: np.ndarray,
    model_lengths: Lengths,
    baseline_lengths: Lengths,
    variant: str = "minimal",
    gamed: dict[str, np.ndarray] | None = None,
    same: bool = False,
) -> dict:
    """AlpacaEval's length-controlled win rate, `length_controlled_minimal` or `length_controlled_v1`.

    Args:
        verdicts: [n].
        model_lengths, baseline_lengths: in characters, [n] each.
        gamed: from `read_gamed`; the variant v1 needs it.
        same: the model is the baseline itself, so the rate is 50 by construction.

    Returns:
        length_controlled_winrate and lc_standard_error (None without a fit), unpenalized, separated, penalty (C),
        coefficients, predictions [n], and notes: what is wrong with the rate, empty if nothing is. lc_standard_error is
        AlpacaEval's: the spread over instructions, without sampling error. separated: the likelihood has no maximum,
        so that the penalty alone makes the rate.

    Raises:
        ValueError: v1 on other than AlpacaEval's 805 rows.
    """
    n = len(verdicts)
    n_judged = int((~np.isnan(verdicts)).sum())
    if variant == "v1" and (gamed is None or n != ALPACA_ROWS):
        raise ValueError(
            f"the variant v1 needs AlpacaEval's {ALPACA_ROWS} rows in their order, to which its difficulties belong "
            f"(null where there is no verdict), and --gamed-data; got {n} rows"
        )
    names = ("length_controlled_winrate", "lc_standard_error", "unpenalized", "penalty", "coefficients", "predictions")
    result = dict.fromkeys(names) | dict(variant=variant, separated=False, notes=[])
    if same:
        result["notes"] = ["the model is the baseline: 50 by construction, nothing was fitted"]
        return result | dict(length_controlled_winrate=50.0, lc_standard_error=0.0, predictions=np.full(n, 0.5))
    if n_judged < FOLDS:
        result["notes"] = [f"no rate: {n_judged} verdicts, fewer than the {FOLDS} folds of the fit"]
        return result

    if variant != "v1":
        gamed = None
    difficulty = None if gamed is None else gamed["difficulty"]
    train, test = _design(verdicts, model_lengths, baseline_lengths, difficulty, gamed)
    with _without_solver_output():
        penalty = choose_penalty(train)
        fitted = _fit(train, penalty, np.random.RandomState(SEED))
    terms = ["length", "model"] if gamed is None else ["length", "difficulty", "model"]
    coefficients = dict(zip(terms[-train.x.shape[1] :], fitted.tolist()))  # without "length" where lengths are equal
    predictions = sigmoid(test @ fitted)
    rate = 100 * float(predictions.mean())
    free = _fit_unpenalized(train)
    unpenalized = None if free is None else 100 * float(sigmoid(test @ free).mean())
    difference = np.asarray(baseline_lengths) - np.asarray(model_lengths)
    constant = len(np.unique(difference[~np.isnan(difference)])) == 1
    judged = verdicts[~np.isnan(verdicts)]
    one_class = judged[0] in (0, 1) and bool((judged == judged[0]).all())
    result |= dict(
        length_controlled_winrate=rate,
        lc_standard_error=100 * float(predictions.std(ddof=1)) / n**0.5,
        unpenalized=unpenalized,
        separated=not constant and not one_class and is_separated(train),
        penalty=float(penalty),
        coefficients=coefficients,
        predictions=predictions,
    )
    result["notes"] = _notes(result, judged, constant)
    return result


def _notes(result: dict, y: np.ndarray, constant_difference: bool) -> list[str]:
    """Reasons to distrust a length-controlled rate. y: the verdicts that exist."""
    rate = result["length_controlled_winrate"]
    coefficients = result["coefficients"]
    win_rate = 100 * y.mean()
    without_penalty = "; unpenalized it has no finite fit"
    if result["unpenalized"] is not None:
        without_penalty = f"; unpenalized it is {result['unpenalized']:.2f}"
    notes = []
    if "length" not in coefficients:
        notes.append("all answers are as long as the baseline's: the length term was left out")
    elif constant_difference:
        notes.append("the difference of lengths is the same in all rows: length and model cannot be told apart")
    if result["separated"]:
        notes.append(
            "wins and losses are separated by length: the fit has no maximum, and the penalty alone makes the rate; do "
            "not use the rate"
        )
    if coefficients["model"] == 0:
        notes.append(f"the L1 penalty set the model term to 0: the rate is 50.0 at any win rate{without_penalty}")
    n_not_lost = (y > 0).sum()
    if n_not_lost == 0:
        notes.append("all verdicts are losses: the solver sees one class and its sign flips, do not use the rate")
    elif n_not_lost < FOLDS:
        notes.append(
            f"only {n_not_lost} verdicts are not clear losses: a fold of the fit may see a single class, do not use "
            f"the rate{without_penalty}"
        )
    loss_rate = 100 - win_rate
    # near 0 and 100, where 10 points are too wide: wins or losses may become ten times as rare
    low = max(min(win_rate * 3 / 4, win_rate - 10), win_rate / 10)
    high = min(max(win_rate + loss_rate / 4, win_rate + 10), 100 - loss_rate / 10)
    if not low <= rate <= high:
        notes.append(f"far from the plain win rate of {win_rate:.1f}: the fit may have failed{without_penalty}")
    return notes


# -- intervals and tests -----------------------------------------------------------------------------------------------


def _clusters(groups: Sequence | None, n: int) -> list[np.ndarray]:
    """Row indices by group, in order of appearance. groups: one label a row; None makes each row its own group."""
    members: dict[Any, list[int]] = {}
    for i, label in enumerate(range(n) if groups is None else groups):
        members.setdefault(label, []).append(i)
    return [np.array(rows) for rows in members.values()]


def _without_nan(values: np.ndarray, groups: Sequence | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """The values that exist, and the clusters of their indices."""
    exists = ~np.isnan(values)
    if groups is not None:
        groups = [label for label, there in zip(groups, exists) if there]
    return values[exists], _clusters(groups, int(exists.sum()))


def bootstrap_mean(values: np.ndarray, seed: int, groups: Sequence | None = None) -> tuple[float | None, float | None]:
    """95 % percentile interval (low, high) of the mean; NaNs are left out.

    (None, None) where rows drawn again say nothing about the spread: without values, of one group, or all equal.

    groups: a label for each row. Rows of one label, such as the same person's, are drawn together.
    """
    values, clusters = _without_nan(values, groups)
    if len(clusters) < 2 or (values == values[0]).all():
        return None, None
    sums = np.array([values[rows].sum() for rows in clusters])
    sizes = np.array([len(rows) for rows in clusters])
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(BLOCKS):
        drawn = rng.integers(len(clusters), size=(BLOCK_DRAWS, len(clusters)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def mean_and_interval(values: np.ndarray, seed: int, groups: Sequence | None = None, name: str = "mean") -> dict:
    """{name, "low", "high"}: the mean of the values that exist and its interval (bootstrap_mean); None without any."""
    low, high = bootstrap_mean(values, seed, groups)
    values = values[~np.isnan(values)]
    return {name: float(values.mean()) if len(values) else None, "low": low, "high": high}


def bootstrap_length_controlled(
    verdicts: np.ndarray,
    model_lengths: Lengths,
    baseline_lengths: Lengths,
    result: dict,
    seed: int,
    gamed: dict[str, np.ndarray] | None = None,
    groups: Sequence | None = None,
    draws: int = 1000,
) -> tuple[float | None, float | None]:
    """95 % interval (low, high) of a length-controlled win rate. (None, None) where there is no fit, one class, classes
    that are separated, or one group.

    Rows or groups are drawn again, lengths standardized again, and the model fitted again, at the C of `result`.
    Cross-validation would not work here: over rows that were drawn twice it would test on its training rows.
    """
    judged = verdicts[~np.isnan(verdicts)]
    clusters = _clusters(groups, len(verdicts))
    if result["penalty"] is None or result["separated"] or not judged.any() or (judged == 1).all() or len(clusters) < 2:
        return None, None
    if result["variant"] != "v1":
        gamed = None
    model_lengths = np.asarray(model_lengths)
    baseline_lengths = np.asarray(baseline_lengths)
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(draws):
        rows = np.concatenate([clusters[i] for i in rng.integers(len(clusters), size=len(clusters))])
        if np.isnan(verdicts[rows]).all():
            continue
        difficulty = None if gamed is None else gamed["difficulty"][rows]
        train, test = _design(verdicts[rows], model_lengths[rows], baseline_lengths[rows], difficulty, gamed)
        first = train.y[0]
        if first in (0, 1) and (train.y == first).all():  # one class has no finite fit; this is its limit
            rates.append(100 * first)
            continue
        fitted = _fit(train, result["penalty"], np.random.RandomState(SEED))
        rates.append(100 * sigmoid(test @ fitted).mean())
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)


def paired_test(first: np.ndarray, second: np.ndarray, seed: int, groups: Sequence | None = None) -> dict:
    """Compares two models on the same prompts: verdicts or any scores, [n] each, NaN where missing.

    Returns:
        difference (mean of first - second) with its 95 % bootstrap interval low and high; p_permutation (two-sided:
        the signs of the differences are flipped at random, those of a group together); better, equal and worse, with
        p_sign (two-sided, exact, of groups: a group is better whose differences add up to more than 0); n and left_out.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    left_out = int(np.isnan(difference).sum())
    result = mean_and_interval(difference, seed, groups, "difference")
    difference, clusters = _without_nan(difference, groups)
    better = int((difference > 0).sum())
    worse = int((difference < 0).sum())
    sums = np.array([difference[rows].sum() for rows in clusters])
    p_permutation = None
    if clusters:
        observed = abs(sums.sum())
        rng = np.random.default_rng(seed)
        n_extreme = 1  # the observed signs are one of the draws
        for _ in range(BLOCKS):
            signs = rng.choice([-1.0, 1.0], size=(BLOCK_DRAWS, len(sums)))
            n_extreme += int((np.abs(signs @ sums) >= observed - 1e-9).sum())
        p_permutation = n_extreme / (BLOCKS * BLOCK_DRAWS + 1)
    return result | dict(
        p_permutation=p_permutation,
        better=better,
        worse=worse,
        equal=len(difference) - better - worse,
        p_sign=sign_test(int((sums > 1e-9).sum()), int((sums < -1e-9).sum())),
        n=len(difference),
        left_out=left_out,
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value of a split at least as uneven, under even odds. Ties are left out."""
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


# -- agreement ---------------------------------------------------------------------------------------------------------


def cohens_kappa(first: np.ndarray, second: np.ndarray) -> dict:
    """Agreement of two raters over win, draw and loss, beyond chance (docs/evaluation.md 6). Verdicts, [n] each.

    Soft verdicts are rounded, and exactly 0.5 is a draw.

    Returns:
        kappa (None where it is undefined: both raters are constant), agreement (a fraction), n, left_out (rows without
        one of the verdicts)
    """
    both = ~(np.isnan(first) | np.isnan(second))
    a = np.sign(first[both] - 0.5)
    b = np.sign(second[both] - 0.5)
    n = int(both.sum())
    left_out = len(both) - n
    if n == 0:
        return dict(kappa=None, agreement=None, n=n, left_out=left_out)
    agreement = float((a == b).mean())
    chance = sum((a == c).mean() * (b == c).mean() for c in (-1, 0, 1))
    kappa = None if chance == 1 else float((agreement - chance) / (1 - chance))
    return dict(kappa=kappa, agreement=agreement, n=n, left_out=left_out)
