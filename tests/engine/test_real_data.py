"""The method on real data, with random models of a few thousand weights.

Human preferences, and the paper's instructions, examples and evaluations. None of the data is in
the repository (it is offensive, or published without a licence): where it is absent these tests are
skipped.
"""

import pytest
import torch

import train_rm
import train_sl
from minicai.engine import config
from minicai.engine.data import read_jsonl
from minicai.engine.sampler import choice_logprobs
from minicai.evaluation.choices import read_choices, score_choices
from minicai.examples import load_comparisons, load_examples
from tests.conftest import byte_tokenizer, tiny_model
from tests.engine.test_data import HH
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
