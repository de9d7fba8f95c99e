"""The commands elo, agree and choices on tiny random models: what they print, write and refuse."""

import json

import pytest

from minicai import InputError, __main__
from minicai.engine.data import read_jsonl
from minicai.engine.hub import weights_sha256
from minicai.feedback import p_first_of


def run(capsys, *arguments) -> str:
    __main__.main([str(a) for a in arguments])
    return capsys.readouterr().out


@pytest.fixture
def options(folder, tmp_path):
    """The workshop's config, with prompts for evaluation and an output folder of its own."""
    return [
        folder / "config.toml",
        f"--prompts={folder / 'prompts.txt'}",
        f"--out={tmp_path / 'out'}",
        "--max_new_tokens=6",
        "--rows=4",
    ]


def test_elo_rates_each_model_and_every_comparison_can_be_read_and_redone(
    folder, tmp_path, options, capsys
):
    printed = run(capsys, "elo", *options, folder / "model", folder / "other")
    record, rows = (
        json.loads((tmp_path / "out" / "elo" / "stage.json").read_text()),
        read_jsonl(tmp_path / "out" / "elo" / "comparisons.jsonl"),
    )
    names = [str(folder / "model"), str(folder / "other")]
    assert (
        list(record["elo"]) == names
        and record["elo"][names[0]]["elo"] == 0
        and all(name in printed for name in names)
    )
    low, high = record["elo"][names[1]]["interval"]
    assert low <= record["elo"][names[1]]["elo"] <= high and sum(
        row["win_rate"] for row in record["elo"].values()
    ) == pytest.approx(1)
    assert record["elo"][names[1]]["win_rate"] == pytest.approx(
        1 - sum(row["p_first"] for row in rows) / 6
    )
    assert [row["number"] for row in rows] == list(range(6)) and all(
        p_first_of(row) == row["p_first"] for row in rows if row["votes"]
    )
    answers = read_jsonl(tmp_path / "out" / "elo" / "answers.jsonl")
    assert [(row[names[0]], row[names[1]]) for row in answers] == [
        (row["first"], row["second"]) for row in rows
    ]
    assert record["models"] == {name: weights_sha256(name) for name in names}
    again = run(capsys, "elo", *options, folder / "model", folder / "other")
    assert "finished already" in again and printed.splitlines()[0] in again
    with pytest.raises(InputError, match="have changed"):
        run(capsys, "elo", *options, folder / "other", folder / "model")


def test_agree_compares_labels_with_people(folder, tmp_path, options, capsys):
    printed = run(capsys, "agree", *options, folder / "human.jsonl")
    record, rows = (
        json.loads((tmp_path / "out" / "agree" / "stage.json").read_text()),
        read_jsonl(tmp_path / "out" / "agree" / "comparisons.jsonl"),
    )
    right = [(row["p_first"] > 0.5) == (row["human"] == "first") for row in rows]
    assert record["count"] == 40 == len(rows) and record["rate"] == pytest.approx(sum(right) / 40)
    assert (
        f"{record['rate']:.3f}" in printed
        and sum(part["count"] for part in record["by_confidence"]) == 40
    )
    assert all(
        {row["first"], row["second"]} == {"yes", "no"}
        and (row["first"] == "yes") == (row["human"] == "first")
        for row in rows
    )


def test_agree_leaves_out_what_cannot_be_read_or_compared_where_it_is_told_to(
    folder, tmp_path, options, capsys
):
    rows = [{"prompt": f"Tell {k}", "chosen": "yes", "rejected": "no"} for k in range(3)]
    rows += [{"prompt": "x" * 2000, "chosen": "yes", "rejected": "no"}, {"prompt": "Tell"}]
    file = tmp_path / "pairs.data"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for flags, message in (
        ([], "line 5: needs"),
        (["--skip_bad=true"], "pair pairs.data:4: its comparison has 2"),
    ):
        with pytest.raises(InputError, match=message):
            run(capsys, "agree", *options, *flags, file)
    run(capsys, "agree", *options, "--skip_bad=true", "--skip_long=true", file)
    record = json.loads((tmp_path / "out" / "agree" / "stage.json").read_text())
    assert record["count"] == 3
    assert record["left_out"] == {str(file): {"bad": 1}, "pairs": {"long": 1}}


def test_choices_prints_the_accuracy_with_its_interval(folder, tmp_path, capsys):
    items = [{"prompt": f"{k}?", "corrects": [" (A)"], "incorrects": [" (B)"]} for k in range(8)]
    flipped = [
        item | {"corrects": item["incorrects"], "incorrects": item["corrects"]} for item in items
    ]
    found = []
    for rows in (items, flipped):
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
        printed = run(capsys, "choices", folder / "model", tmp_path / "items.jsonl")
        assert "of 8 items" in printed
        found.append(float(printed.split()[1]))
    assert sum(found) == 1  # what is right of the one is wrong of the other


@pytest.mark.parametrize(
    "name, message", [("human.jsonl", '"prompt"|"corrects"'), ("none.jsonl", "no such file")]
)
def test_choices_refuses_a_file_of_another_form(folder, capsys, name, message):
    with pytest.raises(InputError, match=message):
        run(capsys, "choices", folder / "model", folder / name)


def test_a_wrong_model_or_constitution_is_refused_before_anything_is_written(
    folder, tmp_path, options, capsys
):
    for words, message in (
        (["elo", *options, folder / "model", folder / "modle"], "did you mean .*model"),
        (
            ["elo", *options, "--feedback=none", folder / "model", folder / "other"],
            "not a model folder",
        ),
        (["agree", *options, folder / "none.jsonl"], "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            run(capsys, *words)
    assert not (tmp_path / "out").exists()
