"""Chat: what a model is shown, what a person sees, and each /command. Most words are scripted."""

import io
import shutil
import sys

import pytest

from minicai.engine.load import load_policy
from minicai.engine.sampler import Sampling, respond
from minicai.engine.terminal import plain
from minicai.prompts import as_turns, render, render_critique, render_revision
from minicai.tinyworld.grammar import prompt_index
from minicai.tools import chat
from tests.conftest import SHORT_RULES, byte_tokenizer
from tests.tools.test_workshop import KIND

TOKENIZER = byte_tokenizer()


@pytest.fixture
def talk(monkeypatch, capsys, folder):
    """talk(lines, flags) -> (stdout, stderr) of a chat with a model into which lines are piped."""

    def run(*lines, flags=(), model=folder / "model", columns=0):
        """columns: of a terminal; 0 = a pipe."""
        piped = io.BytesIO("".join(f"{line}\n" for line in lines).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(piped, "utf-8"))
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
            monkeypatch.setenv("TERM", "xterm")
            for stream in (sys.stdin, sys.stdout, sys.stderr):
                monkeypatch.setattr(stream, "isatty", lambda: True)
        chat.main([*map(str, flags)], str(model))
        return capsys.readouterr()

    return run


@pytest.fixture
def script(monkeypatch):
    """script(text, ...): the model says these. Returns the prompts that it is shown."""

    def write(*texts):
        shown, replies = [], iter(texts)

        def generate(model, prompts, seeds, how, heard):
            shown.append(TOKENIZER.decode(prompts[0]))
            ids = TOKENIZER(next(replies))["input_ids"][: how.max_new_tokens - 1]
            for token in [*ids, TOKENIZER.eos_token_id]:
                heard(0, token)

        monkeypatch.setattr(chat, "generate", generate)
        return shown

    return write


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.toml").write_text(SHORT_RULES)
    return f"--constitution={tmp_path / 'rules.toml'}"


# --- questions and answers ------------------------------------------------------------------------


def test_what_is_streamed_is_what_the_model_answers_to_each_line_by_itself(talk, folder):
    model, questions = load_policy(str(folder / "model")), ["How?", "And why is that so?"]
    asked = [as_turns(question) for question in questions]
    expected, _ = respond(model, asked, [(0,)] * 2, Sampling(40, temperature=0.0))
    out, err = talk(*questions, flags=["--max_new_tokens=40"])
    assert out == "".join(f"{plain(text)}\n" for text in expected) and err == ""


def test_answers_come_as_they_are_made_and_whole_words_at_a_time(script, talk, monkeypatch):
    script("One two, dé three.")
    pieces = []

    def record(*words, **options):
        pieces.append("".join(words) + options.get("end", "\n"))

    monkeypatch.setattr("builtins.print", record)
    talk("Count!")
    assert [p for p in pieces if p] == ["One ", "two, ", "dé ", "three.\n"]


def test_control_characters_of_a_model_do_not_reach_the_terminal(script, talk):
    script("a\x1b[2J b\x07")
    assert talk("Hi!").out == "a?[2J b?\n"


def test_with_history_a_question_continues_the_conversation_and_new_forgets_it(script, talk):
    shown = script("I am fine.", "As I said.", "Hello.")
    out, err = talk("How are you?", "Pardon?", "/new", "Hi!", flags=["--history=on"])
    second = "\n\nHuman: How are you?\n\nAssistant: I am fine.\n\nHuman: Pardon?\n\nAssistant:"
    assert shown == [render("How are you?"), second, render("Hi!")]
    assert out == "I am fine.\nAs I said.\nHello.\n" and err == "a new conversation\n"


def test_a_full_context_forgets_the_oldest_turns_and_says_so(script, talk):
    shown = script("a" * 200, "b" * 200, "c")
    questions = "1" * 900, "2" * 600, "3" * 10  # a context of 2,048 bytes, 256 of them for answers
    _, err = talk(*questions, flags=["--history=on"])
    assert "the first 2 turns" in err and shown[1].startswith("\n\nHuman: 1")
    assert "1" not in shown[2] and "2" * 600 in shown[2]


def test_a_system_turn_opens_every_conversation_and_is_never_forgotten(script, talk, rules):
    kind = [{"role": "system", "content": "Be kind."}]
    shown = script("a" * 200, "b" * 200, "c", "d")
    flags = ["--history=on", "--system=Be kind.", rules]
    talk("1" * 900, "2" * 600, "3" * 10, "/new", "Hi!", flags=flags)
    assert shown[0] == render([*kind, *as_turns("1" * 900)])
    assert "1" not in shown[2] and shown[2].startswith("\n\nBe kind.\n\nHuman: 2")
    assert shown[3] == render([*kind, *as_turns("Hi!")])
    shown = script("A.", "Unkind.", "B.")
    talk("Hi!", "/principle kind", flags=flags)
    assert shown[1] == render_critique([*kind, *as_turns("Hi!")], "A.", KIND)


def test_a_question_longer_than_the_context_gets_the_reason_as_its_answer(talk):
    out, _ = talk("1" * 3000, "Hi!", flags=["--max_new_tokens=4"])
    assert out.startswith("(prompt 1 has 3") and out.count("\n") == 2
    assert "exceeds the model's context of 2048" in out


def test_the_latest_turns_begin_with_a_question_and_end_with_the_last(folder):
    model = load_policy(str(folder / "model"))
    roles = ["user", "assistant"] * 2 + ["user"]
    turns = [{"role": role, "content": str(k)} for k, role in enumerate(roles)]

    def kept(room):
        speaker = chat.Speaker("", model, Sampling(2048 - room))
        return speaker.latest(turns, lambda turns: "x" * 10 * len(turns))

    assert kept(50) == turns
    assert kept(49) == kept(30) == turns[2:]
    assert kept(29) == kept(0) == turns[4:]


# --- commands -------------------------------------------------------------------------------------


def test_a_principle_criticises_and_revises_the_last_answer_and_the_revision_replaces_it(
    script, talk, rules
):
    shown = script("Go away.", "It is unkind.", "Please come in.", "Gladly.")
    lines = "May I?", "/principle kind", "/why", "Thanks!"
    out, err = talk(*lines, flags=["--history=on", rules])
    assert shown[1] == render_critique("May I?", "Go away.", KIND)
    assert shown[2] == render_revision("May I?", "Go away.", "It is unkind.", KIND)
    assert shown[3].endswith("Assistant: Please come in.\n\nHuman: Thanks!\n\nAssistant:")
    critique = "critique, kind: It is unkind."
    assert out.splitlines() == ["Go away.", critique, "revision: Please come in.", "Gladly."]
    assert err == f"{critique}\n"


def test_an_empty_revision_leaves_the_answer_as_it_was(script, talk, rules):
    shown = script("Go away.", "It is unkind.", "", "Bye.")
    talk("May I?", "/principle kind", "What?", flags=["--history=on", rules])
    assert "Assistant: Go away.\n\nHuman: What?" in shown[3]


@pytest.mark.parametrize(
    "line, said",
    [
        ("/principel kind", "unknown command /principel; /help lists the commands"),
        ("/principle kidn", "the principles of short: kind, brief"),
        ("/principle", "the principles of short: kind, brief"),
        ("/principle kind", "there is no answer yet"),
        ("/why", "there is no revision yet"),
        ("/help", "/principle [NAME]"),
    ],
)
def test_a_command_that_cannot_be_run_says_why_and_chat_continues(script, talk, rules, line, said):
    script("Yes.")
    out, err = talk(line, "There?", flags=[rules])
    assert said in err and out == "Yes.\n"


def test_quit_ends_it(script, talk):
    script("Yes.")
    assert talk("There?", "/quit", "Still?").out == "Yes.\n"


def test_the_constitution_is_that_of_the_run_and_chat_works_without_one(
    script, talk, folder, tmp_path
):
    model, rules = tmp_path / "run" / "ppo", tmp_path / "rules.toml"
    (tmp_path / "run" / "sl").mkdir(parents=True)
    shutil.copytree(folder / "model", model)
    rules.write_text(SHORT_RULES)
    (tmp_path / "run" / "sl" / "config.toml").write_text(f'constitution = "{rules}"\n')
    for wanted in ("of short: kind, brief", f"{rules}: no such constitution file"):
        script("Yes.")
        out, err = talk("There?", "/principle", model=model)
        assert out == "Yes.\n" and wanted in err
        rules.unlink(missing_ok=True)
    script("Yes.")
    assert "name one with --constitution=FILE" in talk("There?", "/principle").err


# --- two models -----------------------------------------------------------------------------------


def test_two_models_answer_side_by_side_each_in_its_own_conversation(script, talk, folder):
    shown = script("I am.", "Me too.", "Yes.", "No.")
    out, _ = talk("Who?", "Sure?", flags=[f"--against={folder / 'other'}", "--history=on"])
    said = zip(["model", "other"] * 2, ["I am.", "Me too.", "Yes.", "No."])
    assert out.splitlines() == [f"{folder / name}: {text}" for name, text in said]
    assert "Assistant: I am.\n\nHuman: Sure?" in shown[2]
    assert "Assistant: Me too.\n\nHuman: Sure?" in shown[3]


def test_ctrl_c_stops_an_answer_and_what_was_said_of_it_stays(talk, monkeypatch):
    shown = []

    def interrupted(model, prompts, seeds, how, heard):
        shown.append(TOKENIZER.decode(prompts[0]))
        for token in TOKENIZER("I was about")["input_ids"]:
            heard(0, token)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate", interrupted)
    assert talk("What?", "Well?", flags=["--history=on"]).out == "I was about\nI was about\n"
    assert "Assistant: I was about\n\nHuman: Well?" in shown[1]


def test_bytes_that_are_not_utf8_are_a_question_too(script, monkeypatch, capsys, folder):
    script("Pardon?")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff?\n"), "utf-8"))
    chat.main([], str(folder / "model"))
    assert capsys.readouterr().out == "Pardon?\n"


# --- a terminal -----------------------------------------------------------------------------------


def test_the_banner_says_what_the_model_knows_and_the_end_begins_a_line(script, talk, rules):
    script("Yes.")
    out, _ = talk("There?", flags=[rules], columns=80)
    assert f": a model, constitution {rules.partition('=')[2]}\nhistory on; /help lists" in out
    assert out.endswith("you: \n")


def test_the_tiny_worlds_model_says_what_it_knows_and_what_it_does_not(script, talk):
    assert all(question in prompt_index() for question in chat.EXAMPLES)
    script("Yes.", "No.")
    out, err = talk("Hello!", chat.EXAMPLES[0], "", "/why", model=chat.TINY, columns=80)
    assert "knows only the tiny world" in out and all(line in out for line in chat.EXAMPLES)
    assert err.count("outside the tiny world") == 1
    assert err.startswith("\x1b[90moutside") and err.partition("\n")[0].endswith("\x1b[0m")
    script("Yes.")
    assert talk("Hello!", model=chat.TINY) == ("Yes.\n", "")  # a pipe has the answers only


def test_a_backslash_continues_the_line(script, talk):
    shown = script("Fine.")
    talk("One,\\", "two,\\", "three?")
    assert shown == [render("One,\ntwo,\nthree?")]


def test_tab_completes_commands_and_the_names_of_principles(talk, rules):
    readline = pytest.importorskip("readline")
    talk("/quit", flags=[rules], columns=80)
    complete = readline.get_completer()
    known = [complete("/prin", k) for k in range(4)]
    assert known == ["/principle", "/principle kind", "/principle brief", None]
    assert [complete("/why k", k) for k in range(2)] == ["/why kind", None]


def test_two_answers_stand_in_columns_where_the_terminal_is_wide(script, talk, folder, rules):
    texts = ["word " * 20, "Short.", "It is unkind.", "Gladly.", "Fine.", "No."]
    flags = [f"--against={folder / 'other'}", rules, "--history=on"]
    script(*texts)
    out, _ = talk("Who?", "/principle kind", flags=flags, columns=100)
    head, *lines = out.replace("you: ", "").splitlines()[2:]
    assert head.startswith("\x1b[1m") and "workshop" in head
    assert head.index("/model") < 48 < head.index("/other")
    words = "word " * 8 + "word"
    assert f"{words:<48}   Short." in lines and words in lines  # 9 words a line
    assert f"{'critique, kind: It is unkind.':<48}   critique, kind: Fine." in lines
    assert all(len(line) <= 100 for line in lines if "\x1b" not in line)
    script(*texts)
    assert "\x1b[1m" + f"{folder / 'other'}: " in talk("Who?", flags=flags, columns=79).out
