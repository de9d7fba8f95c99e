"""Adapters: exact when off, equal to dense weights when on, and roles that do not leak."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import tensor

import train_ppo
import train_rm
import train_sl
from minicai import InputError
from minicai.engine import adapters, config, hub, load, models
from minicai.engine.adapters import Role
from minicai.engine.config import Lora
from minicai.engine.sampler import Sampling, generate
from minicai.rollout import collate
from tests.conftest import CPU, EOS, ROOT, assert_close, byte_tokenizer, tiny_model
from tests.recorders import stopped

PROMPTS = [[5, 9, 17], [33, 12, 8, 40, 51, 7, 22], [60]]
RESPONSES = [[20, 31, EOS], [EOS], [44, 2, 9, 13, 50, 6]]
KINDS = ("llama", "gpt2", "qwen2", "neox")
BASE = str(ROOT / "minicai/tinyworld/base")  # some folder with weights
HOW = Lora(rank=4, alpha=6.0)


def pairs(model, name):
    """{path of the layer: its pair} of a role."""
    layers = model.named_modules()
    return {path: x.adapters[name] for path, x in layers if name in getattr(x, "adapters", ())}


def batch():
    return collate(PROMPTS, RESPONSES, CPU)


def adapted(kind="llama", *roles, scorers=()):
    """A frozen model with roles whose B is not zero."""
    model = tiny_model(kind).requires_grad_(False)
    model.name_or_path = BASE
    for k, name in enumerate((*roles, *scorers)):
        adapters.attach(model, name, HOW, score=name in scorers).draw(k)
        generator = torch.Generator().manual_seed(100 + k)
        for parameter in Role(model, name, HOW).parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def dense(model, name):
    """A plain copy of the model with the role merged into its weights."""
    plain = copy.deepcopy(model)
    adapters.merge(plain, HOW, Role(model, name, HOW).numbers())
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_role_the_numbers_are_the_base_models_bit_for_bit(kind):
    plain, model = tiny_model(kind), adapted(kind, "policy")
    assert torch.equal(
        models.response_logprobs(model, batch()), models.response_logprobs(plain, batch())
    )
    ids = tensor([PROMPTS[1]])
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_begins_as_the_base_model_and_its_first_ratio_is_1(kind):
    model = tiny_model(kind).requires_grad_(False)
    before = models.response_logprobs(model, batch())
    policy = adapters.attach(model, "policy", HOW)
    policy.draw(3)
    assert torch.equal(models.response_logprobs(policy, batch()), before)
    assert all(pair.A.std() > 0 for pair in pairs(model, "policy").values())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_what_the_role_gives(kind):
    model = adapted(kind, "policy")
    on = models.response_logprobs(Role(model, "policy", HOW), batch())
    off = models.response_logprobs(model, batch())
    merged = models.response_logprobs(dense(model, "policy"), batch())
    assert (on - off).abs().max() > 0.1
    assert_close(on.detach(), merged.detach(), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else(kind):
    model = adapted(kind, "policy")
    linear = {
        path
        for path, layer in tiny_model(kind).named_modules()
        if isinstance(layer, adapters.LINEAR) and ".0." in path
    }
    found = {path for path in pairs(model, "policy") if ".0." in path}
    assert found == linear and len(found) >= 4
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {*trained} == {*Role(model, "policy", HOW).parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_weights_by_the_chain_rule(kind):
    # dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW by autograd on the dense model.
    model = adapted(kind, "policy")
    plain = dense(model, "policy").requires_grad_(True)
    models.response_logprobs(Role(model, "policy", HOW), batch()).sum().backward()
    models.response_logprobs(plain, batch()).sum().backward()
    for path, pair in pairs(model, "policy").items():
        layer = plain.get_submodule(path)
        gradient = layer.weight.grad
        gradient = gradient.t() if isinstance(layer, adapters.Conv1D) else gradient
        scale = HOW.alpha / HOW.rank
        for found, expected in (
            (pair.B.grad, scale * gradient @ pair.A.t()),
            (pair.A.grad, scale * pair.B.t() @ gradient),
        ):
            assert_close(found, expected.detach(), 1e-4 * max(1, expected.abs().max().item()))


def four_roles():
    return adapted("llama", "policy", scorers=("reward", "value"))


def said(model):
    """What the four roles say of a batch."""
    policy, reward, value = (Role(model, name, HOW) for name in ("policy", "reward", "value"))
    with torch.no_grad():
        return {
            "policy": models.response_logprobs(policy, batch()),
            "reference": models.response_logprobs(model, batch()),
            "reward": models.sequence_scores(reward, batch()),
            "value": models.token_values(value, batch()),
        }


@pytest.mark.parametrize("name", ["policy", "value"])
def test_a_step_of_one_role_changes_no_number_of_the_others(name):
    model = four_roles()
    before, role = said(model), Role(model, name, HOW)
    passes = {"policy": models.response_logprobs, "value": models.token_values}
    optimizer = torch.optim.AdamW(role.parameters(), lr=0.01)
    passes[name](role, batch()).square().sum().backward()
    optimizer.step()
    after = said(model)
    for other in before:
        assert torch.equal(before[other], after[other]) == (other != name), other


def gradients(model, order, recompute):
    """Gradients of policy and value, whose backward passes run in the given order."""
    if recompute:
        models.checkpoint_layers(model)
    policy, value = Role(model, "policy", HOW), Role(model, "value", HOW)
    passes = {
        "policy": models.response_logprobs(policy, batch()).sum(),
        "value": models.token_values(value, batch()).sum(),
    }
    for name in order:
        with adapters.role("reward"):  # the role that is on in a backward pass must not matter
            passes[name].backward()
    return [p.grad for role in (policy, value) for p in role.parameters()]


@pytest.mark.parametrize("order", [("policy", "value"), ("value", "policy")])
def test_recomputed_layers_are_computed_in_the_role_of_their_forward_pass(order):
    expected = gradients(four_roles(), ("policy", "value"), recompute=False)
    found = gradients(four_roles(), order, recompute=True)
    assert len(found) == len(expected) > 20
    for one, other in zip(found, expected):
        assert_close(one, other, 1e-5 * max(1, other.abs().max().item()))


def test_sampling_and_scoring_agree_in_a_role():
    model = adapted("llama", "policy")
    policy, how = Role(model, "policy", HOW), Sampling(12)
    seeds = [(k,) for k in range(3)]
    done = generate(policy, PROMPTS, seeds, how, ends={EOS})
    sampled = collate(PROMPTS, [c.ids for c in done], CPU)
    scored = models.response_logprobs(policy, sampled).detach()
    found = torch.cat([tensor(c.logprobs) for c in done])
    assert_close(scored[sampled.mask], found, 2e-5)
    plain = generate(model, PROMPTS, seeds, how, ends={EOS})
    assert [c.ids for c in plain] != [c.ids for c in done]


def test_named_targets_are_adapted_and_an_unknown_one_is_refused():
    model = tiny_model("llama")
    adapters.attach(model, "policy", Lora(2, 4.0, ("q_proj", "v_proj")))
    assert {path.rpartition(".")[2] for path in pairs(model, "policy")} == {
        "q_proj",
        "v_proj",
    }
    with pytest.raises(InputError, match=r"lora_targets: no linear query in the blocks of "):
        adapters.attach(tiny_model("llama"), "policy", Lora(2, 4.0, ("q_proj", "query")))


def test_a_copied_model_has_adapters_of_its_own():
    model = adapted("llama", "policy")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in Role(other, "policy", HOW).parameters():
            parameter.zero_()
    on = models.response_logprobs(Role(other, "policy", HOW), batch())
    assert torch.equal(on, models.response_logprobs(model, batch()))
    assert not torch.equal(on, models.response_logprobs(Role(model, "policy", HOW), batch()))


# --- folders --------------------------------------------------------------------------------------


def test_a_stored_role_is_read_back(tmp_path):
    model = four_roles()
    reward = Role(model, "reward", HOW)
    adapters.save(tmp_path, reward, reward.numbers())
    how, numbers = adapters.read(tmp_path, BASE)
    other = tiny_model("llama").requires_grad_(False)
    value = adapters.attach(other, "value", how, score=True)
    value.fill(numbers)
    assert torch.equal(
        models.sequence_scores(value, batch()), models.sequence_scores(reward, batch())
    )


@pytest.mark.parametrize(
    "key, value",
    [("use_dora", True), ("bias", "all"), ("peft_type", "IA3"), ("rank_pattern", {"q_proj": 8})],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, key, value):
    policy = Role(adapted("llama", "policy"), "policy", HOW)
    adapters.save(tmp_path, policy, policy.numbers())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=rf"{key} is not that of plain LoRA"):
        adapters.read(tmp_path, BASE)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_numbers_from_our_folder(tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = adapted(kind, "policy")
    role = Role(model, "policy", HOW)
    adapters.save(tmp_path, role, role.numbers())
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    ids = tensor([PROMPTS[1]])
    assert_close(theirs(input_ids=ids).logits.detach(), role(input_ids=ids).logits.detach(), 2e-5)


# --- the three stages -----------------------------------------------------------------------------

SMALL = ["--device=cpu", "--save_every=2", "--max_new_tokens=20", "--rows=16", "--lora_rank=4"]
STAGES = {
    "sl": (train_sl, train_sl.SLConfig, ["--limit=6", "--helpful_limit=6", "--batch_size=8"]),
    "rm": (train_rm, train_rm.RMConfig, ["--limit=6", "--preferences_limit=20", "--batch_size=5"]),
    "ppo": (train_ppo, train_ppo.PPOConfig, ["--iterations=3", "--episodes=8"]),
}


def run_stage(name, out, *flags):
    script, kind, small = STAGES[name]
    paths = [str(ROOT / "configs/tiny.toml"), f"--out={out}"]
    return script.main(config.load(kind, name, [*paths, *SMALL, *small, "--lr=1e-3", *flags]))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """OUT of the three stages with adapters."""
    out = tmp_path_factory.mktemp("adapters") / "out"
    for name in STAGES:
        run_stage(name, out)
    return out


@pytest.mark.parametrize("name", STAGES)
def test_an_exported_folder_is_the_base_with_its_adapter_merged(stages, name):
    folder = stages / name
    base = ROOT / "minicai/tinyworld/base" if name == "sl" else stages / "sl"
    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    how, numbers = adapters.read(folder / "adapter", str(base))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {
        key.removeprefix(adapters.PREFIX).removesuffix(adapters.A) + ".weight"
        for key in numbers
        if key.endswith(adapters.A)
    }
    for key in changed:
        path = adapters.PREFIX + key.removesuffix(".weight")
        delta = how.alpha / how.rank * numbers[path + adapters.B] @ numbers[path + adapters.A]
        assert_close(after[key], before[key] + delta, 1e-6)
    kept = {key for key in after if key not in before}
    assert kept == ({"score.weight"} if name == "rm" else set())


@pytest.mark.parametrize("name", STAGES)
def test_an_interrupted_run_resumes_to_the_same_bytes(stages, name, tmp_path):
    out, script = tmp_path / "out", STAGES[name][0]
    shutil.copytree(stages, out)
    moment = stopped(script, "collate" if name == "ppo" else "batch_of_step", 3)
    with moment, pytest.raises(KeyboardInterrupt):
        run_stage(name, out, "--overwrite")
    checkpoint = out / name / "checkpoints" / "step_000002"
    assert checkpoint.is_dir()
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert size < (stages / name / "model.safetensors").stat().st_size  # no frozen weights
    run_stage(name, out)
    for file in ("metrics.jsonl", "model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name / file).read_bytes() == (stages / name / file).read_bytes(), file


def test_another_rank_is_another_run(stages):
    with pytest.raises(InputError, match=r"lora_rank \(4 there, 8 now\)"):
        run_stage("sl", stages, "--lora_rank=8")


def test_a_reward_model_s_adapter_belongs_to_the_weights_it_was_trained_on(stages, tmp_path):
    base = f"--ppo.policy={ROOT / 'minicai/tinyworld/base'}"
    with pytest.raises(InputError, match="trained on other weights than those of"):
        run_stage("ppo", tmp_path, base, f"--ppo.reward={stages / 'rm'}")


def test_with_a_reward_function_the_value_model_starts_at_zero(stages, tmp_path):
    reward = "--ppo.reward_function=results.rewards:refusing_words"
    run_stage("ppo", tmp_path, f"--ppo.policy={stages / 'sl'}", reward)
    first = json.loads((tmp_path / "ppo/metrics.jsonl").read_text().splitlines()[0])
    assert first["explained_variance"] == pytest.approx(0, abs=1e-4)


# --- an adapter as a model ------------------------------------------------------------------------


def test_an_adapter_folder_is_a_model_with_its_base(stages):
    whole, adapter = load.load_policy(str(stages / "sl")), load.load_policy(f"{stages}/sl/adapter")
    for one, other in zip(whole.parameters(), adapter.parameters(), strict=True):
        assert_close(one.detach(), other.detach(), 1e-6)
    sums = {hub.weights_sha256(f"{stages}/{name}") for name in ("sl/adapter", "rm/adapter", "sl")}
    assert len(sums) == 3


def test_what_an_adapter_has_beside_linear_layers_is_refused(stages, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(stages / "sl" / "adapter", folder)
    numbers = load_file(folder / "adapter_model.safetensors")
    key = adapters.PREFIX + "model.embed_tokens.lora_embedding_A"
    save_file(numbers | {key: torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"{key} is of no linear layer of "):
        load.load_policy(str(folder))


def test_peft_s_own_folder_is_a_model(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model("llama", vocab=258)
    for name in ("base", "adapter"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    base.save_pretrained(tmp_path / "base")
    how = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    base.name_or_path = str(tmp_path / "base")
    theirs = peft.get_peft_model(base, how)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    ids = tensor([PROMPTS[1]])
    ours = load.load_policy(str(tmp_path / "adapter"))
    assert_close(ours(input_ids=ids).logits.detach(), theirs(input_ids=ids).logits.detach(), 2e-5)


def test_another_adapter_beside_the_same_weights_is_another_model(stages, tmp_path):
    folder = tmp_path / "rm"
    shutil.copytree(stages / "rm", folder)
    before = hub.weights_sha256(folder)
    assert before == hub.weights_sha256(stages / "rm")
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({key: x + 1 for key, x in load_file(path).items()}, path)
    assert hub.weights_sha256(folder) != before


def test_a_reward_model_that_was_trained_in_full_is_refused_by_name(stages, tmp_path):
    shutil.copytree(stages / "rm", tmp_path / "rm", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(InputError, match="lora_rank needs a reward model that was trained with it"):
        load.load_roles(str(stages / "sl"), str(tmp_path / "rm"), HOW, 0)
