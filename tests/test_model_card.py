"""The model card of a run's last weights, and --push-to-hub with a stand-in for the hub."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from conftest import error_of, grm_flags, parse, read_metrics, run_script
from huggingface_hub.repocard import metadata_load

import sft
import train_grm
from runtime import flags, model_card

CARD = "---\nlicense: other\nlicense_name: acme\nbase_model: acme/base-7b\n---\n# Base\n"


def flags_of(tiny, out, model=None):
    model = ["--model", model or tiny / "checkpoint"]
    data = ["--data", tiny / "pairs.jsonl", "--answer-template", tiny / "answer.txt"]
    return [*model, *data, "--batch-size", 4, "--max-steps", 1, "--out", out]


def run(*words):
    sft.main(parse(sft.Args, sft.__doc__, [str(word) for word in words]))


def test_the_last_weights_have_a_model_card(tiny, tmp_path):
    """Base model, data, flags, metrics and licence; the next stage passes on the base model and its licence."""
    base = shutil.copytree(tiny / "checkpoint", tmp_path / "base")
    (base / "README.md").write_text(CARD)
    run_script("sft.py", *flags_of(tiny, tmp_path / "sft", base))
    card = (tmp_path / "sft/policy/README.md").read_text()
    licence = dict(license="other", license_name="acme", base_model="acme/base-7b")
    metadata = metadata_load(tmp_path / "sft/policy/README.md")
    assert metadata == licence | dict(library_name="transformers", tags=["critique-post-edit"])
    assert f"Trained from `{base}` (which was trained from acme/base-7b) by `sft.py`" in card
    assert f"| `--data` | {tiny / 'pairs.jsonl'} |" in card and "| `--batch-size` | 4 |" in card
    assert "--lr" not in card  # as by default
    inputs = json.loads((tmp_path / "sft/args.json").read_text())["inputs"]
    assert all(f"| {name} | {digest} |" in card for name, digest in inputs.items())
    (metrics,) = read_metrics(tmp_path / "sft")
    assert "## Metrics of step 1" in card and f"| loss | {metrics['loss']:.4g} |" in card
    run_script("dpo.py", *flags_of(tiny, tmp_path / "dpo", tmp_path / "sft/policy"))
    assert metadata_load(tmp_path / "dpo/policy/README.md").items() >= licence.items()


@pytest.mark.parametrize("readme", [None, "No metadata here.", "---\nlicense: [\n---\n", "---\n- a\n---\n"])
def test_a_base_model_without_a_card_has_no_licence(tiny, tmp_path, readme):
    base = shutil.copytree(tiny / "checkpoint", tmp_path / "base")
    if readme:
        (base / "README.md").write_text(readme)
    run(*flags_of(tiny, tmp_path / "sft", base))
    file = tmp_path / "sft/policy/README.md"
    assert "Licence: not known." in file.read_text() and set(metadata_load(file)) == {"library_name", "tags"}


def test_weights_from_scratch_have_no_base_model(tiny, tmp_path):
    tokenizer = shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    (tokenizer / "README.md").write_text(CARD)
    size = ("--hidden-size", 32, "--intermediate-size", 32, "--layers", 1, "--heads", 2)
    run(*flags_of(tiny, tmp_path / "base"), "--from-scratch", tokenizer, *size)
    file = tmp_path / "base/policy/README.md"
    assert "Trained from random weights" in file.read_text() and "license" not in metadata_load(file)


def test_the_card_of_a_reward_model_has_its_agreement(tiny, tmp_path):
    run_script("train_grm.py", *grm_flags(tiny), "--max-steps", 1, "--out", tmp_path / "grm")
    agreement = json.loads((tmp_path / "grm/held_out.json").read_text())
    assert f"| held-out judgements: judged | {agreement['judged']} |" in (tmp_path / "grm/model/README.md").read_text()


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: keeps what is uploaded. It is unreachable while `down` says why."""
    found = SimpleNamespace(repos={}, files=set(), down=None)

    class Api:
        def create_repo(self, repo, private, exist_ok):
            if found.down:
                raise ConnectionError(found.down)
            found.repos[repo] = private

        def upload_folder(self, repo_id, folder_path, commit_message):
            found.files = set(os.listdir(folder_path))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(model_card, "HfApi", Api)
    monkeypatch.setattr(model_card, "get_token", lambda: "token")
    return found


def test_the_last_weights_go_to_the_hub(tiny, tmp_path, hub, capsys):
    """Into a new repository that is private. A run that has ended is pushed by the same command with the flag."""
    run(*flags_of(tiny, tmp_path / "sft"))
    assert hub.repos == {}
    pushed = [*flags_of(tiny, tmp_path / "sft"), "--push-to-hub", "me/mine"]
    hub.down = "no route"
    message = error_of(sft, capsys, *pushed)
    assert "--push-to-hub me/mine: ConnectionError: no route; the weights are in" in message
    hub.down = None
    run(*pushed)
    assert hub.repos == {"me/mine": True} and hub.files >= {"README.md", "config.json", "model.safetensors"}
    assert "pushed: https://hub/me/mine/commit/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "repo, token, said", [("a/b/c", "token", "a/b/c"), ("..", "token", ".."), ("a/b", None, "no token")]
)
def test_a_push_that_cannot_work_ends_before_any_work(tiny, tmp_path, hub, monkeypatch, capsys, repo, token, said):
    monkeypatch.setattr(model_card, "get_token", lambda: token)
    message = error_of(sft, capsys, *flags_of(tiny, tmp_path / "sft"), "--push-to-hub", repo)
    assert message.startswith(f"error: --push-to-hub {repo}: ") and said in message
    assert not (tmp_path / "sft").exists() and hub.repos == {}


def test_flags_that_are_not_the_default():
    """Also of train_grm.py, whose defaults are those of the objective."""
    assert flags.record(sft.Args(batch_size=4)).items() >= dict(batch_size=4, non_default=["batch_size"]).items()
    for objective in ("grm", "bt"):
        args = train_grm.with_defaults(train_grm.Args(objective=objective))
        assert flags.non_default(args) == ([] if objective == "grm" else ["objective"])
        other = train_grm.with_defaults(train_grm.Args(objective=objective, lr=0.5))
        assert flags.non_default(other) == [*flags.non_default(args), "lr"]
