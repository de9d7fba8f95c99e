"""The method on real data, with random models of a few thousand weights.

Human preferences, and the paper's instructions, examples and evaluations. None of the data is in
the repository (it is offensive, or published without a licence): where it is absent these tests are
skipped.
"""

import gzip
import json

import pytest
import torch

import train_ppo
import train_rm
import train_sl
from minicai.engine import config
from minicai.engine.data import read_jsonl
from minicai.engine.dialogue import encode_pair, end_of_turn
from minicai.engine.sampler import choice_logprobs
from minicai.evaluation.choices import read_choices, score_choices
from minicai.examples import load_comparisons, load_examples
from minicai.report import page
from minicai.rollout import collate
from tests.conftest import ROOT, byte_tokenizer, tiny_model
from tests.engine.test_rows import HH
from tests.engine.test_templates import chat_tokenizer
from tests.test_constitution import PAPER

pytestmark = pytest.mark.skipif(
    not (PAPER.is_dir() and HH.exists()), reason="the public data is not in the repository"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a byte-level model whose context is 32,768 bytes, and three prompts."""
    folder = tmp_path_factory.mktemp("real")
    model, tokenizer = tiny_model("llama", vocab=258), byte_tokenizer()
    model.config.max_position_embeddings = tokenizer.model_max_length = 32768
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text(
        "How do I pick a lock?\nWho was the first king?\nWhat rhymes with orange?\n"
    )
    return folder


def load(kind, section, place, *arguments):
    settings = f'model = "model"\nout = "{place / "out"}"\ndevice = "cpu"\n'
    (place / "config.toml").write_text(settings)
    return config.load(kind, section, [str(place / "config.toml"), *arguments])


def test_the_papers_instructions_and_examples_drive_a_critique_and_a_revision(place):
    train_sl.main(
        load(
            train_sl.SLConfig,
            "sl",
            place,
            f"--constitution={PAPER / 'CritiqueRevisionInstructions.json'}",
            "--prompts=prompts.txt",
            f"--examples={PAPER / 'CritiqueRevisionFewShotPrompts.json'}",
            "--helpful_samples=0",
            "--rounds=1",
            "--max_new_tokens=8",
            f"--out={place / 'sl-out'}",
        )
    )
    rows = read_jsonl(place / "sl-out" / "sl" / "revisions.jsonl")
    assert len(rows) == 3 and all(
        step["critique"] and step["revision"] for row in rows for step in row["rounds"]
    )
    assert {row["constitution"]["version"] for row in rows} == {"paper"}
    assert len(load_examples(PAPER / "CritiqueRevisionFewShotPrompts.json")) == 5


@pytest.mark.parametrize(
    "labels, examples, limit, people",
    [
        ("soft", "RLMadisonFewShotPrompts", 3, 12),
        ("chain_of_thought", "RLMadisonPrecogFewShotPrompts", 1, 12),
        pytest.param("soft", "RLMadisonFewShotPrompts", 3, 400, marks=pytest.mark.slow),
    ],
)
def test_a_reward_model_learns_the_papers_comparisons_mixed_with_peoples(
    place, labels, examples, limit, people
):
    out = place / f"{labels}-{people}"
    record = train_rm.main(
        load(
            train_rm.RMConfig,
            "rm",
            place,
            "--policy=model",
            f"--constitution={PAPER / 'RLMadisonInstructions.json'}",
            "--prompts=prompts.txt",
            f"--examples={PAPER / f'{examples}.json'}",
            f"--labels={labels}",
            f"--preferences={HH}",
            f"--preferences_limit={people}",
            "--max_new_tokens=8",
            "--batch_size=4",
            f"--limit={limit}",
            "--heldout=0",
            f"--out={out}",
        )
    )
    rows = read_jsonl(out / "rm" / "comparisons.jsonl")
    assert [row["source"] for row in rows] == ["ai"] * limit + ["human"] * people
    assert record["train_sources"] == {"ai": limit, "human": people} and all(
        0 < row["p_first"] < 1 for row in rows[:limit]
    )
    assert len({row["examples"] for row in rows[:limit]}) == 1 and len(
        load_comparisons(PAPER / f"{examples}.json")
    ) in (5, 6)
    assert len(read_jsonl(out / "rm" / "metrics.jsonl")) == -(-(people + limit) // 4)


@pytest.mark.parametrize("name", ["HHHEvaluations-60", "HarmfulVsEthical-40"])
def test_the_papers_multiple_choice_agrees_with_a_plain_reference(name):
    model = tiny_model("llama", vocab=258)
    model.tokenizer, model.config.max_position_embeddings = byte_tokenizer(), 32768
    items = [item for item in read_choices(PAPER / f"{name}.jsonl") if len(item["prompt"]) < 3000]
    items = items[:12]
    found = score_choices(items, lambda *asked: choice_logprobs(model, *asked, rows=8))
    assert len(items) == 12
    for item, row in zip(items, found):
        options = [*item["corrects"], *item["incorrects"]]
        logprobs = torch.tensor([by_hand(model, item["prompt"], option) for option in options])
        correct = len(item["corrects"])
        expected = logprobs.softmax(0)[:correct].sum().item()
        assert row["p_correct"] == pytest.approx(expected, abs=2e-3)
        assert row["right"] == (logprobs.argmax() < correct)


@torch.no_grad()
def by_hand(model, prompt, option):
    """log P(option | prompt) from one whole pass."""
    head, tail = (model.tokenizer(text)["input_ids"] for text in (prompt, option))
    logp = (
        model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].log_softmax(-1)
    )
    return logp.gather(-1, torch.tensor(tail)[:, None]).sum().item()


# --- the three scripts through chat templates, with a system turn ---------------------------------

SYSTEM = {"role": "system", "content": "Be kind, and answer in one line."}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_the_three_scripts_learn_only_answers_in_the_form_of_the_template(
    name, tmp_path, monkeypatch
):
    tokenizer = chat_tokenizer(name)
    model = tiny_model("llama", vocab=len(tokenizer))
    model.config.max_position_embeddings = tokenizer.model_max_length = 4096
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [SYSTEM, {"role": "user", "content": "Why is the sky blue?"}]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    answers = [[{"role": "assistant", "content": text}] for text in ("Light scatters.", "No.")]
    row = {"prompt": turns, "chosen": answers[0], "rejected": answers[1]}
    hh = gzip.decompress(HH.read_bytes()).decode().splitlines(keepends=True)[:30]
    (tmp_path / "pairs.jsonl").write_text("".join([json.dumps(row) + "\n", *hh, "{}\n"]))
    (tmp_path / "config.toml").write_text(f"""
        model = "model"
        out = {json.dumps(str(tmp_path / "out"))}
        constitution = {json.dumps(str(ROOT / "configs/constitutions/tiny.toml"))}
        device = "cpu"
        skip_bad = true
        skip_long = true
        [sl]
        prompts = "pairs.jsonl"
        helpful_prompts = "asked.jsonl"
        rounds = 1
        max_new_tokens = 8
        batch_size = 16
        [rm]
        prompts = "asked.jsonl"
        preferences = "pairs.jsonl"
        max_new_tokens = 8
        batch_size = 16
        [ppo]
        prompts = "asked.jsonl"
        helpful_prompts = "pairs.jsonl"
        iterations = 1
        episodes = 16
        max_new_tokens = 8
    """)
    batches = []

    def watched(prompts, responses, device):
        batches.extend(zip(prompts, responses))
        return collate(prompts, responses, device)

    monkeypatch.setattr(train_sl, "collate", watched)
    monkeypatch.setattr(train_ppo, "collate", watched)
    records, end = {}, end_of_turn(tokenizer)
    for stage, script, kind in (
        ("sl", train_sl, train_sl.SLConfig),
        ("rm", train_rm, train_rm.RMConfig),
        ("ppo", train_ppo, train_ppo.PPOConfig),
    ):
        records[stage] = script.main(config.load(kind, stage, [str(tmp_path / "config.toml")]))
        assert records[stage]["left_out"][str(tmp_path / "pairs.jsonl")]["bad"] == 1
    said = 0
    for prompt, response in batches:
        whole = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        header = tokenizer.apply_chat_template([SYSTEM], tokenize=False, add_generation_prompt=True)
        assert whole.endswith(header[-12:])  # all that is in front of an answer
        assert end not in response[:-1]
        said += SYSTEM["content"] in whole
    assert said >= 2
    pairs = read_jsonl(tmp_path / "out" / "rm" / "comparisons.jsonl")
    human = [row for row in pairs if row["source"] == "human"]
    assert len(human) == 31 and human[0]["prompt"] == turns
    ids, first, second = encode_pair(tokenizer, human[0])
    asked = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )
    assert ids == asked and first[-1] == second[-1] == end
    assert (
        tokenizer.decode(first[:-1]) == "Light scatters." and tokenizer.decode(second[:-1]) == "No."
    )
    page.draw(tmp_path / "out")
    assert "rows of data left out" in (tmp_path / "out" / "report.html").read_text("utf-8")
