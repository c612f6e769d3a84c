"""data/prepare.py: every layout gives the same rows; broken input names its place."""

import csv
import datetime
import gzip
import json
import subprocess
import sys
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from conftest import ROOT

from data import prepare
from evaluation.personamem import history_of, read_questions
from runtime.rows import first_lone_surrogate, read_rows

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
    (folder / "LLaMA-Factory").mkdir()
    (folder / "LLaMA-Factory/sft.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
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
    prepare.main(prepare.Args(source=source, out=str(output), **flags))
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
    assert "not used, 2 other files: LLaMA-Factory/sft.json, eval/baseline.jsonl" in capsys.readouterr().out

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


def test_what_is_dropped_is_counted(tmp_path, capsys):
    bad = [PAIRS[0], {**PAIRS[1], "reject": PAIRS[1]["chosen"]}, {**PAIRS[2], "chosen": " \n"}]
    rows = run(flat(tmp_path / "in", pairs=PAIRS + bad), tmp_path / "out", eval_share=0.0)
    assert sorted(rows) == ["pairs", "prompts_train"] and len(rows["pairs"]) == 40
    printed = capsys.readouterr().out
    for line in (
        "40 pairs",
        "0 pairs_eval: not written",
        "1 dropped: repeated pairs",
        "1 dropped: pairs of two equal answers",
        "1 dropped: pairs with a blank",
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
        (
            {"personas": {**PERSONAS, "X": '{"Name": 1}, "b": {"c": 2}'}},
            r'personas.jsonl:21: field "persona": not JSON',
        ),
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


def test_a_persona_that_lost_its_id_is_not_found_by_its_place(tmp_path):
    """In a public source, too: the second row is not user 2."""
    rows = [{"user_id": "1", "persona": "Ann"}, {"persona": "Ben"}]
    for lost in (rows, rows[::-1]):
        flat(tmp_path / "in", pairs=[broken(PAIRS[0], user_id="2")])
        write_lines(tmp_path / "in/personas.jsonl", lost)
        with pytest.raises(ValueError, match=rf'personas.jsonl:{lost.index(rows[1]) + 1}: field "user_id" is missing'):
            run(str(tmp_path / "in"), tmp_path / "out")


@pytest.mark.parametrize(
    "others",
    [{"more_personas.jsonl": [{"user_id": "User1_aB1", "persona": "Ben"}]}, {"persona_all/User1_aB1.json": ["Ben"]}],
)
def test_two_persons_of_one_id_in_two_files(tmp_path, others):
    flat(tmp_path / "in")
    for name, rows in others.items():
        write_lines(tmp_path / "in" / name, rows)
    with pytest.raises(ValueError, match='user_id "User1_aB1" is of another person in another file'):
        run(str(tmp_path / "in"), tmp_path / "out")


def test_two_files_that_agree_about_a_persona(tmp_path):
    plain = run(flat(tmp_path / "in"), tmp_path / "out")
    write_lines(tmp_path / "in/more_personas.jsonl", [{"user_id": "X", "persona": "Eva"}])
    (tmp_path / "in/persona_all").mkdir()
    (tmp_path / "in/persona_all/User1_aB1.json").write_text(json.dumps(PERSONAS["User1_aB1"]))
    assert run(str(tmp_path / "in"), tmp_path / "again") == plain


def test_two_files_of_personas_without_ids(tmp_path):
    """Their rows would have the same numbers."""
    hub(tmp_path / "in")
    write_lines(tmp_path / "in/persona/more_personas.jsonl", [{"name": "Ann"}])
    with pytest.raises(ValueError, match='more_personas.jsonl: user_id "1" is of another person'):
        run(str(tmp_path / "in"), tmp_path / "out")


def test_one_line_for_a_source_that_has_nothing(tmp_path):
    command = [sys.executable, f"{ROOT}/data/prepare.py", "--source", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "neither pairs nor RL prompts" in result.stderr
    assert "Traceback" not in result.stderr


def test_rows_of_an_earlier_source_do_not_stay_beside_new_ones(tmp_path):
    run(flat(tmp_path / "in"), tmp_path / "out", eval_share=0.3)
    with pytest.raises(ValueError, match="pairs.jsonl was made by another command"):
        run(flat(tmp_path / "in", pairs=[]), tmp_path / "out", eval_share=0.3)
    write_lines(tmp_path / "q.jsonl", [dict(persona={"name": "Kim"}, question="What?")])
    with pytest.raises(ValueError, match="was made by another command"):
        run(None, tmp_path / "out", questions=str(tmp_path / "q.jsonl"))


def test_pairs_that_were_annotated_stay_when_own_rows_are_made_again(tmp_path):
    """A recipe that is started again runs all of its stages. Pairs of other prompts do not stay."""
    asked = dict(persona={"name": "Kim"}, question="What?")
    write_lines(tmp_path / "q.jsonl", [asked])
    (prompt,) = run(None, tmp_path / "out", questions=str(tmp_path / "q.jsonl"), eval_share=0)["prompts_train"]
    pairs = [prompt | dict(chosen="Yes.", rejected="No.", chosen_model="a", rejected_model="b")]
    write_lines(tmp_path / "out/pairs.jsonl", pairs)
    (tmp_path / "out/pairs_eval.jsonl").write_text("")  # nobody is held out
    prepare.main(prepare.Args(out=str(tmp_path / "out"), questions=str(tmp_path / "q.jsonl"), eval_share=0))
    assert [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()] == pairs
    other = prompt | dict(prompt_id="other")
    with pytest.raises(ValueError, match="pairs.jsonl was made by another command"):  # now the person is held out
        prepare.write(dict(prompts_train=[other], prompts_eval=[prompt], pairs=[]), str(tmp_path / "out"))
    write_lines(tmp_path / "q.jsonl", [asked | dict(question="Why?")])
    with pytest.raises(ValueError, match="pairs.jsonl was made by another command"):
        run(None, tmp_path / "out", questions=str(tmp_path / "q.jsonl"), eval_share=0)


def test_questions_of_one_person_are_known_as_such(tmp_path):
    """evaluate.py draws them together, so prompts have the person's id, given or by the persona; of pairs, too."""
    assert all(row["user_id"] for row in run(flat(tmp_path / "in"), tmp_path / "pairs")["prompts_train"])
    asked = [dict(persona={"name": name}, question=f"Q{i}?") for name in ("Kim", "Ada") for i in range(3)]
    write_lines(tmp_path / "q.jsonl", asked)
    rows = run(None, tmp_path / "out", questions=str(tmp_path / "q.jsonl"), eval_share=0)["prompts_train"]
    ids = [row["user_id"] for row in rows]
    assert len(set(ids[:3])) == len(set(ids[3:])) == 1 and len(set(ids)) == 2
    write_lines(tmp_path / "q.jsonl", [row | {"user_id": 1} for row in asked])
    with pytest.raises(ValueError, match='q.jsonl:4: user_id "1" is of another person above'):
        run(None, tmp_path / "out2", questions=str(tmp_path / "q.jsonl"), eval_share=0)


def test_no_infinity_in_a_persona_as_text(tmp_path):
    write_lines(tmp_path / "q.jsonl", [dict(persona='{"age": Infinity}', question="What?")])
    with pytest.raises(ValueError, match="q.jsonl:1: .*expected text, finite numbers"):
        run(None, tmp_path / "out", questions=str(tmp_path / "q.jsonl"))


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
    write_lines(source / "mix_gpt-4o-mini.jsonl", rows[:5])  # as in the authors' repository
    with pytest.raises(ValueError, match=r"several files of baseline answers \(.*gpt4o_baseline.jsonl, .*mini.jsonl"):
        run(str(source), tmp_path / "two", eval_share=0.0)
    (source / "gpt4o_baseline.jsonl").rename(source / "mix_gpt-4o.jsonl")
    assert run(str(source), tmp_path / "two", eval_share=0.0)["prompts_winrate"][170]["reference"] == "A170"
    (source / "mix_gpt-4o.jsonl").unlink()
    (source / "mix_gpt-4o-mini.jsonl").unlink()
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
    settings = dict(personas=str(tmp_path / "pool"), eval_share=0.6)
    rows = run(str(tmp_path / "in"), tmp_path / "out", **settings)["alpaca_eval"]
    assert [row["question"] for row in rows] == [o["instruction"] for o in outputs]  # difficulties go by place
    assert [row["reference"] for row in rows] == [o["output"] for o in outputs]
    assert all(row["persona"] == PERSONAS[row["user_id"]] for row in rows)
    held_out = {user for user, persona in PERSONAS.items() if prepare.in_held_out_share(persona, 0.6)}
    assert 5 < len(held_out) < 20 and f"seed 0, of {len(held_out)} held-out personas" in rows[0]["assigned"]
    assert len({row["user_id"] for row in rows}) > 5 and {row["user_id"] for row in rows} <= held_out
    with pytest.raises(ValueError, match="no personas there that --eval-share 0 holds out"):
        run(str(tmp_path / "in"), tmp_path / "no", **settings | dict(eval_share=0.0))
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
    prepare.main(prepare.Args(source=source, out=str(tmp_path / "out")))
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
        ({"all_options": "import os"}, 'row 1: field "all_options" is neither JSON nor a Python literal'),
        ({"all_options": "{}"}, 'row 1: field "all_options" is no list of texts'),
    ],
)
def test_broken_personamem(tmp_path, changes, problem):
    source, _ = personamem(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=problem):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_context_of_personamem_that_occurs_twice(tmp_path):
    source, _ = personamem(tmp_path / "in")
    with open(tmp_path / "in/shared_contexts_32k.jsonl", "a+") as f:
        f.seek(0)
        f.write(f.readline())
    with pytest.raises(ValueError, match=r'shared_contexts_32k.jsonl:\d+: context "\w+" occurs twice'):
        prepare.main(prepare.Args(source=source, out=str(tmp_path / "out")))


def personamem2(folder, **changes):
    """Two questions of two persons, in the release's form: one user_query is JSON, one a Python literal."""
    row = dict(correct_answer="Tea, as you like it.", pref_type="ask_to_forget", topic_query="food")
    query = {"role": "user", "content": "What's for breakfast?"}
    wrong = ["Coffee.", 'It\'s "milk".', "Water."]
    histories = []
    with_paths = []
    for i, write in enumerate((json.dumps, repr)):
        link = f"data/chat_history_32k/chat_history_250831_232015_persona{i}.json"
        messages = [{"role": "system", "content": f"Persona {i}"}, {"role": "user", "content": "Forget that."}]
        histories.append(messages)
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).write_text(json.dumps(dict(metadata=dict(persona_id=i), chat_history=messages)))
        links = dict(chat_history_32k_link=link, chat_history_128k_link=link.replace("32k", "128k"))
        texts = dict(user_query=write(query), incorrect_answers=write(wrong))
        with_paths.append(dict(persona_id=str(i)) | links | row | texts | changes)
    (folder / "benchmark/text").mkdir(parents=True)
    with open(folder / "benchmark/text/benchmark.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, list(with_paths[0]))
        out.writeheader()
        out.writerows(with_paths)
    return histories, wrong


def test_personamem_of_version_two(tmp_path):
    """The same rows as of version 1, with the whole history and options in an order that does not change."""
    histories, wrong = personamem2(tmp_path / "in")
    for out in ("out", "again"):
        prepare.main(prepare.Args(source=str(tmp_path / "in"), out=str(tmp_path / out)))
    file = tmp_path / "out/personamem2_32k.jsonl"
    assert file.read_text() == (tmp_path / "again/personamem2_32k.jsonl").read_text()
    rows, contexts = read_questions(SimpleNamespace(prompts=str(file), n_prompts=0, seed=0))
    assert [history_of(row, contexts) for row in rows] == histories
    assert len({row["prompt_id"] for row in rows}) == 2 and [row["user_id"] for row in rows] == ["0", "1"]
    for i, row in enumerate(rows):
        assert row["persona"] == f"Persona {i}" and row["question"] == "What's for breakfast?"
        assert row["options"]["abcd".index(row["correct"])] == "Tea, as you like it."
        assert sorted(row["options"]) == sorted([*wrong, "Tea, as you like it."])
        assert (row["version"], row["question_type"]) == ("v2 32k", "ask_to_forget")
    assert not (tmp_path / "out/personamem2_128k.jsonl").exists()  # whose histories are not there


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"chat_history_32k_link": "data/none.json"}, "the chat histories that its first row links to are not in"),
        ({"user_query": "{'role'"}, 'row 1: field "user_query" is neither JSON nor a Python literal'),
        ({"user_query": "{}"}, "row 1: expected a question as user_query"),
        ({"incorrect_answers": "['x', 'y']"}, "row 1: expected a question as user_query, and three incorrect_answers"),
        ({"incorrect_answers": "[1, 2, 3]"}, 'row 1: field "incorrect_answers" is no list of texts'),
    ],
)
def test_broken_personamem_of_version_two(tmp_path, changes, problem):
    personamem2(tmp_path / "in", **changes)
    with pytest.raises(ValueError, match=problem):
        run(str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_personamem_without_its_contexts(tmp_path):
    source, _ = personamem(tmp_path / "in")
    (tmp_path / "in/shared_contexts_32k.jsonl").unlink()
    with pytest.raises(ValueError, match="its contexts are missing; expected .*shared_contexts_32k.jsonl"):
        run(source, tmp_path / "out")


def test_rewardbench(tmp_path, capsys):
    row = {"question": "Q?", "profile": [{"title": "past", "text": "I paint."}], "chosen": "Good", "rejected": "Bad"}
    write_lines(tmp_path / "in/Art.jsonl", [row, {**row, "profile": "A painter."}, {**row, "rejected": "Good"}])
    prepare.main(prepare.Args(source=str(tmp_path / "in"), out=str(tmp_path / "out")))
    rows = read_rows(str(tmp_path / "out/rewardbench.jsonl"), "pair")
    assert [r["persona"] for r in rows] == [{"profile": row["profile"]}, "A painter."]
    assert rows[0]["kind"] == "Art" and rows[0]["rejected"] == "Bad"
    assert "1 dropped: pairs of two equal answers" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test-00000-of-00001.parquet", "test.jsonl"])
def test_rewardbench_as_on_the_hub(tmp_path, name):
    """A folder a subset. What the answers were written by stays out of the rows."""
    profile = [{"id": str(i), "category": "music", "text": f"Which guitar, {i}?"} for i in range(3)]
    row = dict(id="7", question="Q?", profile=profile, chosen="Good", rejected="Bad", narrative="secret", category="x")
    row |= dict(rubric_aspects=[dict(aspect="secret", evidence="secret", reason="secret")])
    for subset in ("Art_and_Entertainment", "Society_and_Culture"):
        write = write_parquet if name.endswith("parquet") else write_lines
        write(tmp_path / "in" / subset / name, [row])
    prepare.main(prepare.Args(source=str(tmp_path / "in"), out=str(tmp_path / "out")))
    rows = read_rows(str(tmp_path / "out/rewardbench.jsonl"), "pair")
    assert [r["kind"] for r in rows] == ["Art_and_Entertainment", "Society_and_Culture"]
    assert rows[0]["persona"] == {"profile": profile} and "secret" not in json.dumps(rows)
    prepare.main(prepare.Args(source=str(tmp_path / "in"), out=str(tmp_path / "few"), profile_entries=1))
    rows = read_rows(str(tmp_path / "few/rewardbench.jsonl"), "pair")
    assert rows[0]["persona"] == {"profile": profile[:1]}


def test_a_source_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (str(tmp_path / "none"), "nobody/nothing-here"):
        with pytest.raises(ValueError, match="no such folder or file.*copy the release's files to a folder"):
            prepare.main(prepare.Args(source=source))


# -- tables, encodings, damaged text


def write_parquet(file, rows):
    from datasets import Dataset

    file.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(key for row in rows for key in row)
    Dataset.from_list([{c: row.get(c) for c in columns} for row in rows]).to_parquet(str(file))


UNEVEN = {  # no two persons have the same keys, at any depth
    "1": {"name": "Ada", "job": "nurse", "home": {"city": "Oslo"}, "visits": [{"place": "Rome"}]},
    "2": {
        "name": "Ben",
        "pets": ["cat"],
        "age": 36,
        "height": 1.5,
        "visits": [{"year": 1999}, {"place": "Bern", "with": {"n": 2}}],
    },
    "3": {"name": "Cy", "home": {"street": "A 1", "rooms": 3}, "height": 2},
}


@pytest.mark.parametrize("write, ending", [(write_lines, "jsonl"), (write_parquet, "parquet")])
def test_a_table_gives_nobody_the_keys_of_others(tmp_path, write, ending):
    """A column that another row has is null in this one: that is the table's layout, not the person's."""
    named = [{"user_id": user, "persona": persona} for user, persona in UNEVEN.items()]
    pairs = [{"user_id": u, "question": f"Q{u}", "chosen": "good", "reject": "bad"} for u in UNEVEN]
    write(tmp_path / f"in/personas.{ending}", named)
    write(tmp_path / f"in/pairs.{ending}", [pairs[0], {**pairs[1], "tier": "hard"}, pairs[2]])
    write(
        tmp_path / f"in/baseline.{ending}",
        [{"question": f"B{u}", "persona": p, "response": "R"} for u, p in UNEVEN.items()],
    )
    rows = run(str(tmp_path / "in"), tmp_path / "out")
    assert [row["persona"] for row in rows["prompts_winrate"]] == list(UNEVEN.values())
    assert [row["persona"] for row in rows["pairs_eval"]] == list(UNEVEN.values())
    assert [row.get("tier") for row in rows["pairs_eval"]] == [None, "hard", None]
    expected = [prepare.digest(persona, f"Q{user}") for user, persona in UNEVEN.items()]
    assert [row["prompt_id"] for row in rows["pairs_eval"]] == expected

    write(tmp_path / f"bare/personas.{ending}", list(UNEVEN.values()))  # rows that are the personas: ids by place
    write(tmp_path / f"bare/pairs.{ending}", pairs)
    rows = run(str(tmp_path / "bare"), tmp_path / "again", eval_share=0.0)
    assert [row["persona"] for row in rows["pairs"]] == list(UNEVEN.values())

    profiles = [{"question": f"Q{u}", "profile": p, "chosen": "good", "rejected": "bad"} for u, p in UNEVEN.items()]
    write(tmp_path / f"bench/Art.{ending}", profiles)
    prepare.main(prepare.Args(source=str(tmp_path / "bench"), out=str(tmp_path / "bench_out")))
    found = read_rows(str(tmp_path / "bench_out/rewardbench.jsonl"), "pair")
    assert [row["persona"] for row in found] == list(UNEVEN.values())


def test_a_map_of_a_table_is_an_object(tmp_path):
    """Arrow's maps are lists of pairs in Python unless asked for otherwise."""
    kind = pyarrow.map_(pyarrow.string(), pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    people = [{"Ann": {"tea": 1, "jazz": 2}}, {"Ben": {}, "Cy": {"chess": 3}}]
    users = {"user_id": ["1", "2"], "persona": pyarrow.array([list(p.items()) for p in people], kind)}
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(users), tmp_path / "in/personas.parquet")
    write_lines(tmp_path / "in/pairs.jsonl", [broken(PAIRS[0], user_id=user) for user in "12"])
    rows = run(str(tmp_path / "in"), tmp_path / "out", eval_share=0.0)["pairs"]
    assert [row["persona"] for row in rows] == people
    twice = pyarrow.array([[("a", []), ("a", [])], []], kind)
    pyarrow.parquet.write_table(pyarrow.table(users | {"persona": twice}), tmp_path / "in/personas.parquet")
    with pytest.raises(ValueError, match="personas.parquet, rows 1 to 2: .*objects with different keys"):
        run(str(tmp_path / "in"), tmp_path / "again")


def test_user_ids_that_a_table_made_floats(tmp_path):
    """An integer column with gaps is a column of floats: 1.0 is still user 1; NaN is no value."""
    write_parquet(tmp_path / "in/personas.parquet", [{"user_id": n, "persona": f"P{n}"} for n in (1, 2)])
    pairs = [{"question": f"Q{n}", "chosen": "a", "reject": "b", "user_id": float(n)} for n in (1, 2)]
    write_parquet(tmp_path / "in/pairs.parquet", [pair | {"score": float("nan")} for pair in pairs])
    rows = run(str(tmp_path / "in"), tmp_path / "out", eval_share=0.0)["pairs"]
    assert [(row["persona"], row["user_id"]) for row in rows] == [("P1", "1"), ("P2", "2")]


HALF = "\\ud83d"  # legal JSON, but no character


@pytest.mark.parametrize(
    "file, line, problem",
    [
        ("personas.jsonl", '{"user_id": "X", "persona": {"Name": "A", "Pets": ["cat", "HALF"]}}', r"persona.Pets\[1\]"),
        ("personas.jsonl", '{"user_id": "X", "persona": {"Home": {"aHALF": 1}}}', r"persona.Home.a\\ud83d"),
        ("personas.jsonl", r'{"user_id": "X", "persona": "{\"Name\": \"\\ud83d\"}"}', "persona.Name"),
        ("rm_pairs.jsonl", '{"user_id": "User1_aB1", "question": "Q", "chosen": "HALF", "reject": "b"}', "chosen"),
        ("rl_prompts.jsonl", json.dumps(rl_row({"a": "X"}, "x")).replace("X", "HALF"), r"prompt\[0\].content"),
        ("rl_prompts.jsonl", json.dumps(rl_row({"a": "X"}, "x")).replace("X", r"\\ud83d"), "persona.a"),
    ],
)
def test_half_a_surrogate_pair_is_refused(tmp_path, file, line, problem):
    flat(tmp_path / "in")
    with open(tmp_path / "in" / file, "a") as f:
        f.write(line.replace("HALF", HALF) + "\n")
    with pytest.raises(ValueError, match=rf'{file}:\d\d: field "{problem}".* half of a surrogate pair') as error:
        run(str(tmp_path / "in"), tmp_path / "out")
    str(error.value).encode()
    assert not (tmp_path / "out").exists()


def test_half_a_surrogate_pair_in_other_files(tmp_path):
    source, _ = personamem(tmp_path / "options", all_options=r'["(a) \ud83d", "(b) x", "(c) y", "(d) z"]')
    with pytest.raises(ValueError, match=r'row 1: field "all_options\[0\]".* half of a surrogate pair'):
        run(source, tmp_path / "out")
    source, _ = personamem(tmp_path / "context")
    write_lines(tmp_path / "context/shared_contexts_32k.jsonl", [])
    (tmp_path / "context/shared_contexts_32k.jsonl").write_text('{"c1": [{"role": "user", "content": "\\udc00"}]}\n')
    with pytest.raises(ValueError, match=r'contexts_32k.jsonl:1: field "c1\[0\].content".* half of a surrogate pair'):
        run(source, tmp_path / "out")
    authors(tmp_path / "authors")
    (tmp_path / "authors/eval/data/persona_all/Z.json").write_text('{"a": {"b": "\\ud83d"}}')
    with pytest.raises(ValueError, match=r'Z.json: field "persona.a.b".* half of a surrogate pair'):
        run(str(tmp_path / "authors"), tmp_path / "out")
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca/o.json").write_text('[{"instruction": "a", "output": "b\\ud83d"}]')
    with pytest.raises(ValueError, match=r'o.json: field "\[0\].output".* half of a surrogate pair'):
        run(str(tmp_path / "alpaca"), tmp_path / "out", personas=str(flat(tmp_path / "pool")))


def test_first_lone_surrogate():
    assert first_lone_surrogate({"a": ["😀", {"b": "x"}], "c": 1, "d": None}) is None
    assert first_lone_surrogate("a\ud83d") == ""
    assert first_lone_surrogate({"a": [1, {"b": "\udc00"}]}) == "a[1].b"
    assert first_lone_surrogate({"a": {"k\ud83d": 1}}) == "a.k\\ud83d"


def damaged(folder, name, data):
    flat(folder)
    (folder / name).write_bytes(data)
    return str(folder)


LINE = json.dumps({"user_id": "X", "persona": {"Name": "Zoë"}}, ensure_ascii=False)


@pytest.mark.parametrize(
    "data, problem",
    [
        (f'{{"persona": "x"}}\n{LINE}'.encode("latin-1"), r"personas.jsonl:2: not UTF-8"),
        (LINE.encode("utf-16"), r"personas.jsonl:1: not UTF-8"),
        (gzip.compress(LINE.encode(), mtime=0), r"personas.jsonl: compressed with gzip"),
        (f"{LINE}\n\n{LINE}\n".encode(), r"personas.jsonl:2: a blank line"),
        (b"\n\n", r"personas.jsonl: empty"),
        (b"", r"personas.jsonl: empty"),
        (b'{"persona": NaN}', r"personas.jsonl:1: .*persona.* is null"),
        (b'{"persona": {"age": Infinity}}', r"personas.jsonl:1: .*expected text, finite numbers"),
        (b'{"persona": ' + b"[" * 100_000, r"personas.jsonl:1: not JSON \(maximum recursion depth"),
    ],
)
def test_damaged_files_name_their_place(tmp_path, data, problem):
    with pytest.raises(ValueError, match=problem):
        run(damaged(tmp_path / "in", "personas.jsonl", data), tmp_path / "out")


def test_byte_order_mark_and_blank_lines_at_the_end(tmp_path):
    plain = run(flat(tmp_path / "in"), tmp_path / "out")
    for file in (tmp_path / "in").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n \n\n")
    assert run(str(tmp_path / "in"), tmp_path / "again") == plain


def test_damaged_json_csv_and_parquet_name_the_file(tmp_path, capsys):
    authors(tmp_path / "in")
    file = tmp_path / "in/eval/data/persona_all/Z.json"
    for data, problem in ((b'{\n"a": "\xe9"}', r"Z.json:2: not UTF-8"), (b'{"a": ', r"Z.json: .*not JSON")):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=problem):
            run(str(tmp_path / "in"), tmp_path / "out")
    file.unlink()
    (tmp_path / "in/other.json").write_text("[1, ")
    with pytest.raises(ValueError, match=r"other.json: not JSON"):
        run(str(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "in/other.json").unlink()
    (tmp_path / "in/more.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(ValueError, match=r"more.parquet: not a Parquet file"):
        run(str(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "in/more.parquet").unlink()
    (tmp_path / "in/old.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    run(str(tmp_path / "in"), tmp_path / "out")
    assert "compressed, not read: old.jsonl.gz" in capsys.readouterr().out
    with pytest.raises(ValueError, match="old.jsonl.gz: compressed with gzip; unpack it"):
        run(str(tmp_path / "in/old.jsonl.gz"), tmp_path / "out")

    source, _ = personamem(tmp_path / "csv")
    text = (tmp_path / "csv/questions_32k.csv").read_bytes()
    (tmp_path / "csv/questions_32k.csv").write_bytes(b"\xef\xbb\xbf" + text)  # as spreadsheets save it
    prepare.main(prepare.Args(source=source, out=str(tmp_path / "csv_out")))
    (tmp_path / "csv/questions_32k.csv").write_bytes(text + "é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"questions_32k.csv:\d+: not UTF-8"):
        run(source, tmp_path / "out")


def test_values_of_a_table_that_no_row_can_hold(tmp_path):
    table = [{"user_id": "1", "persona": {"born": datetime.date(1990, 1, 2)}}]
    write_parquet(tmp_path / "in/personas.parquet", table)
    with pytest.raises(ValueError, match=r"personas.parquet, row 1: .*date"):
        run(str(tmp_path / "in"), tmp_path / "out")


# -- own personas and questions


def write_csv(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


OWN = {f"u{n}": {"name": f"Ann {n}", "likes": [f"tea {n}"]} for n in range(30)}


@pytest.mark.parametrize(
    "write, ending",
    [(write_lines, "jsonl"), (write_parquet, "parquet"), (write_csv, "csv")],
    ids=["jsonl", "parquet", "csv"],
)
def test_own_personas_and_questions(tmp_path, write, ending):
    personas, questions = tmp_path / f"people.{ending}", tmp_path / f"asked.{ending}"
    write(personas, [{"id": user, "profile": json.dumps(persona)} for user, persona in OWN.items()])
    asked = [{"id": user, "text": f"What,\nthen, {user}?", "reference": "R"} for user in OWN for _ in range(2)]
    write(questions, asked)
    rows = run(
        None,
        tmp_path / "out",
        personas=str(personas),
        questions=str(questions),
        persona_column=("profile",),
        question_column="text",
        id_column="id",
        eval_share=0.3,
    )
    assert sorted(rows) == ["prompts_eval", "prompts_train"]
    both = rows["prompts_train"] + rows["prompts_eval"]
    assert len(both) == 30 and all(row["persona"] == OWN[row["user_id"]] for row in both)  # repeats count once
    assert all(row["question"] == f"What,\nthen, {row['user_id']}?" and row["reference"] == "R" for row in both)
    trained, held_out = ({row["user_id"] for row in rows[name]} for name in ("prompts_train", "prompts_eval"))
    assert trained and held_out and not trained & held_out
    assert all(row["source"] == f"asked.{ending}" for row in both)


def test_persona_and_question_in_one_table(tmp_path):
    """Several columns are an object of them, in the order of the flag; an empty cell is no value."""
    (tmp_path / "q.csv").write_text("job,question,name,note\nnurse,What to eat?,Mia,x\n,Where to go?,Ben,y\n")
    rows = run(None, tmp_path / "out", questions=str(tmp_path / "q.csv"), persona_column=("name", "job"), eval_share=0)
    assert [row["persona"] for row in rows["prompts_train"]] == [{"name": "Mia", "job": "nurse"}, {"name": "Ben"}]
    assert list(rows["prompts_train"][0]["persona"]) == ["name", "job"]


def test_questions_without_ids_go_to_drawn_personas(tmp_path):
    write_lines(tmp_path / "p.jsonl", OWN.values())  # no column of that name: the row is the persona
    write_lines(tmp_path / "q.jsonl", [{"question": f"Q{n}"} for n in range(40)])
    settings = dict(personas=str(tmp_path / "p.jsonl"), questions=str(tmp_path / "q.jsonl"), personas_per_question=3)
    rows = run(None, tmp_path / "out", **settings)
    both = rows["prompts_train"] + rows["prompts_eval"]
    assert len(both) == 120 and all(row["persona"] in OWN.values() for row in both)
    assert len({row["prompt_id"] for row in both}) == 120
    assert run(None, tmp_path / "same", **settings) == rows
    assert run(None, tmp_path / "other", seed=1, **settings) != rows


def test_questions_that_share_a_column_with_personas_are_not_drawn_for(tmp_path):
    """The ids may have another name than --id-column's default."""
    write_csv(tmp_path / "p.csv", [{"id": n, "job": f"J{n}"} for n in range(3)])
    write_csv(tmp_path / "q.csv", [{"id": n, "question": f"Q{n}"} for n in range(3)])
    settings = dict(personas=str(tmp_path / "p.csv"), questions=str(tmp_path / "q.csv"), eval_share=0.0)
    with pytest.raises(
        ValueError, match=r'q.csv: no column "user_id", but .*p.csv has id, too; expected --id-column id'
    ):
        run(None, tmp_path / "out", **settings)
    rows = run(None, tmp_path / "out", id_column="id", **settings)["prompts_train"]
    assert [row["persona"]["job"] for row in rows] == ["J0", "J1", "J2"]


def test_a_folder_of_personas_is_read_by_the_same_columns(tmp_path):
    """A description that the library datasets leaves beside them is no person."""
    folder = tmp_path / "personas"
    write_lines(folder / "personas.jsonl", [{"uid": f"u{n}", "bio": f"B{n}", "age": n} for n in range(3)])
    (folder / "dataset_infos.json").write_text('{"default": {"description": "x"}}')
    settings = dict(persona_column=("bio",), id_column="uid")
    found = prepare.own_personas(prepare.Args(personas=str(folder), **settings), needs_ids=True)
    assert found == {"u0": "B0", "u1": "B1", "u2": "B2"}


def test_an_empty_reference_is_none(tmp_path):
    rows = [{"persona": "P", "question": f"Q{n}", "reference": text} for n, text in enumerate(("", None, "R"))]
    write_lines(tmp_path / "q.jsonl", rows)
    found = run(None, tmp_path / "out", questions=str(tmp_path / "q.jsonl"), eval_share=0.0)["prompts_train"]
    assert [row.get("reference") for row in found] == [None, None, "R"]


def test_one_table_of_personas_and_questions(tmp_path):
    write_csv(tmp_path / "q.csv", [{"persona": f"P{n}", "question": "Q"} for n in range(20)])
    rows = run(None, tmp_path / "out", questions=str(tmp_path / "q.csv"), eval_share=0.5)
    assert {row["persona"] for part in rows.values() for row in part} == {f"P{n}" for n in range(20)}


@pytest.mark.parametrize(
    "personas, questions, flags, problem",
    [
        ("id,persona\n", "id,question\n1,Q\n", {}, r"p.csv: empty"),
        ("id,persona\n1,P\n", "", {}, r"q.csv: empty"),
        ("id,persona\n1,P\n", "id,question\n", {}, r"q.csv: empty"),
        ("id,profile\n1,P\n", "id,question\n1,Q\n", {"persona_column": ("x",)}, r'p.csv: no column "x".* id, profile'),
        ("id,persona\n1,P\n", "id,text\n1,Q\n", {}, r'q.csv: no column "question".* id, text'),
        ("id,persona\n1,P\n", "id,question\n2,Q\n", {}, r'q.csv, row 1: no persona with id "2" among 1'),
        ("id,persona\n1,P\n", "id,question\n1, \n", {}, r'q.csv, row 1: field "question" is missing or blank'),
        ("id,persona\n1,P\n1,R\n", "id,question\n1,Q\n", {}, r'p.csv, row 2: id "1" occurs twice'),
        ("id,persona\n1,\n", "id,question\n1,Q\n", {}, r'p.csv, row 1: field "persona" is null'),
        ("id,persona\n1,P,R\n", "id,question\n1,Q\n", {}, r"p.csv, row 1: 3 cells, expected 2 as in the header"),
        ("id,persona\n1\n", "id,question\n1,Q\n", {}, r"p.csv, row 1: 1 cells, expected 2 as in the header"),
        ('id,persona\n1,"P\n2,R\n3,S\n', "id,question\n1,Q\n", {}, r"p.csv, row 1: not CSV, such as a quotation mark"),
        ('id,persona\n1,P\n2,"R\n3,"S"\n', "id,question\n1,Q\n", {}, r"p.csv, row 2: not CSV, such as a quotation"),
        ("id,persona\n1,P\n", 'id,question\n1,"Q\n1,R\n', {}, r"q.csv, row 1: not CSV, such as a quotation mark"),
        ("id,persona\n1,P\n,R\n", "id,question\n2,Q\n", {}, r'p.csv, row 2: field "id" is missing; expected an id'),
        ("id,persona\n,P\n,R\n", "id,question\n2,Q\n", {}, r'p.csv, row 1: field "id" is missing; expected an id'),
        ("id,persona\n1,P\n,R\n", "question\nQ\n", {}, r'p.csv, row 2: field "id" is missing; expected an id'),
        ("id,id\n1,P\n", "id,question\n1,Q\n", {}, r'p.csv: two columns "id"'),
        ("persona\nP\n", "id,question\n1,Q\n", {}, r'p.csv: no column "id", by which .*q.csv.* persona'),
        (None, "id,question\n1,Q\n", {}, r'q.csv: no column "persona".*--personas .*id, question'),
        ("id,persona\n1,P\n", "id,question\n1,Q\n", {"source": "x"}, "--source and --questions"),
        ("id,persona\n1,P\n", None, {}, "--source"),
    ],
)
def test_broken_tables_name_file_and_columns(tmp_path, personas, questions, flags, problem):
    flags = {"id_column": "id", "source": None, **flags}
    for name, text, file in (("personas", personas, "p.csv"), ("questions", questions, "q.csv")):
        if text is not None:
            (tmp_path / file).write_text(text)
            flags[name] = str(tmp_path / file)
    with pytest.raises(ValueError, match=problem):
        prepare.main(prepare.Args(out=str(tmp_path / "out"), **flags))
    assert not (tmp_path / "out").exists()
