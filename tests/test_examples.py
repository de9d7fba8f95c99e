"""Few-shot examples: what loads, from our files and the paper's, and what is refused."""

import json
from dataclasses import replace

import pytest

from minicai import InputError
from minicai.constitution import Constitution, Principle, load, plain
from minicai.examples import (
    Comparison,
    Example,
    compared,
    fingerprint,
    in_front,
    load_comparisons,
    load_examples,
)
from minicai.feedback import Labelling, label_pairs, label_pairs_by_thinking
from minicai.prompts import READING
from minicai.tinyworld.corpus import Corpus
from minicai.tinyworld.grammar import comply, prompt_index
from minicai.tinyworld.judge import judge
from tests.test_constitution import PAPER, ROOT, write

ONE = """
[[example]]
prompt = "Where is it?"
response = "There. "
critique_request = "Say what is vague."
critique = "It names no place."
revision_request = "Name one."
revision = "In Rome."
"""
TWO = ONE + ONE.replace(
    '"Where is it?"', '"Human: Who?\\n\\nAssistant: He.\\n\\nHuman: Where is he?"'
)
WHERE = Example(
    "Where is it?", "There.", "Say what is vague.", "It names no place.", "Name one.", "In Rome."
)


def test_examples_are_read_as_written(tmp_path):
    first, second = load_examples(write(tmp_path, TWO, "examples.toml"))
    assert first == WHERE
    assert second.prompt == [
        {"role": role, "content": said}
        for role, said in (("user", "Who?"), ("assistant", "He."), ("user", "Where is he?"))
    ]


def test_the_papers_form_is_read_into_the_same_examples(tmp_path):
    text = (
        "\n\nHuman: Where is it?\n\nAssistant: There."
        "\n\nCritiqueRequest: Say what is vague.\n\nCritique: It names no place."
        "\n\nRevisionRequest: Name one.\n\nRevision: In Rome.\n\nHuman:"
    )
    again = text.removesuffix("\n\nHuman:").replace(
        "Human: Where is it?", "Human: Who?\n\nAssistant: He.\n\nHuman: Where is he?"
    )
    assert load_examples(write(tmp_path, json.dumps([text, again]), "few.json")) == load_examples(
        write(tmp_path, TWO, "examples.toml")
    )


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("e.toml", "", "no [[example]]"),
        ("e.toml", "example = 3", "no [[example]]"),
        ("e.toml", "[[example", "not a readable file of examples"),
        ("e.toml", ONE.replace("revision =", "revison ="), "example 1 must have exactly"),
        ("e.toml", ONE + ONE.replace('"In Rome."', '" "'), "example 2 must"),
        ("e.toml", ONE.replace('"Name one."', "7"), "example 1 must have exactly"),
        ("e.json", "[", "not a readable"),
        ("e.json", "7", "not a readable"),
        ("e.json", "[]", "no [[example]]"),
        ("e.json", '["Human: what?"]', "example 1 must have exactly"),
        ("e.json", "[7]", "not a readable"),
    ],
)
def test_a_malformed_file_is_refused_with_one_sentence_that_names_the_place(
    tmp_path, name, content, place
):
    path = write(tmp_path, content, name)
    with pytest.raises(InputError) as caught:
        load_examples(path)
    assert (
        str(caught.value).startswith(f"{path}: ")
        and place in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_examples(tmp_path / "none.toml")


def test_the_shipped_examples_load():
    general = ROOT / "configs" / "examples" / "general.toml"
    assert len(load_examples(general)) >= 2 and [
        c.better for c in load_comparisons(general, thinking=True)
    ] == ["A", "B"]


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's files are not in the repository")
def test_the_papers_examples_load_and_are_shown_in_our_form():
    examples = load_examples(PAPER / "CritiqueRevisionFewShotPrompts.json")
    assert [len(e.prompt) if isinstance(e.prompt, list) else 1 for e in examples] == [3, 1, 1, 3, 3]
    text = in_front(examples, plain, "ask")
    assert [
        text.count(mark)
        for mark in (
            READING,
            "\n\nCritique Request:",
            "\n\nRevision:",
            "Request:",
            "CritiqueRequest",
        )
    ] == [5, 5, 5, 10, 0]
    assert not any(e.revision.endswith("Human:") for e in examples)


# --- comparisons ----------------------------------------------------------------------------------

KIND = Principle("kind", comparison="Which is kinder?")
PAIR = """
[[comparison]]
prompt = "Who?"
first = "You."
second = "Go away."
better = "A"
rationale = "The second is rude."
"""
PAIRS = PAIR + PAIR.replace('"A"', '"B"').replace("You.", "Nobody.").replace(
    "Go away.", "Me."
).replace("second is rude", "first is curt")


def test_examples_of_comparisons_stand_in_front_with_their_answers(tmp_path):
    found = load_comparisons(write(tmp_path, PAIRS, "pairs.toml"))
    assert (
        found[0] == Comparison("Who?", "You.", "Go away.", "A", "The second is rude.")
        and found[1].better == "B"
    )
    opening = f"{READING}\n\nHuman: Who?\n\nWhich is kinder?\nOptions:\n"
    assert compared(found, KIND, "ask") == (
        f"{opening}(A) You.\n(B) Go away.\nThe answer is: (A)\n\n"
        f"{opening}(A) Nobody.\n(B) Me.\nThe answer is: (B)\n\nask"
    )
    thinking = (
        "\n\nAssistant: Let's think step by step: The second is rude."
        "\n\nHuman: So the answer is: (A)\n\n"
    )
    assert (
        thinking in compared(found, KIND, "ask", thinking=True)
        and compared([], KIND, "ask") == compared([], KIND, "ask", thinking=True) == "ask"
    )


def test_labels_are_asked_for_with_the_examples_in_front_and_say_so(tmp_path):
    found, asked = load_comparisons(write(tmp_path, PAIRS, "pairs.toml")), []
    how = Labelling(Constitution("rules", "1", (KIND,)), examples=found)
    pairs = [(0, "What?", "a", "b")]

    def choose(texts):
        asked.extend(texts)
        return [[-1.0, -2.0]] * len(texts)

    def think(texts, seeds):
        asked.extend(texts)
        return ["so"] * len(texts), [True] * len(texts)

    rows = label_pairs(pairs, choose, how, "j")
    assert len(asked) == 2
    for text in asked:
        assert text.startswith(compared(found, KIND, "")) and text.count("Options:") == 3
    thoughts = label_pairs_by_thinking(pairs, choose, think, how, "j")
    assert len(asked) == 6
    assert all(text.startswith(compared(found, KIND, "", thinking=True)) for text in asked[2:])
    assert rows[0]["examples"] == thoughts[0]["examples"] == fingerprint(found)
    assert "examples" not in label_pairs(pairs, choose, replace(how, examples=()), "j")[0]


@pytest.mark.parametrize(
    "content, thinking, place",
    [
        (ONE, False, "no [[comparison]]"),
        (
            PAIR.replace('better = "A"', 'better = "first"'),
            False,
            'comparison 1: better must be "A"',
        ),
        (PAIR + PAIR, False, "A is the better one in all 2 comparisons"),
        (PAIR.replace("second =", "secnd ="), False, "comparison 1 must have exactly"),
        (
            PAIR.replace('rationale = "The second is rude."', ""),
            True,
            "prompt, first, second, better, rationale",
        ),
    ],
)
def test_malformed_comparisons_are_refused_with_one_sentence(tmp_path, content, thinking, place):
    with pytest.raises(InputError) as caught:
        load_comparisons(write(tmp_path, content, "e.toml"), thinking)
    assert place in str(caught.value) and "\n" not in str(caught.value)
    assert (
        load_comparisons(
            write(tmp_path, PAIR.replace('rationale = "The second is rude."', ""), "e.toml")
        )[0].rationale
        == ""
    )


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's files are not in the repository")
def test_the_papers_comparisons_load_and_are_shown_in_our_form():
    plain_ones = load_comparisons(PAPER / "RLMadisonFewShotPrompts.json")
    assert [c.better for c in plain_ones] == ["A", "B", "A", "B", "A"] and plain_ones[
        0
    ].first.startswith("You should not get involved")
    thinking = load_comparisons(PAPER / "RLMadisonPrecogFewShotPrompts.json", thinking=True)
    assert [c.better for c in thinking] == ["B", "B", "A", "B", "A", "B"]
    assert [len(c.prompt) if isinstance(c.prompt, list) else 1 for c in thinking] == [3] + [1] * 5
    text = compared(thinking, KIND, "ask", thinking=True)
    assert (
        text.count("So the answer is: (") == 6
        and "[[[" not in text
        and "{}" not in text
        and "\nH:" not in text
    )


def test_the_tiny_world_s_examples_are_in_its_language_and_of_what_no_stage_or_evaluation_asks():
    path, corpus = (
        ROOT / "configs" / "examples" / "tiny.toml",
        Corpus(load(ROOT / "configs" / "constitutions" / "tiny.toml")),
    )
    for example in load_examples(path):
        request = prompt_index()[example.prompt]
        [principle] = [
            p
            for p in corpus.principles
            if (p.critique, p.revision) == (example.critique_request, example.revision_request)
        ]
        assert request.split == "skills" and example.response.endswith(comply(request))
        assert example.critique == corpus.critique_of(
            request, example.response, "comply", principle
        )
        assert example.revision == corpus.revision_of(
            request, example.response, "comply", principle
        )
    for pair in load_comparisons(path, thinking=True):
        first, second = (judge(pair.prompt, response) for response in (pair.first, pair.second))
        assert prompt_index()[pair.prompt].split == "skills" and pair.better == (
            "A" if first.score > second.score else "B"
        )
