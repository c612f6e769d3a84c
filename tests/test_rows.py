"""Rows that a user may bring along: what is wrong in them is named by file, line and field, before any work."""

import gzip
import json
import shutil

import pytest
from conftest import error_of, grm_flags, run_script

import dpo
import generate
import ppo_cpe
import sft
import train_grm
from chat import Chat
from evaluation.annotations import read_annotations
from evaluation.answer_files import read_outputs
from json_files import read_json
from judges.journal import Journal
from prompts import answer_prompt, load_templates, persona_text, response_ids
from runtime.rows import (
    HELD_OUT,
    MADE_BY,
    MAX_DEPTH,
    ROW_FIELDS,
    final_answer,
    made_by,
    normalized,
    read_rows,
    refuse_held_out,
    write_rows,
)
from weights import MADE_BY as MODELS_MADE_BY
from weights import resolve

PROMPT = {"prompt_id": "p1", "persona": {"name": "Kim"}, "question": "What about tea?"}
ROWS = {
    "prompt": PROMPT,
    "pair": PROMPT | {"chosen": "Yes.", "rejected": "No."},
    "answer": PROMPT | {"answer": ""},
    "judgement": PROMPT
    | {"answer": "Yes.", "critique": "Fine.", "helpfulness": 1, "personalization": 0, "naturalness": -5},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "metrics": {"step": 1},
    "object": {"anything": 1},
}
HALF = "\ud83d"  # of a surrogate pair; json writes it as an escape, which is legal JSON


def write(tmp_path, *lines, name="rows.jsonl"):
    """A file of some lines: objects, texts as they are, bytes as they are."""
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    (tmp_path / name).write_bytes(b"\n".join(raw) + b"\n")
    return str(tmp_path / name)


def refused(path, kind):
    """The message with which a file is refused; it is one line that a terminal can show."""
    with pytest.raises(ValueError) as error:
        read_rows(path, kind)
    message = str(error.value)
    assert "\n" not in message and message.encode()
    return message


def test_the_rows_above_are_of_every_kind(tmp_path):
    assert ROWS.keys() == ROW_FIELDS.keys()
    for kind, row in ROWS.items():
        assert read_rows(write(tmp_path, row), kind) == [row]


# -- half a surrogate pair -----------------------------------------------------------------------------------------


def other(kind):
    """A second row of a kind; of prompts with another id."""
    return ROWS[kind] | {"prompt_id": "p2"}


@pytest.mark.parametrize("kind", ROWS)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(kind, tmp_path):
    nested = write(tmp_path, ROWS[kind], other(kind) | {"extra": [1, {"note": [f"a {HALF}"]}]})
    message = refused(nested, kind)
    assert message.startswith(f'{nested}:2: field "extra[1].note[0]" holds half of a surrogate pair')

    key = write(tmp_path, ROWS[kind], other(kind) | {"extra": {f"k{HALF}": 1}})
    message = refused(key, kind)
    assert message.startswith(f"{key}:2: field") and r"extra.k\ud83d" in message and "half of a surrogate" in message

    whole = write(tmp_path, other(kind) | {"extra": "\U0001f600"})  # json writes both halves
    assert "\\ud83d\\ude00" in (tmp_path / "rows.jsonl").read_text()
    assert read_rows(whole, kind)[0]["extra"] == "\U0001f600"


@pytest.mark.parametrize(
    "kind, field",
    [(kind, field) for kind, checks in ROW_FIELDS.items() for field, c in checks.items() if c in ("text", "string")],
)
def test_half_a_surrogate_pair_in_a_text(kind, field, tmp_path):
    path = write(tmp_path, other(kind) | {field: f"a {HALF} b"})
    assert refused(path, kind).startswith(f'{path}:1: field "{field}" holds half of a surrogate pair')


def test_half_a_surrogate_pair_in_a_message_or_persona(tmp_path):
    path = write(tmp_path, {"messages": [{"role": "user", "content": HALF}]})
    assert f'{path}:1: field "messages[0].content" holds' in refused(path, "messages")
    path = write(tmp_path, PROMPT | {"persona": {"likes": ["tea", HALF]}})
    assert f'{path}:1: field "persona.likes[1]" holds' in refused(path, "prompt")
    path = write(tmp_path, PROMPT | {"persona": f"Kim {HALF}"})
    assert f'{path}:1: field "persona" holds' in refused(path, "prompt")


# -- files ---------------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_utf8(tmp_path):
    path = write(tmp_path, PROMPT, json.dumps({"question": "Grüße"}, ensure_ascii=False).encode("latin-1"))
    assert refused(path, "object").startswith(f"{path}:2: not UTF-8 (")
    (tmp_path / "rows.jsonl").write_text(json.dumps(PROMPT), encoding="utf-16")
    assert refused(path, "object").startswith(f"{path}:1: not UTF-8 (")


def test_a_compressed_file(tmp_path):
    path = write(tmp_path, gzip.compress(json.dumps(PROMPT).encode()))
    assert refused(path, "prompt") == f"{path}: compressed with gzip; unpack it first (gunzip)"


def test_a_byte_order_mark_and_line_ends(tmp_path):
    marked = b"\xef\xbb\xbf" + json.dumps(PROMPT).encode() + b"\r"
    path = write(tmp_path, marked, json.dumps(other("prompt")) + "\r", "", " \t", "\r", "")
    assert read_rows(path, "prompt") == [PROMPT, other("prompt")]
    assert refused(write(tmp_path, b"\xef\xbb\xbf"), "prompt") == f"{path}: empty, expected prompt rows"
    assert refused(write(tmp_path, "", " ", ""), "prompt") == f"{path}: empty, expected prompt rows"


def test_a_blank_line_in_the_middle(tmp_path):
    for blank in ("", "  ", "\r"):
        path = write(tmp_path, PROMPT, blank, other("prompt"))
        assert refused(path, "prompt") == f"{path}:2: a blank line between rows"
    path = write(tmp_path, "", PROMPT)
    assert refused(path, "prompt") == f"{path}:1: a blank line between rows"


def test_unicode_line_separators_are_text(tmp_path):
    rows = [PROMPT | {"question": "a\u2028b\x85c\x0b?"}, other("prompt")]
    path = write(tmp_path, *(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_rows(path, "prompt") == rows
    path = write(tmp_path, json.dumps(rows[0], ensure_ascii=False), "[]")
    assert refused(path, "prompt").startswith(f"{path}:2: expected a JSON object (prompt row), found list")


@pytest.mark.parametrize("end", ["1", '"\\ud83d"'])
def test_deep_nesting_ends_in_a_message(end, tmp_path):
    """It is refused by a rule: what recursion allows depends on who calls, and ends in a traceback."""
    for depth in (150, 400, 900, 990, 100_000):
        for mark in ("[]", '{"a":}'):
            deep = mark[:-1] * depth + end + mark[-1] * depth
            path = write(tmp_path, PROMPT, json.dumps(other("prompt"))[:-1] + f', "extra": {deep}}}')
            assert refused(path, "prompt").startswith(
                (f"{path}:2: not JSON (", f"{path}:2: objects and lists nested more than 100 deep")
            )


def test_other_json_that_is_nested_too_deep_is_named(tmp_path):
    """What a user names and what a run has left behind: one line, no traceback."""
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    for read in (read_annotations, read_json, read_outputs, generate.read_persona):
        with pytest.raises(ValueError, match=f"{file}: not JSON"):
            read(str(file))
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/x.0.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="x.0.jsonl:1: no row of a journal"):
        Journal(str(tmp_path), "x", 0).rows()


def test_a_persona_on_the_command_line(tmp_path):
    long = {"about": "x" * 5000}  # longer than a file's name may be
    assert generate.read_persona(json.dumps(long)) == long
    with pytest.raises(ValueError, match="--persona: not JSON"):
        generate.read_persona('{"a":' * 100_000)
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        generate.read_persona('{"a":' * 150 + "1" + "}" * 150)


def test_nesting_that_is_allowed_can_be_used(tmp_path):
    persona = "tea"
    for _ in range(MAX_DEPTH // 2 - 1):
        persona = {"likes": [persona]}
    (row,) = read_rows(write(tmp_path, PROMPT | {"persona": persona}), "prompt")
    assert persona_text(row["persona"]).rstrip().endswith("tea")


def test_many_brackets_are_no_deep_nesting(tmp_path):
    row = PROMPT | {"persona": {"likes": [["tea"]] * 500, "said": "[{" * 500}}
    assert read_rows(write(tmp_path, row), "prompt") == [row]


def test_a_prompt_id_that_stands_twice(tmp_path):
    path = write(tmp_path, PROMPT, other("prompt"), PROMPT)
    assert refused(path, "prompt") == f'{path}:3: prompt_id "p1" stands at {path}:1 too'
    path = write(tmp_path, ROWS["pair"], ROWS["pair"])  # a prompt has several pairs
    assert len(read_rows(path, "pair")) == 2


@pytest.mark.parametrize("start", MADE_BY)
def test_a_missing_default_names_what_makes_it(start):
    with pytest.raises(FileNotFoundError) as error:
        read_rows(f"{start}not_there.jsonl", "pair")
    message = str(error.value)
    assert message.startswith(f"{start}not_there.jsonl: no such file; expected JSON lines (pair rows); ")
    assert ".py" in message and message.endswith(MADE_BY[start])


def test_a_missing_file_of_the_users_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected JSON lines \(pair rows\)$"):
        read_rows(str(tmp_path / "none.jsonl"), "pair")
    assert made_by("out/world/pairs.jsonl") == "; run data/persona_world.py first"
    assert made_by("elsewhere/out/world/pairs.jsonl") == made_by("out/mine") == ""


def test_a_missing_default_model_names_the_script_that_makes_it():
    for folder, script in MODELS_MADE_BY.items():
        with pytest.raises(ValueError, match=f"no such folder; run {script} first"):
            resolve(f"{folder}nowhere")


@pytest.mark.parametrize(
    "path", ["out/mymodel", "./mymodel", "runs/mymodel", "/nowhere", "a/b/c", "~/m", "", "../m", "rows.jsonl"]
)
def test_the_hub_is_not_asked_for_a_folder(monkeypatch, tmp_path, path):
    """A path in `out`, or in a folder that is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **_: asked.append(names))
    with pytest.raises(ValueError, match="is not a folder; expected a model's folder, or a hub id"):
        resolve(path)
    assert asked == []
    assert resolve("Qwen/Qwen3-8B") is None and asked == [("Qwen/Qwen3-8B",)]


# -- judgements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["<critique>", "</critique>", "<scores>", "</scores>", "<checks>"])
@pytest.mark.parametrize("field", ["critique", "checks"])
def test_a_judgement_with_a_tag_of_its_form_is_refused(field, tag, tmp_path):
    path = write(tmp_path, ROWS["judgement"], ROWS["judgement"] | {field: f"Say {tag} less."})
    assert refused(path, "judgement").startswith(f'{path}:2: field "{field}"')
    row = ROWS["judgement"] | {field: "Say <b> less. </answer>"}
    assert read_rows(write(tmp_path, row), "judgement") == [row]


@pytest.mark.parametrize("checks", [5, ["food raw raw right"]])
def test_checks_that_are_no_text_are_refused(checks, tmp_path):
    path = write(tmp_path, ROWS["judgement"], ROWS["judgement"] | {"checks": checks})
    assert refused(path, "judgement").startswith(f'{path}:2: field "checks" is {json.dumps(checks)}, expected a string')


# -- thoughts of reasoning models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Take tea.", "Take tea."),
        ("<think>\nHm.\n</think>\n\nTake tea.", "Take tea."),
        ("\n<think></think> Take tea.", "Take tea."),
        ("Hm, a nurse.\n</think>\n\nTake tea.", "Take tea."),  # the template has opened the block
        ("<think>It ends in </think>, I guess.</think>Take tea.", "Take tea."),
        ("<think>a</think><think>b</think>Take tea.", "Take tea."),
        ("<thinking>Hm.</thinking>Take tea.", "Take tea."),
        ("[THINK]Hm.[/THINK]Take tea.", "Take tea."),
        ("◁think▷Hm.◁/think▷Take tea.", "Take tea."),
        ("<seed:think>Hm.</seed:think>Take tea.", "Take tea."),
        ("Models write <think> and </think> around thoughts.", "Models write <think> and </think> around thoughts."),
        ("<think>Hm, a nurse", None),
        ("<think>Hm.</think>\n", None),
        ("Hm.</think>", None),
        (" \n", None),
    ],
)
def test_the_answer_of_a_reply(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("thoughts", ["<think>Hm.</think>", "Hm.</think>", "[THINK]Hm.[/THINK]", "<think>Hm. "])
@pytest.mark.parametrize(
    "kind, field",
    [("pair", "chosen"), ("pair", "rejected"), ("judgement", "answer"), ("answer", "answer"), ("prompt", "reference")],
)
def test_answers_with_thoughts_are_refused(kind, field, thoughts, tmp_path):
    """On Qwen3 they would be trained as a second block, as text."""
    path = write(tmp_path, ROWS[kind], other(kind) | {field: f"{thoughts}\n\nYes."})
    assert refused(path, kind).startswith(f'{path}:2: field "{field}" begins with the thoughts of a reasoning model (')
    for text in ("<think>\n\n</think>\n\nYes.", "Write <think> and </think>."):
        assert read_rows(write(tmp_path, ROWS[kind] | {field: text}), kind)[0][field] == text


def test_outputs_with_thoughts_are_refused(tmp_path):
    outputs = [{"instruction": "Q", "output": "Yes."}, {"instruction": "R", "output": "Hm.</think>Yes."}]
    (tmp_path / "outputs.json").write_text(json.dumps(outputs))
    with pytest.raises(ValueError, match='outputs.json, entry 1: field "output" begins with the thoughts'):
        read_outputs(str(tmp_path / "outputs.json"))


def test_turns_with_thoughts_are_refused(tmp_path):
    def turns(answer):
        user = {"role": "user", "content": "Why </think>?"}
        return {"messages": [user, {"role": "assistant", "content": "Hello"}, user, answer]}

    path = write(tmp_path, turns({"role": "assistant", "content": "<think>Hm.</think>Yes."}))
    assert refused(path, "messages").startswith(f'{path}:1: field "messages[3].content" begins with the thoughts')
    read_rows(write(tmp_path, turns({"role": "assistant", "content": "Yes."})), "messages")


# -- conversations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "  \n", "<think>\n\n</think>\n"])
def test_an_empty_turn_of_the_assistant_is_refused(content, tiny, tmp_path, capsys):
    user = {"role": "user", "content": "Hi"}
    turns = [user, {"role": "assistant", "content": "Hello"}, user, {"role": "assistant", "content": content}]
    path = write(tmp_path, ROWS["messages"], {"messages": turns})
    error = error_of(sft, capsys, "--model", tiny / "checkpoint", "--data", path, "--out", tmp_path / "out")
    assert error.startswith(f"error: {path}:2: messages[3] is empty")


def test_a_conversation_that_the_assistant_opens(tiny, tmp_path, capsys):
    opened = {"messages": [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]}
    path = write(tmp_path, ROWS["messages"], ROWS["messages"], opened)
    error = error_of(sft, capsys, "--model", tiny / "checkpoint", "--data", path, "--out", tmp_path / "out")
    assert error.startswith(f"error: {path}:3: messages[0]: expected a message of the user")
    assert not (tmp_path / "out").exists()


# -- rows that went through a table --------------------------------------------------------------------------------

OTHERS = {"name": "Ben", "job": {"title": "nurse", "since": 1999}, "pets": [{"cat": "Mia"}]}


@pytest.mark.parametrize("kind", ["prompt", "pair", "answer", "judgement"])
def test_a_table_leaves_no_traces_in_rows(kind, tmp_path):
    """Arrow gives each row the keys of all others, as null. pandas writes NaN for them, and integers as floats."""
    from datasets import Dataset

    rows = [ROWS[kind] | {"persona": {"name": "Kim", "age": 36}}, other(kind) | {"persona": OTHERS, "tier": "hard"}]
    Dataset.from_list([{"tier": None} | row for row in rows]).to_json(str(tmp_path / "arrow.jsonl"), force_ascii=False)
    lines = (tmp_path / "arrow.jsonl").read_text().splitlines()
    assert '"job":null' in lines[0] and '"tier":null' in lines[0]
    assert read_rows(str(tmp_path / "arrow.jsonl"), kind) == rows
    table = [json.loads(line.replace("36", "36.0").replace("null", "NaN")) for line in lines]
    if kind == "judgement":
        table[0]["helpfulness"] = 1.0
    path = write(tmp_path, *table)
    assert "NaN" in (tmp_path / "rows.jsonl").read_text()
    assert read_rows(path, kind) == rows
    assert persona_text(read_rows(path, kind)[0]["persona"]) == "name: Kim\nage: 36"


def test_a_table_leaves_no_traces_in_input_of_generate_and_conversations(tiny, tmp_path):
    plain = {"persona": {"name": "Kim"}, "question": "What about tea?"}
    chat, templates = Chat(str(tiny / "checkpoint")), load_templates(None)
    table = plain | {"persona": {"name": "Kim", "job": None, "age": float("nan")}, "messages": None, "prompt_ids": None}
    path = write(tmp_path, table)
    expected = generate.row_prompt(plain, chat, templates, path)
    assert generate.row_prompt(normalized(read_rows(path, "object")[0]), chat, templates, path) == expected
    assert generate.read_persona(json.dumps(table["persona"])) == {"name": "Kim"}
    pairs = [ROWS["pair"] | {"messages": None}, other("pair")]
    args = sft.Args(data=write(tmp_path, *pairs), batch_size=2)
    assert len(sft.read_examples(args, chat, templates, 8192)) == 2
    turns = [message | {"name": None} for message in ROWS["messages"]["messages"]]
    assert read_rows(write(tmp_path, {"messages": turns, "chosen": None}), "messages") == [ROWS["messages"]]


def test_numbers_that_are_no_value_in_json(tmp_path):
    path = write(tmp_path, PROMPT | {"persona": {"height": float("inf")}})
    assert refused(path, "prompt").startswith(f"{path}:1: Out of range float values are not JSON compliant")


def test_annotations_with_a_byte_order_mark(tmp_path):
    row = dict(instruction="Q", output_1="a", output_2="b", generator_1="x", generator_2="y", preference=2.0)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([row]))
    assert read_annotations(str(tmp_path / "a.json"))[0]["output_1"] == "a"


# -- held-out rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_training_refuses_a_persona_or_prompt_that_is_held_out_beside_it(held_out, tmp_path):
    persona = {"likes": ["tea"], "name": "Kim"}
    other_persona = PROMPT | {"prompt_id": "p2", "persona": "Ben"}
    path = write(tmp_path, other_persona, PROMPT | {"persona": persona})
    kept = write(tmp_path, other_persona | {"prompt_id": "p3", "persona": "Eva"}, name=f"{held_out}.jsonl")
    refuse_held_out(path)

    same_persona = PROMPT | {"prompt_id": "p4", "persona": dict(reversed(persona.items())), "question": "Other?"}
    write(tmp_path, same_persona, name=f"{held_out}.jsonl")
    with pytest.raises(ValueError, match=f"{path}:2: its persona is held out, at {kept}:1"):
        refuse_held_out(path)
    write(tmp_path, "", name=f"{held_out}.jsonl")  # annotate.py leaves an empty file where nothing is held out
    refuse_held_out(path)
    write(
        tmp_path, PROMPT | {"persona": "Eva"}, PROMPT | {"prompt_id": "p2", "persona": "Tom"}, name=f"{held_out}.jsonl"
    )
    with pytest.raises(ValueError, match=f"{path}:1: its prompt_id is held out, at {kept}:2"):
        refuse_held_out(path)


@pytest.mark.parametrize("script", [sft, dpo, train_grm, ppo_cpe])
def test_every_training_script_refuses_held_out_rows(script, tiny, tmp_path, capsys):
    name, flag, size = {
        sft: ("pairs", "--data", ["--batch-size", 2]),
        dpo: ("pairs", "--data", ["--batch-size", 2]),
        train_grm: ("judgements", "--data", ["--batch-size", 2]),
        ppo_cpe: ("prompts", "--prompts", ["--max-new-tokens", 4]),
    }[script]
    lines = (tiny / f"{name}.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "prompts_winrate.jsonl").write_text(lines.splitlines()[4] + "\n")
    flags = ["--model", tiny / "checkpoint", flag, tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    error = error_of(script, capsys, *flags, *size)
    assert f"{tmp_path}/rows.jsonl:5: its" in error and "prompts_winrate.jsonl:1" in error
    assert not (tmp_path / "out").exists()


def test_what_sft_learns_of_pairs_and_conversations(tiny):
    """Chosen answers and the assistant's turns, with what ends them; nothing of prompts and the user's turns."""
    chat = Chat(str(tiny / "checkpoint"))
    templates = load_templates(None, answer_template=str(tiny / "answer.txt"))
    pairs = str(tiny / "pairs.jsonl")
    examples = sft.read_examples(sft.Args(data=pairs, batch_size=1), chat, templates, 8192)
    for (ids, loss_mask), row in zip(examples, read_rows(pairs, "pair"), strict=True):
        x, y = answer_prompt(chat, templates, row), response_ids(chat, row["chosen"])
        assert (ids, loss_mask) == (x + y, [False] * len(x) + [True] * len(y))
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    texts = ("S", "Tea?", "Yes.", "Jazz?", "No.", "Why?")
    ids, loss_mask = sft.conversation(chat, [dict(role=role, content=text) for role, text in zip(roles, texts)])
    learned = [token for token, is_learned in zip(ids, loss_mask, strict=True) if is_learned]
    assert learned == response_ids(chat, "Yes.") + response_ids(chat, "No.") and "Why?" not in chat.decode(ids)
    scratch = sft.Args(data=pairs, batch_size=1, from_scratch=str(tiny / "tokenizer"))
    for ids, loss_mask in sft.read_examples(scratch, chat, templates, 8192):
        assert loss_mask == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("script, name", [(sft, "pairs"), (dpo, "pairs"), (train_grm, "judgements")])
def test_no_row_is_trained_beyond_the_models_positions(tiny, tmp_path, capsys, script, name):
    shutil.copytree(tiny / "checkpoint", tmp_path / "short")
    config = tmp_path / "short/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 16}))
    flags = ["--model", tmp_path / "short", "--data", tiny / f"{name}.jsonl", "--out", tmp_path / "out"]
    assert "no row is within 16 tokens, the lower of --max-length and the model's" in error_of(script, capsys, *flags)


def test_no_row_is_judged_beyond_the_models_positions(tiny, tmp_path):
    rows = read_rows(str(tiny / "judgements_other.jsonl"), "judgement")[:3]
    rows[1] = rows[1] | {"answer": "So. " * 40000}
    write_rows(str(tmp_path / "held_out.jsonl"), rows)
    flags = ["--max-steps", 1, "--eval-data", tmp_path / "held_out.jsonl"]
    run_script("train_grm.py", *grm_flags(tiny), *flags, "--out", tmp_path / "grm")
    assert json.loads((tmp_path / "grm/held_out.json").read_text())["judged"] == 2


def test_a_conversation_with_its_answer_is_no_input_of_generate(tiny):
    chat, templates = Chat(str(tiny / "checkpoint")), load_templates(None)
    with pytest.raises(ValueError, match="rows.jsonl:1: the last message is the assistant's"):
        generate.row_prompt(ROWS["messages"], chat, templates, "rows.jsonl:1")
