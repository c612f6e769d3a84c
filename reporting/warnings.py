"""The warnings of a page: rules over a run's metrics, each with its words."""

from collections.abc import Callable
from dataclasses import dataclass, field

MIN_STEPS = 10  # shorter runs get no warnings: their means are noise


@dataclass(frozen=True)
class Rule:
    """A warning rule. `fires` and `text` get, for each metric, its means by fifth of the run, oldest first."""

    name: str
    rule: str
    metrics: tuple[str, ...]
    fires: Callable[..., bool]
    text: Callable[..., str]
    # filter and order of the rollouts that show it; steps: those of the last fifth, None for all
    rollouts: dict[str, str | None] = field(default_factory=dict)


def hacking_rule(metric: str, label: str) -> Rule:
    return Rule(
        "Reward hacking",
        f"Raised if the reward is at least as high as where the {label} was best, but the {label} has since lost more "
        "than 0.3 and a tenth of its range.",
        ("original/reward", metric),
        lambda r, h: r[-1] >= r[h.index(max(h))] and max(h) - h[-1] > max(0.3, 0.1 * (max(h) - min(h))),
        lambda r, h: f"reward {r[0]:.2f} to {r[-1]:.2f}; {label} {h[0]:.2f}, best {max(h):.2f}, last {h[-1]:.2f}",
        {"sort": "best"},
    )


HACKING = hacking_rule("held_out/original/reward", "held-out reward")
HACKING_EXACT = hacking_rule("exact/original", "exact score")
UNPARSED = "judge_unparsed / judge_calls"

RULES = (
    Rule(
        "Length",
        "Raised if originals of the last fifth are more than 1.5 times as long as those of the first.",
        ("original/length",),
        lambda n: n[-1] > 1.5 * n[0],
        lambda n: f"{n[0]:.0f} to {n[-1]:.0f} tokens",
        {"sort": "longest"},
    ),
    HACKING,
    Rule(
        "Edits no better",
        "Raised if, in the last fifth, edits gain less than 0.05, or more of them get worse than better. Either the "
        "policy already says what critiques ask for, or it does not follow them.",
        ("edit/gain", "edit/improved", "edit/worse"),
        lambda gain, better, worse: gain[-1] < 0.05 or worse[-1] > better[-1],
        lambda gain, better, worse: (
            f"gain {gain[0]:.2f} to {gain[-1]:.2f}; {100 * better[-1]:.0f} % better, {100 * worse[-1]:.0f} % worse"
        ),
        {"sort": "worsened"},
    ),
    Rule(
        "Judge failures",
        "Raised if more than a tenth of the last fifth's judgements give no scores.",
        (UNPARSED,),
        lambda unparsed: unparsed[-1] > 0.1,
        lambda unparsed: f"{100 * unparsed[-1]:.1f} % of the judgements",
        {"show": "dropped"},
    ),
    Rule(
        "Updates left out",
        "Raised if an update was left out, because its loss or gradient was not finite or out of bounds.",
        ("bad_steps",),
        lambda left_out: left_out[-1] > 0,
        lambda left_out: f"number so far, on average: first fifth {left_out[0]:.1f}, last {left_out[-1]:.1f}",
    ),
    Rule(
        "Train-inference mismatch",
        "Raised if trainer and engine give the same tokens log-probs that differ by more than 0.05 on average, under "
        "the same weights. In bf16, 0.01 is usual. Ratios from such log-probs can't be trusted.",
        ("train_inference_mismatch",),
        lambda mismatch: mismatch[-1] > 0.05,
        lambda mismatch: f"mean {mismatch[-1]:.2g}",
    ),
    Rule(
        "Ratio on inserted tokens",
        "Raised if, in the last fifth, the mean ratio on tokens that edits insert is below 0.2 or above 5: these "
        "tokens are far off-policy.",
        ("edit/inserted_ratio",),
        lambda ratio: not 0.2 <= ratio[-1] <= 5,
        lambda ratio: f"mean {ratio[-1]:.2f}",
        {"show": "tokens"},
    ),
    Rule(
        "Value loss",
        "Raised if the critic's loss is more than twice its lowest fifth, and it explains less than a tenth of the "
        "returns' variance.",
        ("value_loss", "explained_variance"),
        lambda loss, explained: loss[-1] > 2 * min(loss) and explained[-1] < 0.1,
        lambda loss, explained: f"loss {loss[0]:.2g} to {loss[-1]:.2g}; explained {explained[-1]:.2f}",
    ),
    Rule(
        "Entropy",
        "Raised if entropy in the last fifth is below 0.3 of the first fifth's: the answers become alike.",
        ("entropy",),
        lambda entropy: entropy[-1] < 0.3 * entropy[0],
        lambda entropy: f"{entropy[0]:.2f} to {entropy[-1]:.2f} nats",
    ),
    Rule(
        "Control text",
        "Raised if, in some fifth, more than a hundredth of the originals spell out a control token or a tag of the "
        "judge's form. A judge may be wrong about such answers.",
        ("original/control_text",),
        lambda leaked: max(leaked) > 0.01,
        lambda leaked: f"at most {100 * max(leaked):.1f} %, last {100 * leaked[-1]:.1f} %",
        {"steps": None, "show": "control"},
    ),
    Rule(
        "Persona values repeated",
        "Raised if, in some fifth, originals repeat at least 1.5 times as many of the persona's values as in the "
        "first, and 3 points more.",
        ("original/recited",),
        lambda recited: max(recited) > max(1.5 * recited[0], recited[0] + 0.03),
        lambda recited: f"{100 * recited[0]:.1f} %, at most {100 * max(recited):.1f} %, last {100 * recited[-1]:.1f} %",
        {"steps": None, "sort": "repeats"},
    ),
)


def means_by_fifth(metrics: list[dict], name: str) -> list[float | None]:
    """Means of a metric over the five fifths of a run; None where it has no value."""
    n = len(metrics)
    means = []
    for k in range(5):
        fifth = metrics[k * n // 5 : (k + 1) * n // 5]
        values = [row[name] for row in fifth if row.get(name) is not None]
        means.append(sum(values) / len(values) if values else None)
    return means


def rl_warnings(metrics: list[dict]) -> list[dict]:
    """Checks RULES -> [{name, rule, found, state: warn | ok | none, link: a filter of the page}].

    Rules compare fifths of the run, because single steps are noisy. The state "none" means not measured. A run of fewer
    than MIN_STEPS steps gets no warnings.
    """
    if len(metrics) < MIN_STEPS:
        return []
    metrics = [dict(row) for row in metrics]
    for row in metrics:
        if row.get("judge_calls") and row.get("judge_unparsed") is not None:
            row[UNPARSED] = row["judge_unparsed"] / row["judge_calls"]
    has_exact = any(row.get("exact/original") is not None for row in metrics)
    warnings = []
    for rule in RULES:
        if rule is HACKING and has_exact:
            rule = HACKING_EXACT
        fifths = zip(*(means_by_fifth(metrics, name) for name in rule.metrics))
        measured = {k: values for k, values in enumerate(fifths) if None not in values}
        warning: dict = dict(name=rule.name, rule=rule.rule)
        if len(measured) < 2:
            warnings.append(warning | dict(state="none", found="not measured in this run"))
            continue
        series = list(zip(*measured.values()))
        last = max(measured)
        steps = [metrics[last * len(metrics) // 5]["step"], metrics[(last + 1) * len(metrics) // 5 - 1]["step"]]
        state = "warn" if rule.fires(*series) else "ok"
        warnings.append(warning | dict(state=state, found=rule.text(*series), link={"steps": steps, **rule.rollouts}))
    return warnings


def supervised_warnings(metrics: list[dict]) -> list[dict]:
    """The one rule of a supervised run: does it overfit?"""
    losses = [row["held_out_loss"] for row in metrics if row.get("held_out_loss") is not None]
    if len(losses) < 2:
        return []
    return [
        dict(
            name="Overfitting",
            rule="Raised if the last held-out loss is more than 5 % above the lowest one.",
            state="warn" if losses[-1] > 1.05 * min(losses) else "ok",
            found=f"lowest {min(losses):.3f}, last {losses[-1]:.3f}",
        )
    ]
