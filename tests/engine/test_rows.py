"""The readers of prompts and pairs in every form that people have them, and wrong rows."""

import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pytest

from minicai import InputError
from minicai.engine.data import read_jsonl
from minicai.engine.rows import FORMS, Skip, TooLong, form_of, read_preferences, read_prompts
from minicai.evaluation.choices import read_choices
from minicai.evaluation.rates import read_known
from minicai.examples import load_comparisons, load_examples
from minicai.prompts import render, split_transcript
from tests.engine.test_data import refusal, write

HH = (
    Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base-400.jsonl.gz"
)  # offensive: not in the repository
TURNS = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_of_a_text_file_are_its_lines_that_are_not_blank(tmp_path):
    assert read_prompts(write(tmp_path / "p.txt", "one?\r\n\n  two “?” \n \nthree?")) == [
        "one?",
        "two “?”",
        "three?",
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_prompts_of_a_jsonl_file_are_texts_or_turns(tmp_path, name):
    rows = [{"prompt": "one “?”", "kind": "benign"}, {"prompt": TURNS}, {"prompt": TURNS[:1]}]
    path = write(tmp_path / name, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_prompts(path) == ["one “?”", TURNS, "Hi."]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": ', "not valid JSON"),
        ('"Why?"', "found str"),
        ("{}", 'needs "prompt"'),
        ('{"goal": "Why?", "kind": 1}', "it has goal, kind"),
        ('{"prompt": " "}', 'needs "prompt"'),
        ('{"prompt": []}', "must be the user's"),
        ('{"prompt": 3}', 'needs "prompt"'),
        ('{"prompt": ["Why?"]}', "a turn must be"),
        ('{"prompt": [{"role": "tool", "content": "Why?"}]}', "a turn must be"),
        ('{"prompt": [{"role": "system", "content": "Why?"}]}', "must be the user's"),
        (json.dumps({"prompt": [*TURNS, {"role": "system", "content": "x"}]}), "must be the first"),
        ('{"prompt": [{"role": "user", "content": null}]}', "a turn must be"),
        ('{"prompt": [{"role": "user"}]}', "a turn must be"),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_wrong_prompt_is_refused_with_its_file_and_line(tmp_path, name, line, reason):
    message = refusal(
        read_prompts,
        write(tmp_path / name, f'{{"prompt": "one?"}}\n\n{line}\n{{"prompt": "two?"}}\n'),
    )
    assert message.startswith(", line 3: ") and reason in message


def test_of_a_wrong_turn_80_characters_are_shown(tmp_path):
    path = write(tmp_path / "p.jsonl", json.dumps({"prompt": ["Why?" * 99]}))
    assert f', not "{"Why?" * 19}Why;' in refusal(read_prompts, path)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.jsonl.gz"])
def test_a_file_without_a_prompt_is_refused(tmp_path, name):
    assert refusal(read_prompts, write(tmp_path / name, "\n \n")) == ": holds no row"


@pytest.mark.parametrize("read", [read_prompts, read_preferences, read_jsonl])
def test_a_missing_file_is_refused(tmp_path, read):
    assert refusal(read, tmp_path / "none.jsonl") == ": no such file"


def test_a_folder_is_refused(tmp_path):
    assert "directory" in refusal(read_prompts, tmp_path)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path, name):
    said = refusal(read_prompts, write(tmp_path / name, b'{"prompt": "\xff"}\n'))
    assert ", line 1: not valid UTF-8 (byte 0xff; " in said and "iconv -f latin1" in said


def damaged_gzip() -> dict[str, bytes]:
    whole = gzip.compress(b'{"prompt": "one?"}\n' * 9)
    return {
        "cut off": whole[:-9],
        "wrong sum": whole[:-8] + bytes(8),
        "wrong block": whole[:10] + b"\xff" * 30,
    }


@pytest.mark.parametrize("damage", damaged_gzip())
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(damaged_gzip()[damage])
    assert "cannot be read" in refusal(read_prompts, path)


def test_transcripts_are_prompts(tmp_path):
    pair = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e",
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    assert read_prompts(tmp_path / "pairs.jsonl") == [
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    ]
    attempts = [
        {"transcript": "\n\nHuman: How do\n\nI? \n\nAssistant: No.\n\nHuman: Do!", "rating": 4.0},
        {"transcript": "Human: Why?"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in attempts)
    for text in (json.dumps(attempts, indent=1), lines):  # the published file is one list
        (tmp_path / "attempts.jsonl").write_text(text)
        assert read_prompts(tmp_path / "attempts.jsonl") == ["How do\n\nI?", "Why?"]
    (tmp_path / "attempts.jsonl").write_text(
        '[{"transcript": "Human: Why?"}, {"transcript": "nobody"}]'
    )
    with pytest.raises(InputError, match=r"attempts.jsonl, item 2: .*not a transcript that opens"):
        read_prompts(tmp_path / "attempts.jsonl")
    (tmp_path / "attempts.jsonl").write_text('[{"transcript": "Human: Why?"}')
    with pytest.raises(InputError, match="not a valid JSON list"):
        read_prompts(tmp_path / "attempts.jsonl")


# --- preference pairs -----------------------------------------------------------------------------

SINGLE = "\n\nHuman: How tall is it?\n\nAssistant: "
MULTI = (
    "\n\nHuman: Is the Human: Assistant line\nodd?"
    "\n\nAssistant: A little.\n\n- so\n\nHuman:  And now?\n\nAssistant: "
)


def pair(**row) -> str:
    return json.dumps(row) + "\n"


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_pairs_with_a_prompt_become_comparisons_with_the_chosen_response_first(tmp_path, name):
    path = write(
        tmp_path / name,
        pair(prompt="one?", chosen="good", rejected="bad")
        + "\n"
        + pair(prompt=TURNS, chosen="", rejected=" b"),
    )
    common = {"p_first": 1.0, "votes": [], "source": "human", "clamped": False}
    assert read_preferences(path) == [
        {"id": f"{name}:1", "prompt": "one?", "first": "good", "second": "bad", **common},
        {"id": f"{name}:3", "prompt": TURNS, "first": "", "second": " b", **common},
    ]


def test_hh_transcripts_become_a_prompt_and_two_responses(tmp_path):
    path = write(
        tmp_path / "hh.jsonl",
        pair(chosen=SINGLE + "Two yards.", rejected=SINGLE + "Go away.\n\nYou!")
        + pair(chosen=MULTI + "Yes.", rejected=MULTI),
    )
    single, multi = read_preferences(path)
    assert (single["prompt"], single["first"], single["second"]) == (
        "How tall is it?",
        "Two yards.",
        "Go away.\n\nYou!",
    )
    assert (multi["first"], multi["second"], multi["p_first"], multi["source"]) == (
        "Yes.",
        "",
        1.0,
        "human",
    )
    assert multi["prompt"] == [
        {"role": "user", "content": "Is the Human: Assistant line\nodd?"},
        {"role": "assistant", "content": "A little.\n\n- so"},
        {"role": "user", "content": " And now?"},
    ]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "not valid JSON"),
        (pair(prompt="one?", chosen="good"), 'needs "chosen" and "rejected"'),
        (pair(prompt="one?", chosen=["good"], rejected="bad"), 'not "good"'),
        (pair(prompt="one?", chosen=3, rejected="bad"), '"chosen": not a transcript'),
        (pair(prompt="", chosen="good", rejected="bad"), '"chosen": not a transcript'),
        (pair(prompt=TURNS[:2], chosen="good", rejected="bad"), "must be the user's"),
        (
            pair(chosen=SINGLE + "a", rejected=SINGLE.replace("tall", "wide") + "b"),
            "answers to one prompt",
        ),
        (pair(chosen=SINGLE + "a", rejected=MULTI + "b"), "answers to one prompt"),
        (pair(chosen="good", rejected="bad"), "not a transcript"),
        (pair(chosen="Once, " + SINGLE + "a", rejected=SINGLE + "b"), "answers to one prompt"),
        (pair(chosen=SINGLE + "a", rejected="\n\nHuman: How tall is it?"), "not a transcript"),
        (
            pair(chosen=SINGLE + "a\n\nHuman: b", rejected=SINGLE + "b\n\nHuman: b"),
            "not a transcript",
        ),
        (
            pair(
                chosen="\n\nAssistant: Hi." + SINGLE + "a",
                rejected="\n\nAssistant: Hi." + SINGLE + "b",
            ),
            "not a transcript",
        ),
        (
            pair(chosen=SINGLE + "a\n\nAssistant: b", rejected=SINGLE + "a\n\nAssistant: c"),
            "not a transcript",
        ),
        (
            pair(
                chosen="\n\nAssistant: a\n\nAssistant: b",
                rejected="\n\nAssistant: a\n\nAssistant: c",
            ),
            "not a transcript",
        ),
    ],
)
def test_a_wrong_pair_is_refused_with_its_file_and_line(tmp_path, line, reason):
    message = refusal(
        read_preferences,
        write(tmp_path / "c.jsonl", pair(prompt="one?", chosen="good", rejected="bad") + line),
    )
    assert message.startswith(", line 2: ") and reason in message


def test_a_file_without_a_pair_is_refused(tmp_path):
    assert refusal(read_preferences, write(tmp_path / "c.jsonl", "\n")) == ": holds no row"


def rebuilt(text: str) -> str:
    prompt, response = split_transcript(text)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return (
        "".join(names[turn["role"]] + turn["content"] for turn in turns)
        + names["assistant"]
        + response
    )


@pytest.mark.parametrize(
    "text", [SINGLE + "Two yards.", SINGLE, SINGLE + " \n padded \n", MULTI + "Yes.\n\nHumans: no."]
)
def test_a_transcript_is_the_sum_of_its_parts(text):
    assert rebuilt(text) == text


@pytest.mark.skipif(not HH.exists(), reason="the public data is not in the repository")
def test_hh_rlhf_is_read_whole_and_every_transcript_can_be_rebuilt():
    rows, pairs = read_jsonl(HH), read_preferences(HH)
    assert len(rows) == len(pairs) == 400
    assert all(rebuilt(row[key]) == row[key] for row in rows for key in ("chosen", "rejected"))
    turns = [
        [turn["role"] for turn in p["prompt"]] for p in pairs if not isinstance(p["prompt"], str)
    ]
    assert len(turns) > 100 and all(
        roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] for roles in turns
    )
    assert [p["id"] for p in pairs if not p["first"].strip() or not p["second"].strip()] == [
        f"{HH.name}:87"
    ]  # the one empty response


def test_half_of_a_surrogate_pair_is_refused_with_its_line(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "burn \\ud800 barn"}\n')
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        read_prompts(tmp_path / "prompts.jsonl")


# --- files as people have them --------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
GO = [HELLO[0], {"role": "assistant", "content": "Go."}]
KIND = {"role": "system", "content": "Be kind."}
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
ANSWERS = {"chosen": "Hello.", "rejected": "Go."}
WRONG_KIND = [HELLO[0], KIND, HELLO[1]]


def compared(row: dict) -> tuple:
    return row["prompt"], row["first"], row["second"]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "Hi", "chosen": HELLO[1:], "rejected": GO[1:]}, "Hi"),
        ({"prompt": "Hi", "chosen": HELLO, "rejected": GO, "messages": HELLO}, "Hi"),
        ({"prompt": HELLO[:1], "chosen": HELLO, "rejected": "Go."}, "Hi"),
        ({"prompt": [KIND, HELLO[0]], "chosen": HELLO[1:], "rejected": GO[1:]}, [KIND, HELLO[0]]),
        ({"chosen": [KIND, *HELLO], "rejected": [KIND, *GO]}, [KIND, HELLO[0]]),
        ({"system": "Be kind.", "chosen": HELLO, "rejected": GO}, [KIND, HELLO[0]]),
        ({"system": "", "question": "Hi", "chosen": "Hello.", "rejected": "Go."}, "Hi"),
        (
            {"chosen": "Human: Hi\n\nAssistant: Hello.", "rejected": "Human: Hi\n\nAssistant: Go."},
            "Hi",
        ),
        (
            {
                "chosen": "Be kind.\n\nHuman: Hi\n\nAssistant: Hello.",
                "rejected": "Be kind.\n\nHuman: Hi\n\nAssistant: Go.",
            },
            [KIND, HELLO[0]],
        ),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello.", "rejected": "Go."},
            "Hi",
        ),
        ({"instruction": "Hi", "chosen": "Hello.", "rejected": "Go."}, "Hi"),
        ({"prompt": "Human: Hi", "chosen": "Hello.", "rejected": "Go."}, "Hi"),
        (
            {
                "prompt": "Hi",
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Go.",
            },
            "Hi",
        ),
        (
            {
                "chosen": [
                    {"role": "user", "content": "Hi"},
                    {"from": "gpt", "value": "Hello."},
                ],
                "rejected": GO,
            },
            "Hi",
        ),
        (
            {"prompt": "Hi", "response_0": "Go.", "response_1": "Hello.", "safer_response_id": 1},
            "Hi",
        ),
        (
            {
                "prompt": "Hi",
                "response_0": "Hello.",
                "response_1": "Go.",
                "better_response_id": "0",
                "safer_response_id": "1",
            },
            "Hi",
        ),
    ],
)
def test_each_form_of_pairs_gives_the_same_pair_and_its_prompt(tmp_path, row, expected):
    for name, text in (
        ("c.jsonl", json.dumps(row)),
        ("c.json.gz", json.dumps([row])),
        ("c.json", json.dumps([row], indent=1)),
    ):
        [found] = read_preferences(write(tmp_path / name, text))
        assert compared(found) == (expected, "Hello.", "Go.") and found["p_first"] == 1.0
        assert read_prompts(tmp_path / name) == [expected]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": HELLO}, "Hi"),
        ({"messages": [KIND, *HELLO, *GO]}, [KIND, *HELLO, HELLO[0]]),
        ({"messages": [{"role": "developer", "content": "Be kind."}, HELLO[0]]}, [KIND, HELLO[0]]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]}, "Hi"),
        ({"instruction": "Say", "input": "it", "output": "it"}, "Say\n\nit"),
        ({"instruction": "Say", "input": "", "output": "it"}, "Say"),
        ({"instruction": "Say", "context": "it", "response": "it"}, "Say\n\nit"),
        ({"question": "Say", "context": "it", "answer": "it"}, "Say\n\nit"),
        ({"system_prompt": "Be kind.", "question": "Hi", "response": "x"}, [KIND, HELLO[0]]),
        ({"conversation": HELLO, "model": "x"}, "Hi"),
        ({"text": "\n\nHuman: Hi\n\nAssistant: Hello."}, "Hi"),
        ({"messages": [{"role": "user", "content": PARTS}]}, "Hi"),
        ({"prompt": "Hi", "completion": "Hello.", "label": True}, "Hi"),
        ({"prompt": "Hi", "messages": HELLO}, "Hi"),
        ({"system": "Be kind.", "prompt": "Hi"}, [KIND, HELLO[0]]),
    ],
)
def test_each_form_of_prompts_is_read(tmp_path, row, expected):
    assert read_prompts(write(tmp_path / "p.jsonl", json.dumps(row))) == [expected]
    assert 'needs "chosen"' in refusal(read_preferences, tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": WRONG_KIND}, "a system turn must be the first"),
        ({"messages": [KIND]}, "must be the user's"),
        ({"messages": HELLO[1:]}, "must be the user's"),
        ({"messages": "Hi"}, "must be"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a turn must be"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "a turn must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a turn must be"),
        ({"messages": [{"role": "user", "content": [*PARTS, {"type": "image"}]}]}, "a turn must"),
        ({"question": "Say", "context": {"title": []}}, '"context" must be a text, not {"title"'),
        ({"text": "Hi", "label": 1}, '"text": not a transcript'),
        ({"goal": "Hi", "label": 1}, "it has goal, label"),
        ({"prompt": {"0": "a"}}, 'needs "prompt", a text or a list of turns, not {"0": "a"}'),
        ({"prompt": "Hi", "system": 3}, "a turn must be"),
        ({"transcript": 3}, "not a transcript that opens"),
    ],
)
def test_a_conversation_that_is_none_is_refused(tmp_path, row, reason):
    if row.get("messages") == "Hi":  # a text may stand where turns do
        assert read_prompts(write(tmp_path / "p.jsonl", json.dumps(row))) == ["Hi"]
    else:
        assert reason in refusal(read_prompts, write(tmp_path / "p.jsonl", json.dumps(row)))


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "Hi", "response_0": "a", "response_1": "b"}, "better_response_id or safer"),
        (
            {"prompt": "Hi", "response_0": "a", "response_1": "b", "better_response_id": 2},
            "0 or 1, not 2",
        ),
        ({"prompt": "Hey", "chosen": HELLO, "rejected": GO}, 'without a turn of "prompt"'),
        ({"chosen": HELLO, "rejected": [HELLO[0]]}, "answers to one prompt"),
        ({"prompt": [KIND, HELLO[0]], "chosen": HELLO, "rejected": GO}, "without a turn of"),
        ({"chosen": [], "rejected": []}, "answers to one prompt"),
        ({"chosen": WRONG_KIND, "rejected": WRONG_KIND}, "a system turn must be the first"),
        ({"chosen": {"role": "user"}, "rejected": GO}, "a turn must be"),
    ],
)
def test_a_pair_that_is_none_is_refused(tmp_path, row, reason):
    assert reason in refusal(read_preferences, write(tmp_path / "c.jsonl", json.dumps(row)))


def test_tables_are_read_by_their_header(tmp_path):
    text = '\ufeffid,prompt,chosen,rejected\r\n1,Hi,"Hello.",Go.\r\n\r\n2,"a\n,b",c,d\r\n'
    found = read_preferences(write(tmp_path / "c.csv", text))
    assert [*map(compared, found)] == [("Hi", "Hello.", "Go."), ("a\n,b", "c", "d")]
    assert read_prompts(write(tmp_path / "p.csv.gz", 'kind,prompt\nx,"a, b"\n')) == ["a, b"]
    turns = [json.dumps(turns).replace('"', '""') for turns in (HELLO, GO)]
    text = f'chosen,rejected\n"{turns[0]}","{turns[1]}"\n'
    [found] = read_preferences(write(tmp_path / "c.csv", text))
    assert compared(found) == ("Hi", "Hello.", "Go.")
    for text, reason in (
        ("prompt\na, b\n", ", row 1: has more cells"),
        ("goal,target\na,b\n", "it has goal, target"),
        ('prompt,chosen\n"a,b\nc,d\n', "not a valid JSON list or table: unexpected end of data"),
        ('chosen,rejected\n"[{no list",b\n', ", row 1: "),
        ("prompt,chosen,rejected\na,b\n", 'needs "chosen" and "rejected"'),
        ("chosen,rejected\na,b\n", '"chosen": not a transcript'),
    ):
        assert reason in refusal(read_preferences, write(tmp_path / "c.csv", text))


def test_an_answer_may_be_a_turn_by_itself(tmp_path):
    for key, turns in (("prompt", "Hi"), ("conversations", [{"from": "human", "value": "Hi"}])):
        answers = {"chosen": {"from": "gpt", "value": "Hello."}, "rejected": GO[1]}
        path = write(tmp_path / "c.jsonl", json.dumps({key: turns} | answers))
        [found] = read_preferences(path)
        assert compared(found) == ("Hi", "Hello.", "Go.")


def test_what_most_rows_are_decides_what_a_file_is(tmp_path):
    rows = [pair(prompt="Hi", chosen=None, rejected="Go."), *[pair(prompt="Hi", **ANSWERS)] * 2]
    assert form_of(write(tmp_path / "c.jsonl", "".join(rows))) == ("preference pairs", True)
    assert form_of(write(tmp_path / "c.jsonl", "".join(rows[:1] * 3 + rows))) == ("prompts", False)


def test_a_table_may_have_other_separators_and_lists_as_python_prints_them(tmp_path):
    text = "prompt,chosen,rejected\nHi,Hello.,Go.\n"
    for name, separator in (("c.csv", ";"), ("c.csv", "\t"), ("c.tsv", "\t"), ("c.CSV.GZ", ",")):
        path = write(tmp_path / name, text.replace(",", separator))
        assert [*map(compared, read_preferences(path))] == [("Hi", "Hello.", "Go.")]
    assert read_prompts(write(tmp_path / "p.tsv", "\tprompt\n0\ta, b; c\n")) == ["a, b; c"]
    path = write(tmp_path / "c.csv", f'chosen,rejected\n"{HELLO}","{GO}"\n')
    [found] = read_preferences(path)
    assert compared(found) == ("Hi", "Hello.", "Go.")
    assert read_prompts(write(tmp_path / "p.csv", "prompt\n[{odd\n")) == ["[{odd"]


def test_an_object_may_have_several_lines_and_what_is_no_json_is_said(tmp_path):
    row = json.dumps({"prompt": "Hi"}, indent=1)
    assert read_prompts(write(tmp_path / "p.json", row)) == ["Hi"]
    said = refusal(read_prompts, write(tmp_path / "p.jsonl", f"{row}\n{row}\n"))
    assert said.startswith(": its objects have several lines each") and "jq -c ." in said
    said = refusal(read_prompts, write(tmp_path / "p.md", "Why?\nHow?\n"))
    assert said.startswith(": is no JSON; ") and "needs the suffix .txt" in said
    wrapped = json.dumps({"data": [{"prompt": "Hi"}]}, indent=1)
    assert "item 1: needs" in refusal(read_prompts, write(tmp_path / "p.json", wrapped))


def test_content_decides_how_a_file_is_read_not_its_name(tmp_path):
    line = '{"prompt": "Hi"}\n'
    path = tmp_path / "p.jsonl"
    path.write_bytes(gzip.compress(line.encode()))
    (tmp_path / "q.jsonl.gz").write_text(line)
    for name in ("a.txt", "a.csv", "a.data", "a"):
        write(tmp_path / name, line * 2)
        assert read_prompts(tmp_path / name) == ["Hi", "Hi"]
    assert read_prompts(path) == read_prompts(tmp_path / "q.jsonl.gz") == ["Hi"]
    assert read_prompts(write(tmp_path / "t.txt", "[INST] {x}\n{y} z\n")) == ["[INST] {x}", "{y} z"]
    assert read_prompts(write(tmp_path / "l.json", '["a", "b"]')) == ["a", "b"]


@pytest.mark.parametrize(
    "begin, name, line",
    [
        (b"PAR1\x15", "parquet", 'load_dataset("parquet", data_files="'),
        (b"ARROW1\0\0", "arrow", 'load_dataset("arrow", data_files="'),
        (b"\xff\xff\xff\xff\x10", "arrow", 'load_dataset("arrow", data_files="'),
        (b"\x28\xb5\x2f\xfd\x04", "zstandard", "zstd -d "),
        (b"BZh91AY", "bzip2", "bzip2 -dk "),
        (b"\xfd7zXZ\0\0", "xz", "xz -dk "),
        (b"PK\x03\x04\x14", "zip or a spreadsheet", "unzip "),
        ("Hi\n".encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8 "),
    ],
)
def test_a_format_that_is_not_read_is_named_with_the_line_that_converts_it(
    tmp_path, begin, name, line
):
    for path in (tmp_path / "data.bin", tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"):
        said = refusal(read_prompts, write(path, begin))
        assert said.startswith(f": is {name}, which is not read here; convert it: ")
        assert line in said and str(path) in said


def test_all_bad_rows_are_counted_at_once_and_skip_leaves_them_out(tmp_path):
    lines = [pair(prompt="one?", chosen="good", rejected="bad"), "{\n", pair(prompt=3), "[]\n"]
    path = write(tmp_path / "c.jsonl", "".join(lines) + lines[0])
    said = refusal(read_preferences, path)
    assert said.startswith(", line 2: not valid JSON") and said.endswith(
        "; 3 of 5 rows cannot be used; skip_bad = true leaves them out"
    )
    told = []
    skip = Skip(bad=True, tell=told.append)
    assert [row["id"] for row in read_preferences(path, skip=skip)] == ["c.jsonl:1", "c.jsonl:5"]
    assert skip.counts == {str(path): {"bad": 3}}
    assert len(told) == 1 and told[0].endswith("3 of 5 rows cannot be used, and are left out")
    assert len(read_prompts(path, 1, Skip(bad=True))) == 1
    write(path, "{]\n[]\n")
    with pytest.raises(InputError, match=r"line 1: .*; 2 of 2 rows cannot be used$"):
        read_prompts(path, skip=skip)
    rows = [("one", 1), ("two", 0)]
    with pytest.raises(TooLong, match="two: zero; 1 of 2 rows cannot be used; skip_long = true"):
        Skip(bad=True).keep("x", rows, lambda k: 1 // k if k else fail(TooLong("zero")))
    with pytest.raises(InputError, match=r"^one: long; 1 of 2 rows"):
        errors = [("one", TooLong("long")), ("two", InputError("bad"))]
        Skip(True, True, tell=told.append).keep("x", errors, fail)


def test_many_rows_take_little_more_memory_than_their_texts(tmp_path):
    rows = "".join(json.dumps({"prompt": f"{'Why? ' * 40}{k}"}) + "\n" for k in range(2000))
    path = write(tmp_path / "p.jsonl", rows)
    tracemalloc.start()
    try:
        assert len(read_prompts(path)) == 2000
        assert tracemalloc.get_traced_memory()[1] < 4 * len(rows)
    finally:
        tracemalloc.stop()


def fail(error: Exception):
    raise error


def test_pairs_that_part_before_the_last_turn_have_the_common_beginning_as_prompt(tmp_path):
    more = "\n\nHuman: So?\n\nAssistant: Yes."
    rows = [
        {"chosen": SINGLE + "Tall." + more, "rejected": SINGLE + "Small."},
        {"chosen": SINGLE + "Tall." + more, "rejected": SINGLE + "Small." + more},
        {"chosen": SINGLE + "Tall." + more, "rejected": SINGLE + "Tall." + more + " No."},
        {"chosen": SINGLE + "Tall." + more, "rejected": SINGLE + "Tall."},
    ]
    told = []
    path = write(tmp_path / "c.jsonl", "".join(map(pair, [])) + "".join(pair(**r) for r in rows))
    found = read_preferences(path, skip=Skip(tell=told.append))
    for row in found[:2]:
        assert compared(row) == ("How tall is it?", "Tall.", "Small.")
    assert found[2]["prompt"][-1]["content"] == "So?" and found[2]["second"] == "Yes. No."
    assert compared(found[3]) == ("How tall is it?", "Tall.", "Tall.")


def test_a_system_turn_is_text_in_front_in_the_plain_form():
    assert render([KIND, *TURNS[:1]], "Yes.") == "\n\nBe kind.\n\nHuman: Hi.\n\nAssistant: Yes."
    assert split_transcript(render([KIND, *TURNS], "Yes.")) == ([KIND, *TURNS], "Yes.")


# --- docs/data.md ---------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE, re.M | re.S)
READERS = {
    "prompts": read_prompts,
    "pairs": read_preferences,
    "choices": read_choices,
    "eval": read_known,
    "failures": read_known,
    "examples": load_examples,
    "comparisons": lambda path: load_comparisons(path, thinking=False),
}


@pytest.mark.parametrize("name, text", EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_every_example_of_the_page_is_read_whole(name, text, tmp_path):
    path = write(tmp_path / name, text)
    kind = re.match("[a-z]+", name)[0]
    rows = READERS[kind](path)
    lines = [line for line in text.splitlines() if line.strip()]
    count = len(lines) - name.endswith(".csv")
    if name.endswith((".json", ".toml")):
        count = {"prompts-list.json": 2, "comparisons.toml": 2}.get(name, 1)
    assert len(rows) == count
    if kind == "pairs":
        for row in rows:
            prompt = (
                row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            )
            assert prompt.strip() and row["first"] != row["second"]
            if prompt == "Hi":
                assert (row["first"].strip()[:5], row["second"].strip()) == ("Hello", "Go.")
        assert len(read_prompts(path)) == count


def test_every_kind_of_file_and_every_form_of_row_is_on_the_page(tmp_path):
    kinds = {re.match("[a-z]+", name)[0] for name, _ in EXAMPLES}
    assert kinds == READERS.keys()
    found = set()
    for name, text in EXAMPLES:
        if not name.endswith(".toml"):
            found.add(form_of(write(tmp_path / name, text))[0])
    assert found == {name for name, _ in FORMS.values()}
