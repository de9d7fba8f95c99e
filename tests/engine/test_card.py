"""The model card of an exported folder: what it passes on, and that its code prompts the model."""

import re

import pytest
from huggingface_hub import ModelCard

from minicai.engine import card, dialogue, hub
from minicai.engine.dialogue import RAW, encode, encode_prompt, end_of_turn
from minicai.prompts import as_turns
from tests.conftest import ROOT, byte_tokenizer, tiny_model
from tests.engine.test_templates import chat_tokenizer

RULES = {"name": "kind", "version": "2.0", "sha256": "ab" * 32}
OTHER = RULES | {"name": "other", "sha256": "ef" * 32}
PROMPT, ANSWER = "Why is the sky blue?", "Because of the air."


def made(folder, stage="sl", models=("owner/base@main",), rules=RULES, template="", record=()):
    folder.mkdir(exist_ok=True)
    record = {"train_sources": {}, **dict(record)}
    facts = {"data": {"prompts.txt": "cd" * 32}, "seed": 7, "record": record, "template": template}
    card.write(folder, stage, list(map(str, models)), rules, facts)
    return ModelCard.load(folder / "README.md")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """What the hub's cache would have of owner/base."""
    folder = tmp_path / "cache"
    folder.mkdir()
    text = "---\nlicense: other\nlicense_name: mine\nlanguage: en\n---\n# A base\n"
    (folder / "README.md").write_text(text)
    real = hub.model_folder
    found = lambda path: folder if path.startswith("owner/base") else real(path)  # noqa: E731
    monkeypatch.setattr(hub, "model_folder", found)
    return folder


def test_base_licence_and_constitutions_are_passed_on_from_stage_to_stage(tmp_path, base):
    sl, rm, ppo = (tmp_path / name for name in ("sl", "rm", "ppo"))
    found = [made(sl), made(rm, "rm", [sl, "owner/base"], OTHER), made(ppo, "ppo", [sl, rm], None)]
    for one in found:
        data = one.data.to_dict()
        assert data["base_model"] == "owner/base" and data["license_name"] == "mine"
        assert data["library_name"] == "transformers" and "language" not in data
        shown = f"| data | `prompts.txt`, sha256 `{'cd' * 32}` |"
        assert "| seed | 7 |" in one.text and shown in one.text
    rules = [one.data.minicai["constitutions"] for one in found]
    assert rules == [[RULES], [OTHER], [RULES, OTHER]]
    assert [one.data.pipeline_tag for one in found] == [
        "text-generation",
        "text-classification",
        "text-generation",
    ]
    for one, known in zip(found, rules):
        assert all(f"sha256 `{rule['sha256']}` |" in one.text for rule in known)


def test_a_base_on_this_machine_is_named_without_its_folders(tmp_path):
    inside = ROOT / "minicai" / "tinyworld" / "base"
    sl = made(tmp_path / "sl", models=[inside])
    ppo = made(tmp_path / "ppo", "ppo", [tmp_path / "sl"], None)
    for one in (sl, ppo):
        assert one.data.get("base_model") is None and one.data.license == "mit"
        assert "| base | minicai:tinyworld/base |" in one.text
        assert str(ROOT) not in one.content and str(tmp_path) not in one.content


@pytest.mark.parametrize("text", ["no front matter", "---\n- a list\n---\n", "---\n{\n---\n"])
def test_a_base_s_card_that_cannot_be_read_counts_as_none(tmp_path, text):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(text)
    found = made(tmp_path / "sl", models=[tmp_path / "base"])
    assert found.data.get("license") is None and "not known here" in found.text
    assert "| base | base |" in found.text


@pytest.mark.parametrize("form", ["", RAW, "chatml", "qwen3", "llama3", "gemma", "mistral"])
@pytest.mark.parametrize("stage", ["ppo", "rm"])
def test_the_code_of_the_card_gives_the_model_what_it_was_trained_on(tmp_path, stage, form, capsys):
    tokenizer = chat_tokenizer(form) if form not in ("", RAW) else byte_tokenizer()
    tokenizer.chat_template = RAW if form == RAW else tokenizer.chat_template
    model = tiny_model(vocab=len(tokenizer), scorer=stage == "rm")
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = made(tmp_path, stage, template=dialogue.template_of(tokenizer))
    [code] = re.findall(r"^```python\n(.*?)^```$", found.text, re.M | re.S)
    space = {}
    exec(code.replace("FOLDER", str(tmp_path)).replace("=256", "=2"), space)
    capsys.readouterr()
    if stage == "ppo":
        expected = encode_prompt(tokenizer, as_turns(PROMPT))
    else:
        answer = " " + ANSWER if form == RAW else ANSWER
        prompt, response = encode(tokenizer, PROMPT, answer)
        expected = prompt + response
        assert expected[-1] == end_of_turn(tokenizer)
    assert space["inputs"]["input_ids"].tolist() == [expected]


def test_rates_take_the_place_of_those_before(tmp_path):
    accuracy = {"accuracy_vs_labels": 0.925, "heldout_pairs": 266}
    assert "orders 0.925" in " ".join(made(tmp_path, "rm", record=accuracy).text.split())
    for share in (0.5, 0.25):
        card.rate(tmp_path, {"harmful prompts": (share, [0.2, 0.6]), "nothing": (None, [0, 1])})
    text = (tmp_path / "README.md").read_text()
    assert text.endswith("|---|---|\n| harmful prompts | 0.250 (0.200–0.600) |\n")
    assert text.count("## Rates") == 1 and "0.925" not in text
    card.rate(tmp_path / "of an earlier version", {})
    assert not (tmp_path / "of an earlier version").exists()
