"""Model folders: what is loaded and with which tokenizer, what is refused, and the fingerprint."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GraniteConfig, GraniteForCausalLM

from minicai import InputError
from minicai.engine import hub, load, parallel
from minicai.engine.dialogue import end_ids
from minicai.engine.models import response_logprobs
from minicai.rollout import collate
from tests.conftest import CPU, EOS, PAD, byte_tokenizer, tiny_model


@pytest.fixture(autouse=True)
def device():
    parallel.setup("cpu", "fp32")


@pytest.fixture(scope="module")
def dropout(tmp_path_factory):
    """A policy in bfloat16 whose config asks for dropout."""
    path = tmp_path_factory.mktemp("policy")
    tiny_model("gpt2", vocab=258).bfloat16().train().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    tiny_model(vocab=258).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- policies, reward and value models ------------------------------------------------------------


def test_a_loaded_policy_has_float32_weights_its_tokenizer_and_no_dropout(dropout):
    model = load.load_policy(dropout)
    batch = collate([[5, 9]], [[20, 31, EOS]], CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    assert model.tokenizer("Hi")["input_ids"] == byte_tokenizer()("Hi")["input_ids"]
    first, second = (response_logprobs(model, batch) for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    assert not torch.equal(response_logprobs(model, batch), first)  # dropout would show


def test_a_new_head_is_drawn_by_the_seed_only_with_variance_1_over_width_plus_1(dropout):
    heads = []
    for seed in range(12):
        torch.manual_seed(100 + seed)
        heads.append(load.load_scorer(dropout, seed=seed).score.weight.detach())
    assert torch.equal(load.load_scorer(dropout, seed=3).score.weight, heads[3])
    assert not torch.equal(heads[0], heads[1]) and heads[0].shape == (1, 32)
    drawn = torch.cat(heads)  # 384 numbers: a standard error of 3.6 %
    assert drawn.std().item() == pytest.approx(33**-0.5, rel=0.1)
    assert abs(drawn.mean().item()) < 3 * 33**-0.5 / 384**0.5


def test_a_scorer_without_a_seed_keeps_the_head_of_its_folder(tmp_path):
    trained = tiny_model(scorer=True, seed=5)
    trained.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load.load_scorer(str(tmp_path))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.score.weight, trained.score.weight)
    assert torch.equal(theirs.score.weight, trained.score.weight)
    assert loaded.config.pad_token_id == loaded.tokenizer.pad_token_id == PAD


def test_a_new_scorer_gets_a_pad_token_that_no_answer_has(tmp_path):
    tiny_model(vocab=258).save_pretrained(tmp_path)
    byte_tokenizer(pad="<eos>").save_pretrained(tmp_path)
    model = load.load_scorer(str(tmp_path), seed=0)
    pad = model.tokenizer.pad_token_id
    assert pad == model.config.pad_token_id == 258 and pad not in end_ids(model.tokenizer, None)
    assert model.get_input_embeddings().weight.shape[0] == 259
    assert (model.get_input_embeddings().weight[258] == 0).all()


# --- what is refused ------------------------------------------------------------------------------


def test_a_missing_folder_names_the_nearest_one(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "file").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    assert hub.require_folder(str(tmp_path / "base"), "model") == tmp_path / "base"
    said = refusal(hub.require_folder, str(tmp_path / "bse"), "model")
    missing = f"model: {tmp_path / 'bse'} is not a model folder (no config.json)"
    assert said == f"{missing}; did you mean {tmp_path / 'base'}?"
    none = refusal(hub.require_folder, str(tmp_path / "none" / "base"), "model")
    assert "did you mean" not in none


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere", "is not a model folder"),
        ("torn", "the model cannot be loaded"),
        ("garbled", "its tokenizer cannot be loaded"),
        ("endless", "the tokenizer has no eos token"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_folder(models, name, said):
    found = refusal(load.load_policy, str(models / name))
    assert str(models / name) in found and said in found


def test_a_folder_that_lacks_weights_or_is_no_reward_model_is_refused(models, folder):
    said = refusal(load.load_scorer, str(models / "whole"))
    assert said == f"{models / 'whole'}: the weights of score.weight are missing; it is not a " + (
        "reward model"
    )
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": ')
    assert "cannot be read" in refusal(load.load_config, str(folder))


def test_without_a_pad_token_the_end_of_sequence_pads(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load.load_tokenizer(str(tmp_path)).pad_token_id == EOS


def test_a_model_that_does_more_with_its_logits_than_apply_a_head_is_refused(tmp_path):
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    for scaling in (1.0, 3.0):
        shape = GraniteConfig(**sizes, logits_scaling=scaling, initializer_range=0.25)
        GraniteForCausalLM(shape).save_pretrained(tmp_path / str(scaling))
        byte_tokenizer().save_pretrained(tmp_path / str(scaling))
    assert load.load_policy(str(tmp_path / "1.0"))
    said = refusal(load.load_policy, str(tmp_path / "3.0"))
    assert "GraniteForCausalLM is a kind of model that cannot be packed" in said


# --- models that bring code -----------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused_and_its_code_not_run(folder, file):
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    own |= {"AutoTokenizer": ["own.Own", None]}
    text = json.loads((folder / file).read_text()) | {"auto_map": own}
    (folder / file).write_text(json.dumps(text))
    for call in (load.load_policy, load.load_tokenizer, load.load_config):
        said = refusal(call, str(folder))
        assert str(folder / file) in said and "code of its own" in said and not ran.exists()


def test_weights_that_are_pickles_are_refused_and_not_read(folder):
    ran = folder / "ran"

    class Touch:
        def __reduce__(self):
            return Path.touch, (ran,)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Touch()}, folder / "pytorch_model.bin")
    said = refusal(load.load_policy, str(folder))
    assert f"{folder}: its weights are pickles (pytorch_model.bin)" in said and not ran.exists()


def test_a_folder_with_both_kinds_of_weights_is_read_from_the_safe_ones(folder):
    safe = load.load_policy(str(folder)).state_dict()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    again = load.load_policy(str(folder)).state_dict()
    assert again.keys() == safe.keys()
    assert all(torch.equal(again[name], weight) for name, weight in safe.items())


# --- fingerprints ---------------------------------------------------------------------------------


def text_folder(path, **files):
    path.mkdir()
    usual = {"config.json": "{}", "model.safetensors": "12", "tokenizer.json": "t"}
    for name, content in (usual | {"stage.json": "today"}).items():
        (path / name).write_text(files.get(name.partition(".")[0], content))
    return path


def test_the_fingerprint_follows_config_weights_and_tokenizer_only(tmp_path):
    one = text_folder(tmp_path / "one")
    same = text_folder(tmp_path / "same", stage="tomorrow")
    names = ("config", "model", "tokenizer")
    others = [text_folder(tmp_path / name, **{name: "other"}) for name in names]
    assert hub.weights_sha256(one) == hub.weights_sha256(same)
    assert len({hub.weights_sha256(path) for path in (one, *others)}) == 4
    (one / "model.safetensors").rename(one / "other.safetensors")
    assert hub.weights_sha256(one) != hub.weights_sha256(same)
    assert re.fullmatch("[0-9a-f]{64}", hub.weights_sha256(same))
