"""Variants of stages 1 and 2 through the scripts, with random models and real sampling.

What they write can be read, resumed, and computed again. The training itself: test_training.py.
"""

import json
from collections import Counter
from unittest.mock import patch

import pytest

import train_rm
import train_sl
from minicai import InputError, critique
from minicai.engine import config, hub, sampler
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import encode_pair
from minicai.engine.load import load_tokenizer
from minicai.feedback import p_first_of
from tests.conftest import ROOT, SHORT_RULES
from tests.recorders import recorded

KINDS = {"sl": (train_sl, train_sl.SLConfig), "rm": (train_rm, train_rm.RMConfig)}
JOURNALS = {"sl": "revisions.jsonl", "rm": "comparisons.jsonl"}


def run(section, folder, name, *arguments):
    """Runs a stage as its command would. Gives its record and the rows of its journal.

    Checks that the record names the models, and each row those that made it.
    """
    (module, kind), out = KINDS[section], folder / name
    arguments = [str(folder / "config.toml"), f"--out={out}", *arguments]
    record = module.main(config.load(kind, section, arguments))
    assert all(hub.weights_sha256(path) == sha for path, sha in record["models"].items())
    assert str(folder / "model") in record["models"]
    written = json.loads((out / section / "stage.json").read_text())
    assert written.keys() - {"sha256"} == record.keys()
    journal = out / section / JOURNALS[section]
    rows = read_jsonl(journal) if journal.exists() else []  # none where nothing was asked
    short = {path: sha[:12] for path, sha in record["models"].items()}
    for row in rows:
        if row.get("source", "ai") == "ai":
            assert row["models"] and row["models"].items() <= short.items()
    return record, rows


def sl(folder, name, *arguments):
    return run("sl", folder, name, *arguments)


def rm(folder, name, *arguments):
    return run("rm", folder, name, *arguments)


@pytest.fixture(scope="module")
def plain(folder):
    """Stage 1 without variants: its record and its rows."""
    return sl(folder, "plain")


@pytest.fixture(scope="module")
def labelled(folder):
    """Stage 2 without variants: its record and its rows."""
    return rm(folder, "labelled")


# --- stage 1 --------------------------------------------------------------------------------------


def test_a_row_of_revisions_says_what_made_it(folder, plain):
    record, rows = plain
    assert [row["id"] for row in rows] == list(range(6)) and record["hygiene"]["revisions"] == 12
    keys = {"id", "prompt", "initial", "ended", "rounds", "final", "kept"}
    assert all(set(row) == keys | {"model", "seed", "constitution", "models"} for row in rows)
    assert rows[0]["model"] == str(folder / "model") and rows[0]["seed"] == 0
    assert rows[0]["constitution"] == record["constitution"]
    assert set(record["models"]) == {str(folder / "model")}
    assert record["examples"] == sum(2 for row in rows if row["kept"]) > 0


def test_another_critic_principles_in_turn_and_strong_critiques(folder, plain):
    critic = str(folder / "other")
    record, rows = sl(
        folder, "turn", f"--critic={critic}", "--principles=in_turn", "--style=strong"
    )
    assert [row["initial"] for row in rows] == [row["initial"] for row in plain[1]]
    before, after = plain[1][0]["rounds"][0], rows[0]["rounds"][0]
    assert before["critique"] != after["critique"]
    assert [step["principle"] for step in rows[1]["rounds"]] == ["brief", "kind"]
    assert critic in record["models"] and critic in rows[0]["models"]


def test_all_principles_and_examples_and_no_critiques(folder):
    examples = (ROOT / "configs" / "examples" / "general.toml").read_text()
    (folder / "one.toml").write_text("[[example]]" + examples.split("[[example]]")[3])
    arguments = ("--principles=all", "--style=none", f"--examples={folder / 'one.toml'}")
    with recorded(sampler, "respond") as asked:
        record, rows = sl(folder, "all", *arguments)
    steps = {(step["principle"], step["critique"]) for row in rows for step in row["rounds"]}
    assert steps == {("all", "")}
    assert record["hygiene"]["revisions"] == 12
    initial, *revisions = [texts for (_, texts, *_), _ in asked]
    assert not any("Revision Request" in str(text) for text in initial)
    assert all(text.count("Revision Request:") == 2 for texts in revisions for text in texts)


def test_the_policy_answers_and_learns_and_the_model_criticises_and_revises(folder, plain):
    model, other = str(folder / "model"), str(folder / "other")
    record, rows = sl(folder, "second", f"--policy={other}")
    assert other in record["models"] and other in rows[0]["models"]
    assert rows[0]["initial"] != plain[1][0]["initial"]
    _, swapped = sl(folder, "third", f"--policy={model}", f"--model={other}")
    # The same policy, revised by another model.
    assert [row["initial"] for row in swapped] == [row["initial"] for row in plain[1]]
    assert [row["final"] for row in swapped] != [row["final"] for row in plain[1]]


def test_rounds_stop_where_a_critique_has_a_phrase(folder, plain):
    text = plain[1][0]["rounds"][0]["critique"]
    phrase = next(c for c in text if c.isprintable() and c.strip())
    record, rows = sl(folder, "stopped", f"--nothing={phrase}")
    assert rows[0]["rounds"] == [] and record["hygiene"]["stopped"] >= 1
    assert phrase.casefold() in rows[0]["stopped"]["critique"].casefold()


def test_revisions_with_a_fault_are_kept_in_the_file_and_left_out_of_training(folder):
    """Harmless answers remain. Without any there is nothing to train on, and the stage says so."""
    few = ("--drop=boilerplate", "--limit=4")
    answered = (f"--helpful_prompts={folder / 'prompts.txt'}", "--helpful_samples=1")
    with patch.object(critique, "BOILERPLATE", ("",)):  # every text opens with it
        record, rows = sl(folder, "dropped", *few, *answered)
        with pytest.raises(InputError, match=r"no response is left to train on: .* drop"):
            sl(folder, "all-dropped", *few)
    assert record["examples"] == 6 and record["hygiene"]["boilerplate"] == 8
    assert [len(row["rounds"]) for row in rows] == [2] * 4
    out = folder / "all-dropped" / "sl"
    assert read_jsonl(out / "revisions.jsonl") == rows and not (out / "stage.json").exists()


def test_a_stage_without_red_team_prompts_learns_from_the_rest(folder):
    helpful = f"--helpful_prompts={folder / 'prompts.txt'}"
    record, rows = sl(folder, "harmless", "--prompts=", helpful, "--helpful_samples=1")
    assert record["examples"] == 6 and rows == []
    record, rows = rm(folder, "people", "--prompts=")
    assert {row["source"] for row in rows} == {"human"} and len(rows) == 40
    assert record["train_pairs"] + record["heldout_pairs"] == 40


def test_the_last_round_can_be_trained_on_without_the_others(folder, plain):
    record, rows = sl(folder, "last", "--keep=last")
    assert record["examples"] == plain[0]["examples"] / 2 and rows == plain[1]


def test_helpful_samples_are_mixed_in(folder, plain):
    samples = (f"--helpful_prompts={folder / 'prompts.txt'}", "--helpful_samples=2")
    record, _ = sl(folder, "samples", *samples, "--helpful_limit=5")
    helpful = read_jsonl(folder / "samples" / "sl" / "helpful.jsonl")
    assert [row["prompt"] for row in helpful[::2]] == [row["prompt"] for row in plain[1][:5]]
    assert len({row["response"] for row in helpful}) > 5
    assert all(row["models"] and row["seed"] == 0 for row in helpful)
    assert {row["ended"] for row in helpful} <= {True, False}
    assert record["examples"] - plain[0]["examples"] == len(helpful) == 10


def ends_learned(folder, name, text, ended) -> set[bool]:
    """Whether the responses end that stage 1 learns where the model always says `text`."""

    def respond(model, asked, *_):
        return [text] * len(asked), [ended] * len(asked)

    with patch.object(sampler, "respond", respond), recorded(train_sl, "collate") as batches:
        sl(folder, name, "--max_new_tokens=12")
    learned = [response for (_, responses, _), _ in batches for response in responses]
    assert len(learned) == 12
    eos = load_tokenizer(str(folder / "model")).eos_token_id
    return {response[-1] == eos for response in learned}


def test_a_response_that_was_cut_off_does_not_end_in_training(folder):
    """The limit is 12 tokens: a blank, ten letters and the end; or a blank and eleven letters."""
    assert ends_learned(folder, "ended", "ten letter", True) == {True}
    assert ends_learned(folder, "cut-off", "ten letters", False) == {False}


def test_a_short_text_that_was_cut_off_does_not_end_in_training(folder):
    """A limit cuts tokens, and decoding strips blanks: the text may be shorter than the limit."""
    assert ends_learned(folder, "stripped", "short", False) == {False}


def test_a_long_text_that_ended_ends_in_training(folder):
    """A text may have more tokens than were sampled when it is encoded again."""
    assert ends_learned(folder, "longer", "more than twelve letters", True) == {True}


def test_harmless_answers_end_in_training_where_they_ended(folder):
    """Each second answer was cut off; an empty one teaches nothing."""

    def respond(model, asked, *_):
        texts = ["Some.", "Words.", ""] * len(asked)
        return texts[: len(asked)], [k % 2 == 0 for k in range(len(asked))]

    flags = (f"--helpful_prompts={folder / 'prompts.txt'}", "--helpful_samples=1", "--prompts=")
    with patch.object(train_sl, "respond", respond), recorded(train_sl, "collate") as batches:
        sl(folder, "half", *flags)
    tokenizer = load_tokenizer(str(folder / "model"))
    learned = [tokenizer.decode(ids) for (_, responses, _), _ in batches for ids in responses]
    end = tokenizer.eos_token
    assert sorted(learned) == [" Some.", f" Some.{end}", " Words.", f" Words.{end}"]


def test_what_an_earlier_version_did_not_say_is_guessed_from_the_length_with_one_warning(
    folder, capsys
):
    def respond(model, asked, *_):
        return ["ten letter", "ten letters"] * (len(asked) // 2), [True] * len(asked)

    flags = (f"--helpful_prompts={folder / 'prompts.txt'}", "--helpful_samples=1")
    flags += ("--max_new_tokens=12",)
    with patch.object(sampler, "respond", respond), patch.object(train_sl, "respond", respond):
        sl(folder, "early", *flags)
    out = folder / "early" / "sl"
    assert "WARNING" not in capsys.readouterr().err
    for name in ("revisions", "helpful"):
        rows = read_jsonl(out / f"{name}.jsonl")
        for row in rows:
            for response in (row, *row.get("rounds", ())):
                assert response.pop("ended")
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "stage.json").unlink()
    with recorded(train_sl, "collate") as batches:
        sl(folder, "early", *flags)
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1 and "do not say which responses" in said
    tokenizer = load_tokenizer(str(folder / "model"))
    learned = [tokenizer.decode(ids) for (_, responses, _), _ in batches for ids in responses]
    assert Counter(learned) == {f" ten letter{tokenizer.eos_token}": 9, " ten letters": 9}


# --- stage 2 --------------------------------------------------------------------------------------


def test_a_row_of_comparisons_says_what_made_it(folder, labelled):
    record, rows = labelled
    ai = [row for row in rows if row["source"] == "ai"]
    human = [row for row in rows if row["source"] == "human"]
    assert rows == ai + human and len(human) == 40 and len(ai) == 6
    keys = {"id", "prompt", "first", "second", "p_first", "votes", "source", "clamped"}
    assert all(set(row) == keys | {"cut", "seed", "constitution", "models"} for row in ai)
    assert all(row["p_first"] == p_first_of(row) and len(row["votes"]) == 2 for row in ai)
    assert all((row["first"], row["p_first"]) == ("yes", 1.0) for row in human)
    assert record["train_pairs"] + record["heldout_pairs"] == 46
    assert sum(record["train_sources"].values()) == record["train_pairs"]


def test_human_pairs_can_be_few_or_none(folder, labelled):
    few, rows = rm(folder, "few", "--preferences_limit=3", "--heldout=0.0")
    assert few["train_sources"] == {"ai": 6, "human": 3} and few["heldout_ids"] == []
    assert rows == labelled[1][:9]
    assert few["accuracy_vs_labels"] is None  # there is nothing to measure it on
    stored = json.loads((folder / "few" / "rm" / "stage.json").read_text())
    assert stored["accuracy_vs_labels"] is None


def test_a_jury_hard_labels_and_an_ensemble_of_principles(folder):
    words = ("--vote=majority", "--labels=hard", "--principles=2", "--preferences=")
    record, rows = rm(folder, "jury", f"--jury={folder / 'other'}", *words)
    judges = {vote["judge"] for row in rows for vote in row["votes"]}
    assert judges == {str(folder / "model"), str(folder / "other")} == set(record["models"])
    for row in rows:
        assert len(row["votes"]) == 2 * 2 * 2
        assert row["p_first"] in (0, 0.5, 1) and row["p_first"] == p_first_of(row)
        assert row["labels"] == "hard" and row["combine"] == "majority"


def test_chains_of_thought_are_clamped_and_may_follow_examples(folder):
    (folder / "compared.toml").write_text(
        '[[comparison]]\nprompt = "Well?"\nfirst = "Yes."\nsecond = "No."\nbetter = "A"\n'
        'rationale = "Yes is kinder."\n'
    )
    words = ("--labels=chain_of_thought", "--thoughts=2", "--clamp=0.45", "--preferences=")
    _, rows = rm(folder, "thought", *words, f"--examples={folder / 'compared.toml'}")
    for row in rows:
        assert len(row["votes"]) == 4 and 0.45 <= row["p_first"] == p_first_of(row) <= 0.55
        assert row["clamp"] == [0.45, 0.55] and len(row["examples"]) == 64
    assert any(row["clamped"] for row in rows)
    assert len({vote["rationale"] for row in rows for vote in row["votes"]}) > 4


def test_another_feedback_model_makes_other_labels_of_the_same_pairs(folder, labelled):
    other = str(folder / "other")
    record, rows = rm(folder, "feedback", f"--feedback={other}", "--preferences=", "--swap=false")
    assert set(record["models"]) == {str(folder / "model"), other}
    assert [row["first"] for row in rows] == [row["first"] for row in labelled[1][:6]]
    assert [row["p_first"] for row in rows] != [row["p_first"] for row in labelled[1][:6]]
    votes = [vote for row in rows for vote in row["votes"]]
    assert {vote["judge"] for vote in votes} == {other} and len(votes) == 6


def test_four_candidates_make_six_pairs_of_a_prompt(folder, labelled):
    record, rows = rm(folder, "four", "--preferences=", "--candidates=4")
    sampled = read_jsonl(folder / "four" / "rm" / "pairs.jsonl")
    assert [row["id"] for row in sampled] == list(range(36))
    assert [row["prompt"] for row in sampled[::6]] == [f"Question {k}?" for k in range(6)]
    assert record["train_pairs"] + record["heldout_pairs"] == len(rows)
    # The first two candidates are those of a run with two.
    two = read_jsonl(folder / "labelled" / "rm" / "pairs.jsonl")
    firsts = [(row["first"], row["second"]) for row in two]
    assert [(row["first"], row["second"]) for row in sampled[::6]] == firsts
    for k in range(6):
        pairs = sampled[6 * k : 6 * k + 6]
        assert len({row[side] for row in pairs for side in ("first", "second")}) == 4


def test_equal_responses_are_not_compared(folder):
    same = lambda model, asked, *_: (["Yes."] * len(asked), [True] * len(asked))  # noqa: E731
    with patch.object(sampler, "respond", same):
        _, rows = rm(folder, "same", "--limit=4")
    assert len(read_jsonl(folder / "same" / "rm" / "pairs.jsonl")) == 4
    assert {row["source"] for row in rows} == {"human"}


def test_revisions_and_comparisons_of_earlier_rounds_are_trained_on_as_well(
    folder, labelled, capsys
):
    """The human comparisons of an earlier round are not taken twice.

    The second row is of an earlier version, and does not say whether its responses ended.
    """
    revised = folder / "plain-policy"
    revised.mkdir()
    for file in (folder / "model").iterdir():
        (revised / file.name).write_bytes(file.read_bytes())
    steps = [{"principle": "kind", "critique": "c", "revision": "So."}]
    row = {"initial": "Ah.", "rounds": steps, "final": "So.", "kept": True}
    rows = [row | {"id": k, "prompt": f"Asked {k}"} for k in range(3)]
    rows[0] |= {"ended": True, "rounds": [steps[0] | {"ended": False}]}
    lines = map(json.dumps, rows)
    (revised / "revisions.jsonl").write_text("\n".join(lines) + "\n")
    earlier = folder / "labelled" / "rm" / "comparisons.jsonl"
    arguments = (f"--policy={revised}", "--revision_pairs=2", f"--earlier={earlier}")
    record, rows = rm(folder, "later", *arguments, "--seed=5", "--heldout=0.0")
    by_source = {source: [] for source in ("ai", "critique", "human")}
    for row in rows:
        by_source[row["source"]].append(row)
    assert [row["id"] for row in by_source["critique"]] == ["revision:0", "revision:1"]
    assert {row["p_first"] for row in by_source["critique"]} == {0.0}
    assert [row.get("cut") for row in by_source["critique"]] == [["second"], None]
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1 and "1 pairs do not say whether the length limit" in said
    again = [row for row in by_source["ai"] if str(row["id"]).startswith("round1:")]
    ours = [row for row in labelled[1] if row["source"] == "ai"]
    assert [row | {"id": int(row["id"].removeprefix("round1:"))} for row in again] == ours
    assert len(by_source["human"]) == 40 and len(by_source["ai"]) == 12
    assert record["train_sources"] == {name: len(found) for name, found in by_source.items()}
    assert len({str(row["id"]) for row in rows}) == len(rows)


def test_a_response_that_was_cut_off_does_not_end_for_the_reward_model(folder):
    respond = sampler.respond

    def cut(*arguments):
        texts, _ = respond(*arguments)
        return texts, [k % 3 > 0 for k in range(len(texts))]

    with patch.object(sampler, "respond", cut):
        _, rows = rm(folder, "cut", "--preferences=")
    sampled = {row["id"]: row for row in read_jsonl(folder / "cut" / "rm" / "pairs.jsonl")}
    both = ["first", "second"]  # six prompts: responses k and k + 6 make pair k
    assert [sampled[k]["cut"] for k in range(6)] == [both, [], [], both, [], []]
    tokenizer = load_tokenizer(str(folder / "model"))
    for row in rows:
        assert row["cut"] == sampled[row["id"]]["cut"]
        _, first, second = encode_pair(tokenizer, row)
        ends = [response[-1] == tokenizer.eos_token_id for response in (first, second)]
        assert ends == [not row["cut"]] * 2
    row = {"prompt": "Why?", "first": "So.", "second": "So.", "cut": ["second"]}
    _, first, second = encode_pair(tokenizer, row)
    assert first == [*second, tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["Same.", ""])
def test_two_equal_responses_are_left_out_whoever_they_are_from(folder, capsys, text):
    """They teach nothing, and cannot be ordered."""

    def respond(model, asked, *_):
        return [text] * len(asked), [True] * len(asked)

    lines = (folder / "human.jsonl").read_text().splitlines()
    lines[1:1] = [json.dumps({"prompt": "Tell", "chosen": text, "rejected": text})] * 3
    path = folder / f"equal{text}.jsonl"
    path.write_text("\n".join(lines))
    with patch.object(sampler, "respond", respond):
        record, rows = rm(folder, f"equal{text}", f"--preferences={path}")
    assert {row["source"] for row in rows} == {"human"} and len(rows) == 40
    assert record["equal_pairs"] == 3 + 6
    assert record["train_pairs"] + record["heldout_pairs"] == 40
    assert capsys.readouterr().err.count("3 pairs of two equal responses are left out") == 1


def test_a_stage_with_nothing_to_train_on_says_so_and_finishes_nothing(folder):
    """All pairs are held out; or all of them are equal; or no label prefers a response."""

    def respond(model, asked, *_):
        return ["Same."] * len(asked), [True] * len(asked)

    def undecided(model, prompts, *_):
        return [[-1.0, -1.0] for _ in prompts]

    bare = "--preferences="
    with pytest.raises(InputError, match=r"heldout = 0.99: 6 of 6 pairs are held out"):
        rm(folder, "all-held", bare, "--heldout=0.99")
    with (
        patch.object(sampler, "respond", respond),
        pytest.raises(InputError, match="0 of 0 pairs are held out"),
    ):
        rm(folder, "all-equal", bare)
    with (
        patch.object(sampler, "choice_logprobs", undecided),
        pytest.raises(InputError, match="none of the others says which response is better"),
    ):
        rm(folder, "undecided", bare)
    for name in ("all-held", "all-equal", "undecided"):
        assert not (folder / name / "rm" / "stage.json").exists()


def test_a_given_pair_that_does_not_fit_the_context_is_named(folder):
    lines = (folder / "human.jsonl").read_text().splitlines()
    lines[1:1] = ["", json.dumps({"prompt": "Tell", "chosen": "yes", "rejected": "n" * 2048})]
    (folder / "long.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"pair long\.jsonl:3: .* has \d+ tokens"):
        rm(folder, "long", f"--preferences={folder / 'long.jsonl'}")
    assert not (folder / "long").exists()


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, journals, words",
    [
        ("sl", ["revisions.jsonl"], ["--principles=in_turn", "--style=strong"]),
        (
            "rm",
            ["pairs.jsonl", "comparisons.jsonl"],
            ["--candidates=3", "--labels=chain_of_thought", "--jury=other"],
        ),
    ],
)
def test_a_run_of_variants_that_was_interrupted_resumes_to_the_same_files(
    folder, section, journals, words
):
    """Each journal ends in the middle of a line, and of a group."""
    words = [word.replace("=other", f"={folder / 'other'}") for word in words]
    run(section, folder, f"torn-{section}", *words)
    path = folder / f"torn-{section}" / section
    files = ["model.safetensors", *(file.name for file in path.glob("*.jsonl"))]
    whole = {file: (path / file).read_bytes() for file in files}
    for k, name in enumerate(journals):
        for file in path.iterdir():
            if file.name not in ("config.toml", *journals[: k + 1]):
                file.unlink()
        (path / name).write_bytes(whole[name][: 2 * len(whole[name]) // 3])
        run(section, folder, f"torn-{section}", *words)
        assert {file: (path / file).read_bytes() for file in whole} == whole


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, argument, message",
    [
        ("sl", "--critic=othr", "othr is not a model folder"),
        ("sl", "--examples=none.toml", "No such file"),
        ("sl", "--style=weak", "style must be one of plain, chain_of_thought, strong, none"),
        ("sl", "--drop=long", "drop must be one of empty, unchanged, leaked, boilerplate"),
        ("sl", "--principles=some", "principles must be one of"),
        ("sl", "--max_new_tokens=700", "a revision request to .* context of 2048"),
        ("rm", "--candidates=1", "candidates must be at least 2"),
        ("rm", "--principles=3", "fewer than 3"),
        ("rm", "--clamp=0.7", "clamp must be at least 0 and at most 0.49"),
        ("rm", "--heldout=1", "heldout must be at least 0 and at most 0.99"),
        ("rm", "--labels=strong", "labels must be one of soft, hard, chain_of_thought"),
        ("rm", "--thoughts=0", "thoughts must be at least 1"),
        ("rm", "--jury=othr", "othr is not a model folder"),
        ("rm", "--jury=model", "named twice"),
        ("rm", "--max_new_tokens=1000", "a comparison to .* context of 2048"),
        # With a rationale there are three answers in the context, with a critique too.
        ("rm", "--labels=chain_of_thought --max_new_tokens=640", "a comparison to .* of 2048"),
        (
            "sl",
            "--prompts=long.txt",
            "long.txt: prompt 1: it has 2046 tokens, which with 6 new ones",
        ),
        ("sl", "--helpful_prompts=long.txt", "long.txt: prompt 1: it has 2046 tokens"),
        ("rm", "--prompts=long.txt", "a comparison to .* 2146 tokens, which with 16 new ones"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    folder, section, argument, message
):
    (folder / "long.txt").write_text("x" * 2025)
    name = f"refused{argument}"
    with pytest.raises(InputError, match=message):
        run(section, folder, name, *argument.split())
    assert not (folder / name).exists()


@pytest.mark.parametrize("section", KINDS)
def test_a_setting_that_is_no_more_says_what_to_do_instead(folder, section):
    top = vars(config.Run())
    for key, instead in config.MOVED.items():
        (folder / "old.toml").write_text(f"model = 'model'\n[{section}]\n{key} = 1\n")
        with pytest.raises(InputError) as caught:
            config.load(KINDS[section][1], section, [str(folder / "old.toml")])
        assert f"unknown key '{key}' in [{section}]" in str(caught.value)
        assert str(caught.value).endswith(instead)
        if key not in top:
            with pytest.raises(InputError, match=f"--{key}: unknown key"):
                run(section, folder, "refused", f"--{key}=1")


def test_a_constitution_without_critiques_is_refused_unless_none_are_requested(folder):
    lines = [line for line in SHORT_RULES.splitlines() if not line.startswith("critique")]
    (folder / "bare.toml").write_text("\n".join(lines))
    bare = f"--constitution={folder / 'bare.toml'}"
    with pytest.raises(InputError, match="no principle with a critique and a revision request"):
        sl(folder, "bare", bare)
    _, rows = sl(folder, "bare", bare, "--style=none")
    assert {step["principle"] for row in rows for step in row["rounds"]} <= {"kind", "brief"}
