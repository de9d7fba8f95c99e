"""The variants of both phases through the scripts themselves, with tiny random models: what they write can be read, resumed and made again."""

import json
from pathlib import Path

import pytest
from minicai.engine.audit import weights_sha256

import train_rm
import train_sl
from minicai import InputError, constitution, critique
from minicai.engine import config
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import encode_pair
from minicai.engine.models import load_tokenizer
from minicai.feedback import p_first_of
from tests.conftest import SHORT_RULES


def run(module, kind, section, folder, name, *arguments):
    """Runs a stage, checks that its record names the models, and returns it with the rows of its journal."""
    out = folder / name
    cfg = config.load(kind, section, [str(folder / "config.toml"), f"--out={out}", *arguments])
    record = module.main(cfg)
    assert (
        all(weights_sha256(path) == sha for path, sha in record["models"].items())
        and str(folder / "model") in record["models"]
    )
    assert json.loads((out / section / "stage.json").read_text()).keys() == record.keys()
    rows = read_jsonl(
        out / section / ("revisions.jsonl" if section == "sl" else "comparisons.jsonl")
    )
    short = {path: sha[:12] for path, sha in record["models"].items()}
    assert all(
        row["models"] and row["models"].items() <= short.items()
        for row in rows
        if row.get("source", "ai") == "ai"
    )
    return record, rows


def sl(folder, name, *arguments):
    return run(train_sl, train_sl.SLConfig, "sl", folder, name, *arguments)


def rm(folder, name, *arguments):
    return run(train_rm, train_rm.RMConfig, "rm", folder, name, *arguments)


def test_phase_1_with_another_critic_principles_in_turn_and_strong_critiques(folder):
    plain, rows = sl(folder, "plain")
    other, variant = sl(
        folder, "turn", f"--critic={folder / 'other'}", "--principles=in_turn", "--style=strong"
    )
    assert [row["initial"] for row in rows] == [row["initial"] for row in variant]
    assert rows[0]["rounds"][0]["critique"] != variant[0]["rounds"][0]["critique"]
    assert [step["principle"] for step in variant[1]["rounds"]] == ["brief", "kind"]
    assert variant[0]["critic"] == str(folder / "other") in other["models"] and set(
        plain["models"]
    ) == {str(folder / "model")}
    assert plain["hygiene"]["revisions"] == 12 and "critic" not in rows[0]


def test_helpful_samples_are_cut_to_their_share(folder):
    samples = (f"--helpful_prompts={folder / 'prompts.txt'}", "--helpful_samples=2")
    whole, _ = sl(folder, "all-samples", *samples)
    part, _ = sl(folder, "a-quarter", *samples, "--helpful_share=0.25")
    revisions = sum(
        2 for row in read_jsonl(folder / "a-quarter" / "sl" / "revisions.jsonl") if row["kept"]
    )
    helpful = read_jsonl(folder / "a-quarter" / "sl" / "helpful.jsonl")
    assert (
        part["examples"] - revisions
        == round(revisions / 3)
        < len(helpful)
        == whole["examples"] - revisions
    )
    assert all(row["models"] and row["seed"] == 0 for row in helpful)
    with pytest.raises(InputError, match="helpful_share must be less than 1"):
        sl(folder, "none", *samples, "--helpful_share=1.0")


def test_phase_1_drops_what_it_is_told_to_from_training_alone(folder, monkeypatch):
    monkeypatch.setattr(critique, "BOILERPLATE", ("",))  # every text opens with it
    record, rows = sl(folder, "dropped", "--drop=boilerplate")
    assert (
        record["examples"] == 0
        and record["hygiene"]["boilerplate"] == 12
        and all(len(row["rounds"]) == 2 for row in rows)
    )
    assert sl(folder, "undropped")[0]["examples"] == sum(2 for row in rows if row["kept"]) > 0


def test_phase_1_with_all_principles_and_examples_and_without_critiques(folder):
    examples = Path(__file__).parents[1] / "configs" / "examples" / "general.toml"
    (folder / "one.toml").write_text("[[example]]" + examples.read_text().split("[[example]]")[3])
    record, rows = sl(
        folder, "all", "--principles=all", "--style=none", f"--examples={folder / 'one.toml'}"
    )
    assert {(step["principle"], step["critique"]) for row in rows for step in row["rounds"]} == {
        ("all", "")
    }
    assert len(rows[0]["examples"]) == 64 and record["hygiene"]["revisions"] == 12


def test_phase_1_stops_where_a_critique_holds_a_phrase(folder):
    _, rows = sl(folder, "whole")
    phrase = next(c for c in rows[0]["rounds"][0]["critique"] if c.isprintable() and c.strip())
    record, stopped = sl(folder, "stopped", f"--nothing={phrase}")
    assert (
        stopped[0]["rounds"] == []
        and phrase.casefold() in stopped[0]["stopped"]["critique"].casefold()
        and record["hygiene"]["stopped"] >= 1
    )


def test_phase_2_with_a_jury_hard_labels_and_an_ensemble_of_principles(folder):
    record, rows = rm(
        folder,
        "jury",
        f"--jury={folder / 'other'}",
        "--vote=majority",
        "--labels=hard",
        "--principles=2",
        "--preferences=",
    )
    assert (
        {vote["judge"] for row in rows for vote in row["votes"]}
        == {str(folder / "model"), str(folder / "other")}
        == set(record["models"])
    )
    assert all(
        len(row["votes"]) == 2 * 2 * 2
        and row["p_first"] in (0, 0.5, 1)
        and row["p_first"] == p_first_of(row)
        for row in rows
    )
    assert all(row["labels"] == "hard" and row["combine"] == "majority" for row in rows)


def test_phase_2_with_chains_of_thought(folder):
    _, rows = rm(folder, "thought", "--labels=chain_of_thought", "--thoughts=2", "--preferences=")
    assert rows and all(
        len(row["votes"]) == 4 and 0.4 <= row["p_first"] == p_first_of(row) <= 0.6 for row in rows
    )
    assert len({vote["rationale"] for row in rows for vote in row["votes"]}) > 4


def test_phase_2_with_four_candidates(folder):
    two, rows = rm(folder, "two", "--preferences=")
    four, all_pairs = rm(folder, "four", "--preferences=", "--candidates=4")
    best, _ = rm(folder, "best", "--preferences=", "--candidates=4", "--pairing=best_worst")
    sampled = read_jsonl(folder / "four" / "rm" / "pairs.jsonl")
    assert [row["id"] for row in sampled] == list(range(36)) and [
        row["prompt"] for row in sampled[::6]
    ] == [f"Question {k}?" for k in range(6)]
    assert (
        sum(r["train_pairs"] + r["heldout_pairs"] for r in (two, four, best))
        == len(rows) + len(all_pairs) + 6
    )
    firsts = {
        row["id"]: (row["first"], row["second"])
        for row in read_jsonl(folder / "two" / "rm" / "pairs.jsonl")
    }
    assert [(row["first"], row["second"]) for row in sampled[::6]] == [
        firsts[k] for k in range(6)
    ]  # the first two candidates are those of two
    assert [
        len({sampled[6 * k + c][side] for c in range(6) for side in ("first", "second")})
        for k in range(6)
    ] == [4] * 6


def test_a_response_that_was_cut_off_does_not_end_for_the_reward_model(folder, monkeypatch):
    respond = train_rm.respond
    monkeypatch.setattr(
        train_rm,
        "respond",
        lambda *args, **others: (
            (texts := respond(*args, **others)[0]),
            [k % 3 > 0 for k in range(len(texts))],
        ),
    )
    _, rows = rm(folder, "cut", "--preferences=")
    sampled, tokenizer = (
        {row["id"]: row for row in read_jsonl(folder / "cut" / "rm" / "pairs.jsonl")},
        load_tokenizer(str(folder / "model")),
    )
    assert [sampled[k]["cut"] for k in range(6)] == [
        ["first", "second"],
        [],
        [],
        ["first", "second"],
        [],
        [],
    ]  # six of each candidate
    for row in rows:
        assert row["cut"] == sampled[row["id"]]["cut"]
        assert [
            response[-1] == tokenizer.eos_token_id for response in encode_pair(tokenizer, row)[1:]
        ] == [not row["cut"]] * 2
    _, first, second = encode_pair(
        tokenizer, {"prompt": "Why?", "first": "So.", "second": "So.", "cut": ["second"]}
    )
    assert first == [*second, tokenizer.eos_token_id]


@pytest.mark.parametrize("torn", ["sl/revisions.jsonl", "rm/pairs.jsonl", "rm/comparisons.jsonl"])
def test_a_run_of_variants_that_was_interrupted_goes_on_as_if_it_had_not_been(folder, torn):
    section, name = torn.split("/")
    stage, words = (
        (sl, ["--principles=in_turn", "--style=strong"])
        if section == "sl"
        else (
            rm,
            [
                "--candidates=3",
                "--pairing=best_worst",
                "--labels=chain_of_thought",
                f"--jury={folder / 'other'}",
            ],
        )
    )
    stage(folder, f"torn{name}", *words)
    path = folder / f"torn{name}" / section
    whole = {
        file: (path / file).read_bytes()
        for file in ("model.safetensors", *(p.name for p in path.glob("*.jsonl")))
    }
    for file in path.iterdir():
        if file.name not in ("config.toml", "pairs.jsonl", name):
            file.unlink()
    (path / name).write_bytes(
        whole[name][: 2 * len(whole[name]) // 3]
    )  # in the middle of a line, and of a group
    stage(folder, f"torn{name}", *words)
    assert {file: (path / file).read_bytes() for file in whole} == whole


def test_human_pairs_take_their_share_of_all_and_weigh_what_they_are_told(folder):
    record, rows = rm(
        folder, "share", "--preferences_share=0.6", "--preferences_weight=0.5", "--heldout=0.0"
    )
    human = [row for row in rows if row["source"] == "human"]
    assert (
        len(human) == 9 == record["train_sources"]["human"] and record["train_sources"]["ai"] == 6
    )
    assert {row["weight"] for row in human} == {0.5} and not any(
        "weight" in row for row in rows if row["source"] == "ai"
    )


def test_a_weight_of_zero_trains_as_if_the_human_pairs_taught_nothing(folder):
    """One step over the same batch: with weight 0 the loss is that of the AI pairs alone, over the count of all pairs."""
    loss = {}
    for weight in (0.0, 1.0, 2.0):
        rm(
            folder,
            f"weight{weight}",
            "--preferences_share=0.5",
            f"--preferences_weight={weight}",
            "--heldout=0.0",
        )
        [step] = read_jsonl(folder / f"weight{weight}" / "rm" / "metrics.jsonl")
        loss[weight] = step["loss"]
    assert loss[0.0] < loss[1.0] and loss[2.0] - loss[1.0] == pytest.approx(
        loss[1.0] - loss[0.0], rel=1e-4
    )


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--candidates=1", "candidates must be at least 2"),
        ("--principles=3", "fewer than 3"),
        ("--clamp_low=0.7", "on both sides of 0.5"),
        ("--preferences_share=1.0", "less than 1"),
        ("--preferences_weight=-1.0", "must not be negative"),
        ("--labels=strong", "labels must be one of"),
        ("--thoughts=0", "thoughts must be at least 1"),
        ("--jury=othr", "othr is not a model folder"),
        ("--jury=model", "named twice"),
    ],
)
def test_settings_of_phase_2_that_make_no_sense_are_refused_before_anything_is_written(
    folder, argument, message
):
    with pytest.raises(InputError, match=message):
        rm(folder, "refused", argument)
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--critic=othr", "othr is not a model folder"),
        ("--examples=none.toml", "No such file"),
        ("--style=weak", "style must be one of"),
        ("--drop=empty", "drop may hold unchanged, leaked, boilerplate"),
        ("--principles=some", "principles must be one of"),
    ],
)
def test_settings_of_phase_1_that_make_no_sense_are_refused_before_anything_is_written(
    folder, argument, message
):
    with pytest.raises(InputError, match=message):
        sl(folder, "refused", argument)
    assert not (folder / "refused").exists()


def test_a_constitution_without_critiques_is_refused_unless_none_are_asked_for(folder):
    (folder / "bare.toml").write_text(
        "\n".join(line for line in SHORT_RULES.splitlines() if not line.startswith("critique"))
    )
    with pytest.raises(InputError, match="no principle with a critique and a revision request"):
        sl(folder, "bare", f"--constitution={folder / 'bare.toml'}")
    _, rows = sl(folder, "bare", f"--constitution={folder / 'bare.toml'}", "--style=none")
    assert {p.name for p in constitution.load(folder / "bare.toml").usable("revision")} >= {
        s["principle"] for row in rows for s in row["rounds"]
    }
