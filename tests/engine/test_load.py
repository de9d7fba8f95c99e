"""Model folders: what is loaded and with which tokenizer, what is refused, and the fingerprint."""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

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
    trained = tiny_model(scorer=True, seed=5, vocab=258)
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
    assert hub.require_folder(str(tmp_path / "base"), "model", False) == tmp_path / "base"
    said = refusal(hub.require_folder, str(tmp_path / "bse"), "model")
    missing = f"model: {tmp_path / 'bse'} is not a model folder (no config.json)"
    assert said == f"{missing}; did you mean {tmp_path / 'base'}?"
    none = refusal(hub.require_folder, str(tmp_path / "none" / "base"), "model")
    assert "did you mean" not in none


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere", "is not a model folder"),
        ("torn", "model.safetensors: cannot be read as safetensors"),
        ("garbled", "its tokenizer cannot be loaded"),
        ("endless", "the tokenizer has no eos token"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_folder(models, name, said):
    found = refusal(load.load_policy, str(models / name))
    assert str(models / name) in found and said in found


def test_a_folder_that_lacks_weights_or_is_no_reward_model_is_refused(models, folder):
    said = refusal(load.load_scorer, str(models / "whole"))
    assert said == f"{models / 'whole'}: the weights of score.weight are missing; " + (
        "it is not a reward model"
    )
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": ')
    assert "cannot be read" in refusal(load.load_config, str(folder))


def test_without_a_pad_token_the_end_of_sequence_pads(tmp_path):
    tiny_model(vocab=258).save_pretrained(tmp_path)
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


# --- the list of checks ---------------------------------------------------------------------------


def settings(file, **changes):
    """A damage: changed settings of a JSON file. None removes one."""

    def damage(folder):
        found = json.loads((folder / file).read_text()) | changes
        found = {key: value for key, value in found.items() if value is not None}
        (folder / file).write_text(json.dumps(found))

    return damage


def written(file, text):
    return lambda folder: (folder / file).write_text(text)


def tensors(change):
    """A damage: change(tensors) of model.safetensors, in place."""

    def damage(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return damage


def sharded(change):
    """A damage: two files and an index, whose text is changed."""

    def damage(folder):
        model = tiny_model(vocab=258)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="60KB")
        index = folder / "model.safetensors.index.json"
        index.write_text(change(index.read_text()))

    return damage


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def more_tokens(folder, special=False):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=special)
    tokenizer.save_pretrained(folder)


def quantised(method):
    return settings("config.json", quantization_config={"quant_method": method, "bits": 4})


Q = "model.layers.0.self_attn.q_proj.weight"
CONFIG, GENERATION = "config.json", "generation_config.json"
DAMAGES = {  # name: the damage, and what is said after the folder's path
    "bitsandbytes": (quantised("bitsandbytes"), "/config.json: quantization_config: its weights"),
    "gptq": (quantised("gptq"), "/config.json: quantization_config: its weights are quantised"),
    "awq": (quantised("awq"), "/config.json: quantization_config: its weights are quantised"),
    "fp8": (quantised("fp8"), "/config.json: quantization_config: its weights are quantised"),
    "mlx": (settings(CONFIG, quantization={"bits": 4}), "/config.json: quantization: its weights"),
    "compressed": (
        settings(CONFIG, compression_config={"format": "x"}),
        "/config.json: compression_config: its weights are quantised",
    ),
    "renamed": (
        settings(CONFIG, transformers_weights="other.safetensors"),
        "/config.json: transformers_weights: its weights are in a file of another name",
    ),
    "adapter": (
        written("adapter_config.json", '{"base_model_name_or_path": "nowhere"}'),
        "/adapter_config.json: its base: nowhere is not a model folder (no config.json)",
    ),
    "many tokens": (
        more_tokens,
        ": its tokenizer makes token 258 ('<tool>'), and config.json gives the model 258 ",
    ),
    "lora": (
        tensors(lambda found: found.update({Q.replace("weight", "lora_A.weight"): torch.ones(2)})),
        ": LlamaForCausalLM does not read model.layers.0.self_attn.q_proj.lora_A.weight (1 ",
    ),
    "unread": (
        tensors(lambda found: found.update({f"extra.{k}": torch.ones(2) for k in range(5)})),
        ": LlamaForCausalLM does not read extra.0, extra.1, extra.2 (5 weights); correct ",
    ),
    "reward model": (
        tensors(lambda found: found.update({"score.weight": torch.ones(1, 32)})),
        ": LlamaForCausalLM does not read score.weight (1 weights); ",
    ),
    "fewer layers": (
        settings(CONFIG, num_hidden_layers=1),
        ": LlamaForCausalLM does not read model.layers.1.input_layernorm.weight, ",
    ),
    "more layers": (
        settings(CONFIG, num_hidden_layers=3),
        ": the weights of model.layers.2.input_layernorm.weight, ",
    ),
    "missing": (tensors(lambda found: found.pop(Q)), f": the weights of {Q} are missing"),
    "shape": (
        tensors(lambda found: found.update({Q: torch.ones(32, 8)})),
        f": {Q} has the shape [32, 8], and by config.json [32, 32]; correct config.json, ",
    ),
    "shape by config": (
        settings(CONFIG, intermediate_size=48),
        ": model.layers.0.mlp.down_proj.weight has the shape [32, 64], and by config.json [32, 48]",
    ),
    "vocabulary": (settings(CONFIG, vocab_size=300), ": lm_head.weight has the shape [258, 32], "),
    "tied and different": (
        settings(CONFIG, tie_word_embeddings=True),
        ": tie_word_embeddings in config.json makes one matrix of two that differ; set it to false",
    ),
    "not finite": (
        tensors(lambda found: found[Q].fill_(float("nan"))),
        f": {Q} is not finite; ",
    ),
    "type": (settings(CONFIG, hidden_size="32"), "/config.json: cannot be read: "),
    "type of labels": (settings(CONFIG, id2label=3), "/config.json: cannot be read: "),
    "dtype": (settings(CONFIG, dtype="float33"), "/config.json: cannot be read: "),
    "no heads": (settings(CONFIG, num_attention_heads=0), "/config.json: cannot be read: "),
    "many heads": (settings(CONFIG, num_attention_heads=5), "/config.json: cannot be read: "),
    "negative": (settings(CONFIG, hidden_size=-4), "/config.json: no policy can be made from it: "),
    "endless": (settings(CONFIG, num_hidden_layers=10**9), "/config.json: num_hidden_layers is 1"),
    "unknown act": (settings(CONFIG, hidden_act="x"), "/config.json: no policy can be made from "),
    "unknown rope": (
        settings(CONFIG, rope_parameters={"rope_type": "x"}),
        "/config.json: no policy can be made from it: ",
    ),
    "unknown type": (settings(CONFIG, model_type="x"), "/config.json: cannot be read: The check"),
    "no type": (settings(CONFIG, model_type=None), "/config.json: cannot be read: Unrecogn"),
    "no policy": (
        written(CONFIG, '{"model_type": "vit"}'),
        ": is no policy and cannot become one: transformers has none of its type (vit); choose ",
    ),
    "config torn": (written(CONFIG, '{"model_type": '), "/config.json: cannot be read: "),
    "config no object": (written(CONFIG, "[1]"), "/config.json: is no JSON object; "),
    "config deep": (written(CONFIG, "[" * 100_000), "/config.json: cannot be read: "),
    "tokenizer torn": (written("tokenizer.json", "{"), ": its tokenizer cannot be loaded: "),
    "tokenizer's config torn": (
        written("tokenizer_config.json", "{"),
        "/tokenizer_config.json: cannot be read: ",
    ),
    "generation torn": (written(GENERATION, "{"), "/generation_config.json: cannot be used: "),
    "generation no object": (written(GENERATION, "3"), "/generation_config.json: cannot be used"),
    "generation, wrong end": (
        settings(GENERATION, eos_token_id=["<eos>"]),
        "/generation_config.json: cannot be used: ",
    ),
    "cut": (cut, "/model.safetensors: cannot be read as safetensors: "),
    "empty": (written("model.safetensors", ""), "/model.safetensors: cannot be read as safetens"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "/model.safetensors: cannot be read as safetensors: No such file",
    ),
    "index torn": (sharded(lambda text: text[:-20]), "/model.safetensors.index.json: cannot be "),
    "index empty": (sharded(lambda _: "{}"), "/model.safetensors.index.json: has no weight_map"),
    "index outside": (
        sharded(lambda text: text.replace("model-00001", "../other/model-00001")),
        "/model.safetensors.index.json: names weights outside its folder (../other/model-00001",
    ),
    "shard missing": (
        sharded(lambda text: text.replace("model-00001", "model-00009")),
        "/model-00009-of-00003.safetensors: cannot be read as safetensors: No such file",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(folder, name):
    damage, said = DAMAGES[name]
    damage(folder)
    assert refusal(load.load_policy, str(folder)).startswith(f"{folder}{said}")


@pytest.mark.parametrize("field, value", [("hidden_size", "32"), ("rms_norm_eps", [1])])
def test_a_wrong_type_in_config_json_is_named_and_not_blamed_on_the_tokenizer(folder, field, value):
    settings(CONFIG, **{field: value})(folder)
    for call in (load.load_policy, load.load_tokenizer, load.load_config):
        said = refusal(call, str(folder))
        assert f"{folder / CONFIG}: cannot be read: " in said and f"'{field}' expected " in said


def test_weights_that_transformers_ignores_on_purpose_are_ignored(tmp_path, folder):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors(lambda found: found.update(extra))(folder)
    assert load.load_policy(str(folder))
    for kind, key in (
        ("gpt2", "transformer.h.0.attn.bias"),
        ("neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("qwen2", "lm_head.weight"),  # a copy of the embedding, to which it is tied
    ):
        path = tmp_path / kind
        model = tiny_model(kind, vocab=258)
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        copy = model.get_input_embeddings().weight.detach().clone()
        tensors(lambda found, key=key, copy=copy: found.update({key: copy}))(path)
        assert load.load_policy(str(path)) and load.load_scorer(str(path), seed=0)


def test_a_policys_head_in_a_reward_model_is_ignored_and_a_bias_is_not(tmp_path):
    tiny_model(scorer=True, vocab=258).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors(lambda found: found.update({"lm_head.weight": torch.ones(258, 32)}))(tmp_path)
    assert load.load_scorer(str(tmp_path))
    tensors(lambda found: found.update({"score.bias": torch.ones(1)}))(tmp_path)
    said = refusal(load.load_scorer, str(tmp_path))
    assert said.startswith(f"{tmp_path}: LlamaForSequenceClassification does not read score.bias ")
    tensors(
        lambda found: (found.pop("score.bias"), found.update({"score.weight": torch.ones(2, 32)}))
    )(tmp_path)
    said = refusal(load.load_scorer, str(tmp_path))
    assert said.startswith(
        f"{tmp_path}: score.weight has the shape [2, 32], and by config.json [1,"
    )


def test_a_special_token_without_a_row_is_refused_where_something_writes_it_only(folder):
    """Gemma 3 1B has one for pictures: text is never encoded as a special token."""
    more_tokens(folder, special=True)
    assert load.load_policy(str(folder))
    (folder / "chat_template.jinja").write_text("<tool>{{ messages[0]['content'] }}")
    assert "makes token 258 ('<tool>')" in refusal(load.load_policy, str(folder))
    (folder / "chat_template.jinja").unlink()
    settings("tokenizer_config.json", bos_token="<tool>")(folder)
    assert "makes token 258 ('<tool>')" in refusal(load.load_policy, str(folder))


def test_two_files_of_weights_are_read_as_transformers_reads_them(folder):
    """It prefers the whole file to an index; several processes must too."""
    index = {"weight_map": {"lm_head.weight": "stale.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "stale.safetensors").write_bytes(b"")
    assert hub.weight_files(folder) == ["model.safetensors"] and load.load_policy(str(folder))


def test_experts_that_a_file_keeps_one_by_one_are_checked_too(tmp_path):
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=2)
    MixtralForCausalLM(shape).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load.load_policy(str(tmp_path))
    norm = "model.layers.0.input_layernorm.weight"
    tensors(lambda found: found.pop(norm))(tmp_path)
    assert f"the weights of {norm} are missing" in refusal(load.load_policy, str(tmp_path))
    tensors(lambda found: found.update({norm: torch.ones(32), "extra": torch.ones(1)}))(tmp_path)
    assert "does not read extra" in refusal(load.load_policy, str(tmp_path))
    tensors(lambda found: found.pop("extra"))(tmp_path)
    settings(CONFIG, intermediate_size=48)(tmp_path)
    assert "has the shape [" in refusal(load.load_policy, str(tmp_path))


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_config_names_are_not_fetched(folder, name):
    settings(CONFIG, **{name: "kernels-community/flash-attn"})(folder)
    assert load.load_policy(str(folder))


# --- kinds of models ------------------------------------------------------------------------------


def kind(name, folder):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 258}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64}
    shape = getattr(transformers, name)(**sizes, **more if "Llama4" in name else {})
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_kind_without_reward_models_is_said_in_stage_1_and_refused_in_stage_2(tmp_path, capsys):
    path = kind("ApertusConfig", tmp_path)
    said = f"{path}: is no reward model and cannot become one: transformers has none of its type "
    said += "(apertus); choose a model of another type"
    assert refusal(lambda: load.load_policy(path, scorer="require")) == said
    capsys.readouterr()
    assert load.load_policy(path, scorer="warn") and load.load_policy(path)
    told = capsys.readouterr().err
    assert told.count("WARNING") == 1
    assert f"WARNING  stage 2 will refuse this model: {said}\n" in told


def test_stage_2_refuses_such_a_policy_and_a_damaged_judge_before_it_samples(
    tmp_path, models, world, command
):
    judge, apertus = tmp_path / "judge", kind("ApertusConfig", tmp_path / "apertus")
    nemotron = kind("NemotronConfig", tmp_path / "nemotron")
    shutil.copytree(models / "roomy", judge)
    settings(CONFIG, num_hidden_layers=3)(judge)
    for policy, feedback, said in (
        (apertus, models / "roomy", f"{apertus}: is no reward model and cannot become one"),
        (models / "roomy", judge, f"{judge}: the weights of model.layers.2."),
        (models / "roomy", nemotron, f"{nemotron}: NemotronForCausalLM is a kind of model that c"),
    ):
        how = ["--prompts=prompts.jsonl", "--preferences=", "--max_new_tokens=4"]
        how += [f"--policy={policy}", f"--feedback={feedback}"]
        code, out, err = command("train_rm.py", world / "config.toml", *how)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err
        assert not (world / "out").exists()


@pytest.mark.parametrize(
    "name, reason",
    [
        (
            "NemotronConfig",
            "NemotronForCausalLM is a kind of model that cannot be packed: its layers do not ",
        ),
        (
            "Llama4TextConfig",
            "Llama4ForCausalLM is a kind of model that cannot be packed: its attention_chunk_size ",
        ),
    ],
)
def test_a_kind_that_fails_in_its_own_code_is_refused_with_a_reason(tmp_path, name, reason):
    assert reason in refusal(load.load_policy, kind(name, tmp_path))


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
    assert said.startswith(f"{folder}/model.safetensors: cannot be read") and "pickles" in said
    assert not ran.exists()


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


def test_the_fingerprint_follows_all_that_decides_answers_and_nothing_else(tmp_path):
    one = text_folder(tmp_path / "one")
    same = text_folder(tmp_path / "same", stage="tomorrow")
    names = ("config", "model", "tokenizer")
    others = [text_folder(tmp_path / name, **{name: "other"}) for name in names]
    assert hub.weights_sha256(one) == hub.weights_sha256(same)
    for k, name in enumerate(("chat_template.jinja", "generation_config.json", "merges.txt")):
        others.append(text_folder(tmp_path / str(k)))
        (others[-1] / name).write_text("more")
    assert len({hub.weights_sha256(path) for path in (one, *others)}) == 7
    (one / "model.safetensors").rename(one / "other.safetensors")
    assert hub.weights_sha256(one) != hub.weights_sha256(same)
    assert re.fullmatch("[0-9a-f]{64}", hub.weights_sha256(same))


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder whose weights count as large and are an hour old, and the names of files hashed."""
    hashed, digest = [], hashlib.file_digest

    def watched(file, kind):
        hashed.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hub.hashlib, "file_digest", watched)
    monkeypatch.setattr(hub, "SUMS", tmp_path / "cache" / "sums")
    monkeypatch.setattr(hub, "LARGE", 100)
    folder = text_folder(tmp_path / "large", model="x" * 200)
    os.utime(folder / "model.safetensors", (time.time() - 3600,) * 2)
    return folder, hashed


def test_large_weights_are_read_once_and_small_files_every_time(large):
    folder, hashed = large
    first = hub.weights_sha256(folder)
    assert hub.weights_sha256(folder) == first
    small = ["config.json", "tokenizer.json"]
    assert sorted(hashed) == sorted(["model.safetensors", *small, *small])


@pytest.mark.parametrize("change", ["content", "replaced", "time kept", "size", "small", "new"])
def test_a_changed_file_is_read_again(large, change):
    folder, hashed = large
    first, weights = hub.weights_sha256(folder), folder / "model.safetensors"
    before = weights.stat()
    if change == "small":
        (folder / "config.json").write_text("[]")
    elif change == "replaced":  # as rsync -t and cp -p do
        (folder / "new").write_text("y" * 200)
        os.utime(folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
        (folder / "new").replace(weights)
    else:
        weights.write_text("y" * (201 if change == "size" else 200))
        if change in ("time kept", "size"):
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = hub.weights_sha256(folder)
    assert second != first
    if change == "new":  # two changes within one tick of the clock: nothing is kept at first
        os.utime(weights, (time.time(),) * 2)
        del hashed[:]
        hub.weights_sha256(folder), hub.weights_sha256(folder)
        assert hashed.count("model.safetensors") == 2


@pytest.mark.parametrize("cache", ["unwritable", "torn", "garbage"])
def test_a_cache_that_cannot_be_used_does_not_matter(large, cache):
    folder, _ = large
    if cache == "unwritable":
        hub.SUMS.parent.write_text("a file")
    first = hub.weights_sha256(folder)
    for kept in hub.SUMS.glob("*"):
        kept.write_bytes(b"" if cache == "torn" else b"\xff" * 64)
    assert hub.weights_sha256(folder) == first
