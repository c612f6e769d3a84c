"""Names that a run folder of an earlier version uses, and their names today: a report reads folders of both."""

# In metrics.jsonl and in rows of rollouts: {name then: name today}
METRIC_NAMES: dict[str, str] = {}

# In args.json: {field then: field today}
FLAG_NAMES: dict[str, str] = {"edit_ratio": "edit_loss"}


def renamed(row: dict, names: dict[str, str]) -> dict:
    """The row under today's names; keys that are not in the table stay."""
    return {names.get(name, name): value for name, value in row.items()}
