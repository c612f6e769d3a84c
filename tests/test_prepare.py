"""data/prepare.py: every layout gives the same rows; broken input names its place."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from common import read_rows
from data import prepare

PERSONAS = {f"User{n}_aB{n}": {"Name": f"用户{n}", "Likes": [f"茶{n}", "山"], "Home": {"City": f"C{n}"}}
            for n in range(20)}
PAIRS = [{"user_id": user, "question": f"问题{n % 3}？{user}", "chosen": f"好{n}", "reject": f"坏{n}"}
         for n, user in enumerate([*PERSONAS] * 2)]


def rl_row(persona, question, truth="<answer>\n一个回答\n</answer>"):
    """The release's form: rules, persona as indented JSON, an example, the question."""
    profile = json.dumps(persona, ensure_ascii=False, indent=2)
    text = (f"\n你需要模拟AI助手。\n\n当前用户配置：\n{profile}\n\n"
            f"根据用户配置生成。\n如果问题是\"例子？\"，则\n<answer>\n例\n</answer>\n\n\n"
            f"以下是用户问题：{question}\n\n生成1个完全个性化回答：\n")
    return {"data_source": "persona", "prompt": [{"role": "user", "content": text}],
            "ability": "alignment", "reward_model": {"ground_truth": truth, "style": "model"},
            "extra_info": {"index": 1, "split": "test"}}


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
    return {file.stem: read_rows(str(file), "pair" if "pairs" in file.stem else "prompt")
            for file in output.iterdir()}


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
    for line in ("40 pairs", "0 pairs_eval: not written", "1 left out: repeated pairs",
                 "1 left out: pairs of two equal answers", "1 left out: pairs with a blank"):
        assert line in printed


def broken(row, **changes):
    return {k: v for k, v in {**row, **changes}.items() if v is not ...}


BAD_RL = rl_row({"Name": "A"}, "x")
BAD_RL["prompt"][0]["content"] = BAD_RL["prompt"][0]["content"].replace('"Name": "A"', '"Name": "A')


@pytest.mark.parametrize("sources, problem", [
    ({"personas": {**PERSONAS, "X": {}}}, r"personas.jsonl:21: .*persona.* is \{\}"),
    ({"personas": {**PERSONAS, "X": None}}, r"personas.jsonl:21: .*persona.* is null"),
    ({"personas": {**PERSONAS, "X": '{"Name": '}}, r"personas.jsonl:21: .*not JSON"),
    ({"pairs": [*PAIRS, broken(PAIRS[0], user_id="Nobody")]}, r"rm_pairs.jsonl:41: .*Nobody"),
    ({"pairs": [*PAIRS, broken(PAIRS[0], reject=...)]}, r"rm_pairs.jsonl:41: .*reject"),
    ({"rl": [*RL, BAD_RL]}, r"rl_prompts.jsonl:21: the persona in the prompt is not JSON"),
    ({"rl": [*RL, rl_row({}, "x")]}, r"rl_prompts.jsonl:21: .*persona.* is \{\}"),
    ({"rl": [*RL, rl_row({"a": 1}, " ")]}, r"rl_prompts.jsonl:21: no question"),
    ({"rl": [*RL, broken(RL[0], prompt="text")]}, r'rl_prompts.jsonl:21: field "prompt"'),
])
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
