"""Chat: what a model is shown, what a person sees, and what is done at each /command; the models' words are scripted where they matter."""

import io
import shutil
import sys

import pytest

from minicai import InputError, __main__
from minicai.engine.models import load_policy, load_tokenizer
from minicai.engine.sampler import respond
from minicai.engine.terminal import plain
from minicai.prompts import as_turns, render, render_critique, render_revision
from minicai.tools import chat
from tests.conftest import CPU, SHORT_RULES, byte_tokenizer
from tests.tools.test_workshop import KIND

TOKENIZER = byte_tokenizer()


@pytest.fixture
def talk(monkeypatch, capsys, folder):
    """talk(lines, flag, ...) -> stdout, stderr of a chat with the fixture's model, into which the lines are piped."""

    def run(*lines, flags=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        __main__.main(["chat", str(folder / "model"), *map(str, flags)])
        return capsys.readouterr()

    return run


@pytest.fixture
def script(monkeypatch):
    """script(text, ...) -> a list that grows by the prompts which the model is shown; it says the texts, one after the other."""

    def write(*texts):
        shown, replies = [], iter(texts)

        def generate(model, prompts, seeds, *, max_new_tokens, eos_id, temperature, heard):
            shown.append(TOKENIZER.decode(prompts[0]))
            for token in [*TOKENIZER(next(replies))["input_ids"][: max_new_tokens - 1], *eos_id]:
                heard(0, token)

        monkeypatch.setattr(chat, "generate", generate)
        return shown

    return write


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.toml").write_text(SHORT_RULES)
    return f"--constitution={tmp_path / 'rules.toml'}"


# --- questions and answers -------------------------------------------------------------------------------------------------------


def test_what_is_streamed_is_what_the_model_answers_to_each_line_by_itself(talk, folder):
    model, tokenizer, questions = (
        load_policy(str(folder / "model"), CPU),
        load_tokenizer(str(folder / "model")),
        ["How?", "And why is that so?"],
    )
    expected, _ = respond(
        model,
        tokenizer,
        [as_turns(q) for q in questions],
        [(0,)] * 2,
        max_new_tokens=40,
        temperature=0.0,
    )
    out, err = talk(*questions, flags=["--max_new_tokens=40"])
    assert out == "".join(f"{plain(text)}\n" for text in expected) and err == ""


def test_answers_come_as_they_are_made_and_whole_words_at_a_time(script, talk, monkeypatch):
    script("One two, dé three.")
    pieces = []
    monkeypatch.setattr(
        "builtins.print",
        lambda *words, **options: pieces.append("".join(words) + options.get("end", "\n")),
    )
    talk("Count!")
    assert [p for p in pieces if p] == ["One ", "two, ", "dé ", "three.", "\n"]


def test_control_characters_of_a_model_do_not_reach_the_terminal(script, talk):
    script("a\x1b[2J b\x07")
    assert talk("Hi!").out == "a?[2J b?\n"


def test_with_history_a_question_comes_behind_the_conversation_and_new_forgets_it(script, talk):
    shown = script("I am fine.", "As I said.", "Hello.")
    out, err = talk("How are you?", "Pardon?", "/new", "Hi!", flags=["--history=on"])
    assert shown == [
        render("How are you?"),
        "\n\nHuman: How are you?\n\nAssistant: I am fine.\n\nHuman: Pardon?\n\nAssistant:",
        render("Hi!"),
    ]
    assert out == "I am fine.\nAs I said.\nHello.\n" and err == "a new conversation\n"


def test_a_full_context_forgets_the_oldest_turns_and_says_so(script, talk):
    shown = script("a" * 200, "b" * 200, "c")
    _, err = talk(
        "1" * 900, "2" * 600, "3" * 10, flags=["--history=on"]
    )  # a context of 2,048 bytes, of which 256 are for the answer
    assert (
        "the first 2 turns" in err
        and "1" not in shown[2]
        and "2" * 600 in shown[2]
        and shown[1].startswith("\n\nHuman: 1")
    )


def test_a_question_longer_than_the_context_is_answered_by_the_reason(talk):
    out, _ = talk("1" * 3000, "Hi!", flags=["--max_new_tokens=4"])
    assert (
        out.startswith("(a prompt has 3")
        and "exceeds the model's context of 2048" in out
        and out.count("\n") == 2
    )


def test_fitting_drops_pairs_from_the_front_and_never_the_last_question():
    turns = [
        {"role": role, "content": str(k)}
        for k, role in enumerate(["user", "assistant"] * 2 + ["user"])
    ]
    count = lambda turns: 10 * len(turns)  # noqa: E731
    assert chat.fitting(turns, count, 50) == (turns, 0) and chat.fitting(turns, count, 49) == (
        turns[2:],
        2,
    ) == chat.fitting(turns, count, 30)
    assert chat.fitting(turns, count, 29) == (turns[4:], 4) == chat.fitting(turns, count, 0)


# --- commands --------------------------------------------------------------------------------------------------------------------


def test_a_principle_criticises_and_revises_the_last_answer_and_the_revision_takes_its_place(
    script, talk, rules
):
    shown = script("Go away.", "It is unkind.", "Please come in.", "Gladly.")
    out, _ = talk("May I?", "/principle kind", "/why", "Thanks!", flags=["--history=on", rules])
    assert shown[1] == render_critique("May I?", "Go away.", KIND) and shown[2] == render_revision(
        "May I?", "Go away.", "It is unkind.", KIND
    )
    assert shown[3].endswith("Assistant: Please come in.\n\nHuman: Thanks!\n\nAssistant:")
    assert out.splitlines() == [
        "Go away.",
        "critique, kind: It is unkind.",
        "revision: Please come in.",
        "critique, kind: It is unkind.",
        "Gladly.",
    ]


def test_why_before_a_revision_criticises_under_each_principle_and_changes_nothing(
    script, talk, rules
):
    shown = script("Go away.", "It is unkind.", "It is brief.", "It is so.", "Pardon?")
    out, _ = talk("May I?", "/why", "/why brief", "What?", flags=["--history=on", rules])
    assert out.splitlines()[1:4] == [
        "critique, kind: It is unkind.",
        "critique, brief: It is brief.",
        "critique, brief: It is so.",
    ]
    assert "Assistant: Go away.\n\nHuman: What?" in shown[4]


def test_an_empty_revision_leaves_the_answer_as_it_was(script, talk, rules):
    shown = script("Go away.", "It is unkind.", "", "Bye.")
    talk("May I?", "/principle kind", "What?", flags=["--history=on", rules])
    assert "Assistant: Go away.\n\nHuman: What?" in shown[3]


@pytest.mark.parametrize(
    "line, said",
    [
        ("/principel kind", "did you mean /principle?"),
        ("/principle kidn", "did you mean kind?"),
        ("/principle", "short 1: kind, brief"),
        ("/why", "there is no answer yet"),
        ("/xyz", "there are /new, /principle, /why, /help, /quit"),
        ("/help", "/principle NAME"),
    ],
)
def test_a_command_that_cannot_be_done_says_why_and_chat_goes_on(script, talk, rules, line, said):
    script("Yes.")
    out, err = talk(line, "There?", flags=[rules])
    assert said in err and out == "Yes.\n"


def test_quit_ends_it(script, talk):
    script("Yes.")
    assert talk("There?", "/quit", "Still?").out == "Yes.\n"


def test_the_constitution_is_that_of_the_run_and_a_missing_one_is_no_reason_not_to_talk(
    script, talk, folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "run" / "sl").mkdir(parents=True)
    shutil.copytree(folder / "model", tmp_path / "run" / "ppo")
    (tmp_path / "rules.toml").write_text(SHORT_RULES)
    (tmp_path / "run" / "sl" / "config.toml").write_text(
        f'constitution = "{tmp_path / "rules.toml"}"\n'
    )
    assert (
        chat.constitution_of(tmp_path / "run" / "ppo") == str(tmp_path / "rules.toml")
        and chat.constitution_of(folder / "model") == ""
    )
    for wanted in ("short 1: kind, brief", "without principles"):
        script("Yes.")
        monkeypatch.setattr(sys, "stdin", io.StringIO("There?\n/principle\n"))
        __main__.main(["chat", str(tmp_path / "run" / "ppo")])
        out, err = capsys.readouterr()
        assert out == "Yes.\n" and wanted in err
        (tmp_path / "rules.toml").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no such constitution"):
        talk("There?", flags=["--constitution=none.toml"])


# --- two models ------------------------------------------------------------------------------------------------------------------


def test_two_models_answer_side_by_side_each_in_its_own_conversation(script, talk, folder):
    shown = script("I am.", "Me too.", "Yes.", "No.")
    out, _ = talk("Who?", "Sure?", flags=[f"--against={folder / 'other'}", "--history=on"])
    assert out.splitlines() == ["model: I am.", "other: Me too.", "model: Yes.", "other: No."]
    assert (
        "Assistant: I am.\n\nHuman: Sure?" in shown[2]
        and "Assistant: Me too.\n\nHuman: Sure?" in shown[3]
    )


def test_models_of_one_name_are_told_apart_by_their_runs():
    assert chat.names(["out/a/ppo", "out/b/ppo"]) == ["a/ppo", "b/ppo"] and chat.names(
        ["out/a/ppo", "out/a/base"]
    ) == ["ppo", "base"]


def test_ctrl_c_ends_an_answer_and_what_was_said_of_it_stays(talk, monkeypatch):
    shown = []

    def interrupted(model, prompts, seeds, *, heard, **_):
        shown.append(TOKENIZER.decode(prompts[0]))
        for token in TOKENIZER("I was about")["input_ids"]:
            heard(0, token)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate", interrupted)
    assert talk("What?", "Well?", flags=["--history=on"]).out == "I was about\nI was about\n"
    assert "Assistant: I was about\n\nHuman: Well?" in shown[1]
