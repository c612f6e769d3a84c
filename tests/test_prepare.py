"""data/prepare.py: every layout gives the same rows; broken input names its place."""

import csv
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from data import prepare
from runtime.rows import read_rows

PERSONAS = {
    f"User{n}_aB{n}": {"Name": f"用户{n}", "Likes": [f"茶{n}", "山"], "Home": {"City": f"C{n}"}} for n in range(20)
}
PAIRS = [
    {"user_id": user, "question": f"问题{n % 3}？{user}", "chosen": f"好{n}", "reject": f"坏{n}"}
    for n, user in enumerate([*PERSONAS] * 2)
]


def rl_row(persona, question, truth="<answer>\n一个回答\n</answer>"):
    """The release's form: rules, persona as indented JSON, an example, the question."""
    profile = json.dumps(persona, ensure_ascii=False, indent=2)
    text = (
        f"\n你需要模拟AI助手。\n\n当前用户配置：\n{profile}\n\n"
        f'根据用户配置生成。\n如果问题是"例子？"，则\n<answer>\n例\n</answer>\n\n\n'
        f"以下是用户问题：{question}\n\n生成1个完全个性化回答：\n"
    )
    return {
        "data_source": "persona",
        "prompt": [{"role": "user", "content": text}],
        "ability": "alignment",
        "reward_model": {"ground_truth": truth, "style": "model"},
        "extra_info": {"index": 1, "split": "test"},
    }


RL = [rl_row({"Name": f"R{n}", "Text": "以下是用户问题：假"}, f"\n怎么\n办{n}？") for n in range(20)]


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def flat(folder, personas=None, pairs=PAIRS, rl=RL):
    personas = PERSONAS if personas is None else personas
    named = [{"user_id": user, "persona": persona} for user, persona in personas.items()]
    write_lines(folder / "personas.jsonl", named)
    write_lines(folder / "rm_pairs.jsonl", [{**pair, "tier": "mid"} for pair in pairs])
    write_lines(folder / "rl_prompts.jsonl", rl)
    return str(folder)


def authors(folder):
    for user, persona in PERSONAS.items():
        file = folder / "eval/data/persona_all" / f"{user}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(persona))
    write_lines(folder / "eval/data/rm_benchmark_all/specific_mid.jsonl", PAIRS)
    write_lines(folder / "eval/baseline.jsonl", [{"question": "x", "response": "z"}])
    from datasets import Dataset

    (folder / "eval/data/RL_data").mkdir()
    Dataset.from_list(RL).to_parquet(str(folder / "eval/data/RL_data/test.parquet"))
    return str(folder)


def hub(folder):
    place = {user: n for n, user in enumerate(PERSONAS, 1)}
    write_lines(folder / "persona/all_personas.jsonl", PERSONAS.values())
    pairs = [{**pair, "user_id": place[pair["user_id"]]} for pair in PAIRS]
    write_lines(folder / "data/spedific/medium.jsonl", pairs)
    write_lines(folder / "train_rl.jsonl", RL)
    return str(folder)


def run(source, output, **flags):
    prepare.main(prepare.Args(source=source, output=str(output), **flags))
    return {file.stem: read_rows(str(file), "pair" if "pairs" in file.stem else "prompt") for file in output.iterdir()}


def without_origin(part):
    """Rows less what differs between layouts, in an order that does not."""
    origin = ("source", "user_id", "kind")
    rows = [{k: v for k, v in row.items() if k not in origin} for row in part]
    return sorted(rows, key=json.dumps)


def test_every_layout_gives_the_same_rows(tmp_path, capsys):
    results = {}
    for layout in (flat, authors, hub):
        source = layout(tmp_path / layout.__name__)
        results[layout.__name__] = run(source, tmp_path / "out" / layout.__name__, eval_share=0.3)
    for name in ("authors", "hub"):
        assert results[name].keys() == results["flat"].keys()
        for file, part in results[name].items():
            assert without_origin(part) == without_origin(results["flat"][file])
        assert {pair["kind"] for pair in results[name]["pairs"]} == {"specific"}
    assert "not used, 1 other files: eval/baseline.jsonl" in capsys.readouterr().out

    rows = results["flat"]
    assert len(rows["pairs"]) + len(rows["pairs_eval"]) == 40
    assert {pair["tier"] for pair in rows["pairs"]} == {"mid"}
    pair = next(p for p in rows["pairs"] + rows["pairs_eval"] if p["chosen"] == "好7")
    assert (pair["rejected"], pair["persona"]) == ("坏7", PERSONAS["User7_aB7"])
    prompts = rows["prompts_train"] + rows["prompts_eval"]
    prompt = next(p for p in prompts if p["persona"]["Name"] == "R5")
    assert prompt["question"] == "怎么\n办5？" and prompt["reference"] == "一个回答"
    trained = {row["persona"]["Name"] for row in rows["prompts_train"] + rows["pairs"]}
    held_out = {row["persona"]["Name"] for row in rows["prompts_eval"] + rows["pairs_eval"]}
    assert held_out and not trained & held_out


def test_what_is_left_out_is_counted(tmp_path, capsys):
    bad = [PAIRS[0], {**PAIRS[1], "reject": PAIRS[1]["chosen"]}, {**PAIRS[2], "chosen": " \n"}]
    rows = run(flat(tmp_path / "in", pairs=PAIRS + bad), tmp_path / "out", eval_share=0.0)
    assert sorted(rows) == ["pairs", "prompts_train"] and len(rows["pairs"]) == 40
    printed = capsys.readouterr().out
    for line in (
        "40 pairs",
        "0 pairs_eval: not written",
        "1 left out: repeated pairs",
        "1 left out: pairs of two equal answers",
        "1 left out: pairs with a blank",
    ):
        assert line in printed


def broken(row, **changes):
    return {k: v for k, v in {**row, **changes}.items() if v is not ...}


BAD_RL = rl_row({"Name": "A"}, "x")
BAD_RL["prompt"][0]["content"] = BAD_RL["prompt"][0]["content"].replace('"Name": "A"', '"Name": "A')


@pytest.mark.parametrize(
    "sources, problem",
    [
        ({"personas": {**PERSONAS, "X": {}}}, r"personas.jsonl:21: .*persona.* is \{\}"),
        ({"personas": {**PERSONAS, "X": None}}, r"personas.jsonl:21: .*persona.* is null"),
        ({"personas": {**PERSONAS, "X": '{"Name": '}}, r"personas.jsonl:21: .*not JSON"),
        ({"pairs": [*PAIRS, broken(PAIRS[0], user_id="Nobody")]}, r"rm_pairs.jsonl:41: .*Nobody"),
        ({"pairs": [*PAIRS, broken(PAIRS[0], reject=...)]}, r"rm_pairs.jsonl:41: .*reject"),
        ({"rl": [*RL, BAD_RL]}, r"rl_prompts.jsonl:21: the persona in the prompt is not JSON"),
        ({"rl": [*RL, rl_row({}, "x")]}, r"rl_prompts.jsonl:21: .*persona.* is \{\}"),
        ({"rl": [*RL, rl_row({"a": 1}, " ")]}, r"rl_prompts.jsonl:21: no question"),
        ({"rl": [*RL, broken(RL[0], prompt="text")]}, r'rl_prompts.jsonl:21: field "prompt"'),
    ],
)
def test_broken_rows_name_their_place(tmp_path, sources, problem):
    with pytest.raises(ValueError, match=problem):
        run(flat(tmp_path / "in", **sources), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_line_for_a_source_that_has_nothing(tmp_path):
    command = [sys.executable, f"{ROOT}/data/prepare.py", "--source", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "neither pairs nor RL prompts" in result.stderr
    assert "Traceback" not in result.stderr


def test_rows_of_an_earlier_source_do_not_stay_beside_new_ones(tmp_path):
    run(flat(tmp_path / "in"), tmp_path / "out", eval_share=0.3)
    with pytest.raises(ValueError, match="pairs.jsonl is of another source"):
        run(flat(tmp_path / "in", pairs=[]), tmp_path / "out", eval_share=0.3)


# -- the baseline's file, and releases that are for evaluation only


def test_questions_of_the_baseline(tmp_path):
    """Their personas are held out; the answer is the reference; tiers by place; a repeated question counts once."""
    source = tmp_path / "in"
    flat(source)
    names = list(PERSONAS)[:6]
    rows = [
        {"question": f"Q{i}?", "persona": json.dumps(PERSONAS[names[i // 50]]), "response": f"A{i}"} for i in range(300)
    ]
    rows[299] = rows[298]
    write_lines(source / "gpt4o_baseline.jsonl", rows)
    written = run(str(source), tmp_path / "out", eval_share=0.0)
    found = written["prompts_winrate"]
    assert len(found) == 299 and found[170]["reference"] == "A170"
    tiers = [(row["kind"], row["tier"]) for row in found]
    assert tiers[0] == ("specific", "easy") and tiers[149] == ("specific", "hard") and tiers[150] == ("general", "easy")
    assert tiers.count(("general", "hard")) == 49
    trained = {row["persona"]["Name"] for row in written["pairs"] + written["prompts_train"]}
    asked = {row["persona"]["Name"] for row in found}
    assert len(asked) == 6 and not trained & asked and "prompts_eval" in written
    write_lines(source / "gpt4o_baseline.jsonl", rows[:20] + [{**rows[0], "persona": "{}"}])
    with pytest.raises(ValueError, match=r"baseline.jsonl:21: .*persona"):
        run(str(source), tmp_path / "again", eval_share=0.0)


def test_alpaca_eval_with_personas(tmp_path):
    outputs = [{"instruction": f"Do {i}", "output": f"Done {i}", "generator": "g"} for i in range(30)]
    file = tmp_path / "in/alpaca_eval_gpt4_baseline.json"
    file.parent.mkdir()
    file.write_text(json.dumps(outputs))
    (tmp_path / "in/alpaca_eval.json").write_text(json.dumps(outputs[:3]))  # the baseline's file is taken
    with pytest.raises(ValueError, match="give --personas"):
        run(str(tmp_path / "in"), tmp_path / "out")
    flat(tmp_path / "pool")
    settings = dict(personas=str(tmp_path / "pool"))
    rows = run(str(tmp_path / "in"), tmp_path / "out", **settings)["alpaca_eval"]
    assert [row["question"] for row in rows] == [o["instruction"] for o in outputs]  # difficulties go by place
    assert [row["reference"] for row in rows] == [o["output"] for o in outputs]
    assert all(row["persona"] == PERSONAS[row["user_id"]] for row in rows)
    assert "seed 0, of 20 personas" in rows[0]["assigned"]
    assert len({row["user_id"] for row in rows}) > 5
    assert run(str(tmp_path / "in"), tmp_path / "same", **settings)["alpaca_eval"] == rows
    assert run(str(tmp_path / "in"), tmp_path / "other", seed=1, **settings)["alpaca_eval"] != rows
    file.rename(tmp_path / "in/b.json")
    with pytest.raises(ValueError, match="several files of outputs"):
        run(str(tmp_path / "in"), tmp_path / "no", **settings)


def personamem(folder, **changes):
    """Two questions after a context, in the release's form: one list of options is JSON, one a Python literal."""
    folder.mkdir(parents=True, exist_ok=True)
    context = [
        {"role": "system", "content": "Kim likes tea."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": 'I moved\nto "Oslo".'},
    ]
    write_lines(folder / "shared_contexts_32k.jsonl", [{"c1": context}])
    options = [f"({letter}) Option, {letter}'s" for letter in "bacd"]
    row = (
        dict(
            persona_id="7",
            question_id="q1",
            question_type="recall_user_shared_facts",
            topic="food",
            user_question_or_message="What, \n then?",
            correct_answer="(b)",
            all_options=json.dumps(options),
            shared_context_id="c1",
            end_index_in_shared_context="3",
        )
        | changes
    )
    with open(folder / "questions_32k.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, list(row))
        out.writeheader()
        out.writerow(row)
        out.writerow(row | {"question_id": "q2", "all_options": repr(options), "end_index_in_shared_context": "4"})
    return str(folder), context


def test_personamem(tmp_path):
    source, context = personamem(tmp_path / "in")
    prepare.main(prepare.Args(source=source, output=str(tmp_path / "out")))
    rows = read_rows(str(tmp_path / "out/personamem_32k.jsonl"), "prompt")
    assert [row["prompt_id"] for row in rows] == ["q1", "q2"] and [row["end_index"] for row in rows] == [3, 4]
    for row in rows:
        assert row["options"] == [f"Option, {letter}'s" for letter in "abcd"] and row["correct"] == "b"
        assert row["persona"] == "Kim likes tea." and row["question"] == "What, \n then?" and row["version"] == "v1 32k"
        assert row["kind"] == row["question_type"] == "recall_user_shared_facts" and row["user_id"] == "7"
    assert read_rows(str(tmp_path / "out/personamem_32k_contexts.jsonl"), "messages") == [
        {"context_id": "c1", "messages": context}
    ]


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"end_index_in_shared_context": "5"}, 'row 1: no context "c1" with 5 messages'),
        ({"shared_context_id": "c2"}, 'row 1: no context "c2"'),
        ({"correct_answer": "(e)"}, "row 1: expected options"),
        ({"all_options": "['(a) x', '(b) y']"}, "row 1: expected options"),
        ({"all_options": "import os"}, 'row 1: field "all_options" is no list'),
    ],
)
def test_broken_personamem(tmp_path, changes, problem):
    source, _ = personamem(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=problem):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_personamem_without_its_contexts(tmp_path):
    source, _ = personamem(tmp_path / "in")
    (tmp_path / "in/shared_contexts_32k.jsonl").unlink()
    with pytest.raises(ValueError, match="its contexts are missing; expected .*shared_contexts_32k.jsonl"):
        run(source, tmp_path / "out")


def test_rewardbench(tmp_path, capsys):
    row = {"question": "Q?", "profile": [{"title": "past", "text": "I paint."}], "chosen": "Good", "rejected": "Bad"}
    write_lines(tmp_path / "in/Art.jsonl", [row, {**row, "profile": "A painter."}, {**row, "rejected": "Good"}])
    prepare.main(prepare.Args(source=str(tmp_path / "in"), output=str(tmp_path / "out")))
    rows = read_rows(str(tmp_path / "out/rewardbench.jsonl"), "pair")
    assert [r["persona"] for r in rows] == [{"profile": row["profile"]}, "A painter."]
    assert rows[0]["kind"] == "Art" and rows[0]["rejected"] == "Bad"
    assert "1 left out: pairs with a blank text" in capsys.readouterr().out


def test_a_source_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (str(tmp_path / "none"), "nobody/nothing-here"):
        with pytest.raises(ValueError, match="no such folder or file.*copy the release's files to a folder"):
            prepare.main(prepare.Args(source=source))
