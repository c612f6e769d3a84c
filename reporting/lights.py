"""Warning lights of a report: rules over a run's metrics, each with its words."""

from collections.abc import Callable

MIN_STEPS = 10  # before this nothing is said


def fifths(metrics: list[dict], name: str) -> list[float | None]:
    """Means of a metric over the five fifths of a run; None where it has no value there."""
    n, means = len(metrics), []
    for k in range(5):
        values = [row[name] for row in metrics[k * n // 5 : (k + 1) * n // 5] if row.get(name) is not None]
        means.append(sum(values) / len(values) if values else None)
    return means


def lights(metrics: list[dict]) -> list[dict]:
    """Rules over a run's metrics: {name, rule, found, state: ok | warn | none, link: a filter of the page}.

    They compare fifths of the run, not single steps, which are noisy. none: too short, or not measured.
    """
    if len(metrics) < MIN_STEPS:
        return []
    found = []
    part = {name: fifths(metrics, name) for name in {name for row in metrics for name in row}}
    steps = [metrics[4 * len(metrics) // 5]["step"], metrics[-1]["step"]]  # the last fifth

    def light(name: str, rule: str, needs: list[str], fires: Callable, text: Callable, **link):
        both = zip(*(part.get(metric, [None] * 5) for metric in needs))
        known = [values for values in both if None not in values]  # fifths in which all are measured
        if len(known) < 2:
            found.append(dict(name=name, rule=rule, state="none", found="not measured in this run"))
            return
        series = list(zip(*known))
        state = "warn" if fires(*series) else "ok"
        found.append(dict(name=name, rule=rule, state=state, found=text(*series), link={"steps": steps, **link}))

    light(
        "Length",
        "Answers of the last fifth are more than 1.5 times as long as those of the first.",
        ["original/length"],
        lambda n: n[-1] > 1.5 * n[0],
        lambda n: f"{n[0]:.0f} to {n[-1]:.0f} tokens",
        sort="longest",
    )
    exact = any(value is not None for value in part.get("exact/original", []))
    unseen, label = ("exact/original", "exact score") if exact else ("held_out/original/reward", "held-out reward")
    light(
        "Reward hacking",
        f"The reward is no lower than where the {label} was best, but the {label} has since lost more than a tenth of "
        "its range.",
        ["original/reward", unseen],
        lambda r, h: r[-1] >= r[h.index(max(h))] and max(h) - h[-1] > 0.1 * (max(h) - min(h)),
        lambda r, h: f"reward {r[0]:.2f} to {r[-1]:.2f}; {label} {h[0]:.2f}, best {max(h):.2f}, last {h[-1]:.2f}",
        sort="best",
    )
    light(
        "Edits no better",
        "In the last fifth edits gain less than 0.05, or more of them are worse than better: either answers have taken "
        "in what critiques ask for, or critiques are not followed.",
        ["edit/gain", "edit/improved", "edit/worse"],
        lambda gain, better, worse: gain[-1] < 0.05 or worse[-1] > better[-1],
        lambda gain, better, worse: (
            f"gain {gain[0]:.2f} to {gain[-1]:.2f}; {100 * better[-1]:.0f} % better, {100 * worse[-1]:.0f} % worse"
        ),
        sort="worsened",
    )
    counts = [(row.get("judge_unparsed"), row.get("judge_calls")) for row in metrics]
    part["unparsed"] = fifths(
        [{"share": n / calls if calls and n is not None else None} for n, calls in counts], "share"
    )
    light(
        "Judge failures",
        "More than a tenth of the last fifth's judgements do not parse.",
        ["unparsed"],
        lambda share: share[-1] > 0.1,
        lambda share: f"{100 * share[-1]:.1f} % of the judgements",
        show="left",
    )
    light(
        "Trainer against engine",
        "The log-probs of the same tokens under the same weights differ by more than 0.1 on average (0.01 is usual in "
        "bf16, less in fp32): sampled log-probs can't be trusted, and so no ratio.",
        ["logprob_gap"],
        lambda gap: gap[-1] > 0.1,
        lambda gap: f"mean {gap[-1]:.2g}",
    )
    light(
        "Ratio on inserted tokens",
        "The mean ratio on the tokens that edits insert is below 0.2 or above 5 in the last fifth: they are trained "
        "far from the policy.",
        ["edit/inserted_ratio"],
        lambda ratio: not 0.2 <= ratio[-1] <= 5,
        lambda ratio: f"mean {ratio[-1]:.2f}",
        show="tokens",
    )
    light(
        "Value loss",
        "The critic's loss of the last fifth is more than twice its lowest fifth, and it explains less than a tenth of "
        "the returns' variance.",
        ["value_loss", "explained_variance"],
        lambda loss, explained: loss[-1] > 2 * min(loss) and explained[-1] < 0.1,
        lambda loss, explained: f"loss {loss[0]:.2g} to {loss[-1]:.2g}; explained {explained[-1]:.2f}",
    )
    light(
        "Entropy",
        "Entropy of the last fifth is less than 0.3 of the first's: answers become all alike.",
        ["entropy"],
        lambda entropy: entropy[-1] < 0.3 * entropy[0],
        lambda entropy: f"{entropy[0]:.2f} to {entropy[-1]:.2f} nats",
    )
    light(
        "Recitation",
        "In some fifth answers repeat at least half as much again of the profile as in the first, and 3 points more.",
        ["original/recited"],
        lambda said: max(said) > max(1.5 * said[0], said[0] + 0.03),
        lambda said: f"{100 * said[0]:.1f} %, at most {100 * max(said):.1f} %, last {100 * said[-1]:.1f} %",
        sort="recites",
    )
    return found


def held_out_light(metrics: list[dict]) -> list[dict]:
    """Of a supervised run: does it overfit?"""
    loss = [row["held_out_loss"] for row in metrics if row.get("held_out_loss") is not None]
    rule = "The last held-out loss is more than 5 % above the lowest one."
    if len(loss) < 2:
        return []
    state = "warn" if loss[-1] > 1.05 * min(loss) else "ok"
    return [dict(name="Overfitting", rule=rule, state=state, found=f"lowest {min(loss):.3f}, last {loss[-1]:.3f}")]
