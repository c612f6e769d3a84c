"""The curves of a page: which metrics share a panel, how a panel is named, what it means."""

# section: {title: ({metric: label}, what it means)}. A metric that no panel names gets a panel of its own, last.
PANELS = {
    "Quality": {
        "Reward": ({"original/reward": "originals", "edit/reward": "edits"}, "Scored by the judge of the run."),
        "Held-out reward": (
            {"held_out/original/reward": "originals", "held_out/edit/reward": "edits"},
            "Scored by the same judge, on prompts that are not trained on (--eval-data).",
        ),
        "Exact score": (
            {"exact/original": "originals", "exact/edit": "edits"},
            "Scored by --exact-judge, which training never sees; at most 64 answers a step.",
        ),
        "Helpfulness": ({"original/helpfulness": "originals", "edit/helpfulness": "edits"}, "From -5 to 5."),
        "Personalization": (
            {"original/personalization": "originals", "edit/personalization": "edits"},
            "From -5 to 5.",
        ),
        "Naturalness": ({"original/naturalness": "originals", "edit/naturalness": "edits"}, "From -5 to 5."),
        "Length": (
            {"original/length": "originals", "edit/length": "edits", "lost/length": "judgement failed"},
            "Tokens of a response.",
        ),
        "Persona values repeated": (
            {"original/recited": "originals", "edit/recited": "edits"},
            "Fraction of the persona's values that a response has word for word.",
        ),
        "Distinct bigrams": (
            {"original/distinct_2": "originals", "edit/distinct_2": "edits"},
            "Distinct pairs of adjacent words over all pairs, in 32 answers. Low values mean that answers are alike.",
        ),
        "Persona swap": (
            {"held_out/swap": "difference"},
            "Held-out reward minus the reward under another persona. Near 0, the answers are generic.",
        ),
        "Audit": (
            {"audit/own": "judge of the run", "audit/second": "audit judge"},
            "Mean scores of the same answers (--audit-share).",
        ),
        "Audit noise": ({"audit/noise": "|difference|"}, "Between two judgements of the same answer."),
    },
    "Edits": {
        "Gain of edits": (
            {"edit/gain": "training", "held_out/edit/gain": "held out", "exact/gain": "exact"},
            "Reward of an edit minus the reward of its original.",
        ),
        "Edits better and worse": ({"edit/improved": "better", "edit/worse": "worse"}, "Fraction of all edits."),
        "Ratio r": (
            {"edit/kept_ratio": "kept", "edit/inserted_ratio": "inserted", "edit/novel_ratio": "novel"},
            "p / q, mean per token. Novel tokens: inserted, named by the critique, and p below 0.1.",
        ),
        "Gradient mass": (
            {
                "edit/kept_gradient_mass": "kept",
                "edit/inserted_gradient_mass": "inserted",
                "edit/novel_gradient_mass": "novel",
            },
            "|weight x advantage|, mean per token of edits.",
        ),
        "Tokens without gradient": (
            {"edit/kept_clipfrac": "kept", "edit/inserted_clipfrac": "inserted", "original/clipfrac": "originals"},
            "Fraction of tokens whose weight is 0.",
        ),
    },
    "Optimization": {
        "Loss": (
            {"loss": "training", "held_out_loss": "held out", "sft_loss": "SFT term"},
            "Mean over the tokens or pairs that are trained.",
        ),
        "Accuracy": (
            {"accuracy": "training", "held_out_accuracy": "held out"},
            "Fraction of pairs with the chosen answer above the rejected one.",
        ),
        "Margin": ({"margin": "training", "held_out_margin": "held out"}, "Chosen minus rejected."),
        "Rewards of pairs": ({"chosen_reward": "chosen", "rejected_reward": "rejected"}, "By the model."),
        "Log-probs of pairs": ({"chosen_logprob": "chosen", "rejected_logprob": "rejected"}, "Sums over an answer."),
        "Learning rate": ({"lr": "learning rate"}, "With warm-up and decay."),
        "KL": ({"original/approx_kl": "originals"}, "From the policy that sampled, mean of r - 1 - log r."),
        "Entropy": ({"entropy": "entropy"}, "Of the next token, in nats."),
        "Policy loss": ({"policy_loss": "policy"}, "Mean over trained tokens."),
        "Value loss": ({"value_loss": "critic"}, "Mean over trained tokens."),
        "Explained variance": ({"explained_variance": "critic"}, "Of the returns by the values; at most 1."),
        "Gradient norm": (
            {"grad_norm_policy": "policy", "grad_norm_critic": "critic", "grad_norm": "model"},
            "Before clipping.",
        ),
        "Train-inference mismatch": (
            {
                "train_inference_mismatch": "mean",
                "train_inference_mismatch_max": "largest",
                "weight_sync_error": "after a weight sync",
            },
            "|difference| of the trainer's and the engine's log-probs of the same tokens under the same weights.",
        ),
        "Judge failures": (
            {"judge_unparsed": "unparsed", "lost/originals": "lost originals", "lost/edits": "lost edits"},
            "Judgements without scores, and responses that left the batch without a judgement, per step.",
        ),
        "Updates left out": ({"bad_steps": "so far"}, "Their loss or gradient was not finite or out of bounds."),
    },
    "Performance": {
        "Tokens per second": (
            {
                "generated_tokens_per_second": "generated",
                "trained_tokens_per_second": "trained",
                "tokens_per_second": "trained",
            },
            "Summed over all ranks.",
        ),
        "Seconds by phase": (
            {f"seconds/{phase}": phase for phase in ("rollout", "update", "score", "diagnostics", "sync_weights")}
            | {"seconds": "step"},
            "Of a step.",
        ),
        "Memory": ({"peak_memory_gib": "peak"}, "GiB, on the rank that held the most."),
        "Model FLOPs utilization": ({"mfu": "score and update"}, "Fraction of the device's peak."),
    },
}
OTHER = "Other metrics"
AXES = {"step": None, "generated tokens": "generated_tokens", "judge calls": "judge_calls", "tokens": "tokens"}


def panels_of(metrics: list[dict]) -> list[dict]:
    """Panels of the metrics that a run has: [{section, title, about, series: [[metric, label], ...]}]."""
    present = {name for row in metrics for name, value in row.items() if isinstance(value, (int, float))}
    panels = []
    named = {"step"}
    for section, titles in PANELS.items():
        for title, (labels, about) in titles.items():
            named |= set(labels)
            series = [[name, label] for name, label in labels.items() if name in present]
            if series:
                panels.append(dict(section=section, title=title, about=about, series=series))
    for name in sorted(present - named):
        panels.append(dict(section=OTHER, title=name, about="", series=[[name, name]]))
    return panels
