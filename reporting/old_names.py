"""Names that a run folder of an earlier version uses, and their names today: a report reads folders of both."""

# In metrics.jsonl and in rows of rollouts: {name then: name today}
METRIC_NAMES: dict[str, str] = {
    "edit/branch": "edit/novel",
    "edit/branch_ratio": "edit/novel_ratio",
    "edit/branch_weight": "edit/novel_weight",
    "edit/branch_clipfrac": "edit/novel_clipfrac",
    "edit/branch_mass": "edit/novel_gradient_mass",
    "edit/inserted_mass": "edit/inserted_gradient_mass",
    "edit/kept_mass": "edit/kept_gradient_mass",
    "logprob_gap": "train_inference_mismatch",
    "logprob_gap_max": "train_inference_mismatch_max",
    "refresh_gap": "weight_sync_error",
    "seconds/refresh": "seconds/sync_weights",
    "left": "drop_reason",  # of a response in OUT/lost
}

# In args.json: {field then: field today}
FLAG_NAMES: dict[str, str] = {"edit_ratio": "edit_loss"}


def renamed(row: dict, names: dict[str, str]) -> dict:
    """The row under today's names; keys that are not in the table stay."""
    return {names.get(name, name): value for name, value in row.items()}
