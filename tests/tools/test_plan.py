"""The plan of memory: a tiny model's numbers worked out by hand, and what each setting changes.
test_plan_measured.py compares plans with what stages take."""

import json

import pytest
from transformers import LlamaConfig, T5Config

import train_ppo
from minicai.__main__ import main
from minicai.engine import parallel
from minicai.tools import plan
from tests.conftest import ARCHITECTURES, ROOT, byte_tokenizer, tiny_model

# tests/conftest.py's llama with the 258 tokens of byte_tokenizer: H 32, I 64, two layers, four
# heads of 8, two of them for keys. A layer: q and o, k and v, three of the MLP, two norms.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
EMBEDDINGS, NORM = 258 * 32, 32
INSIDE = 2 * LAYER
P = INSIDE + 2 * EMBEDDINGS + NORM
# "\n\nHuman: {}\n\nAssistant:", 21 bytes around a prompt of 9 and one of 19
MEAN, LONGEST, NEW = 21 + 14, 21 + 19, 10
# The principle's revision request, around texts of no length (prompts.py).
REQUEST = len(
    "Consider the following conversation between a human and an assistant:"
    "\n\nHuman: \n\nAssistant: "
    "\n\nCritique Request: Find it.\n\nCritique: \n\nRevision Request: Mend it.\n\nRevision:"
)
PARTS = ["weights", "Adam", "copies", "gradients", "slots", "activations", "logits", "process"]


@pytest.fixture
def folder(tmp_path):
    """A model's folder without weights, two prompts, one principle, and a config."""
    tiny_model(vocab=258).config.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": "a" * n}) + "\n" for n in (9, 19)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    (tmp_path / "one.toml").write_text(
        'name = "one"\nversion = "1"\n[[principle]]\nname = "it"\ncritique = "Find it."\n'
        'revision = "Mend it."\ncomparison = "Which?"\n'
    )
    config = ['model = "model"', 'constitution = "one.toml"', 'device = "cpu"']
    config += [f'precision = "fp32"\nout = "{tmp_path}/out"', "rows = 6\nmicro_tokens = 1000"]
    both = 'prompts = "prompts.jsonl"\nmax_new_tokens = 10'
    config += ["[sl]", both, 'helpful_prompts = ""\nbatch_size = 100']
    config += ["[rm]", both, "batch_size = 4"]
    config += ["[ppo]", both, 'helpful_prompts = ""\nepisodes = 8\nminibatches = 2']
    (tmp_path / "config.toml").write_text("\n".join(config))
    return tmp_path


@pytest.fixture
def planned(folder, monkeypatch):
    """planned(stage, flag, ..., processes=N) -> {phase: {component: bytes}}; the heap has holes."""
    monkeypatch.delenv(parallel.MALLOC, raising=False)

    def run(stage, *flags, processes=1):
        found = plan.planned(stage, [str(folder / "config.toml"), *flags], processes)
        return {phase.removeprefix(f"{stage} "): parts for phase, parts in found.items()}

    return run


def test_the_components_of_learning_by_hand(planned):
    parts = planned("sl")["training"]
    tokens = 1000  # fewer than 100 sequences of 45
    layer = 2 * 3 * 32 + 5.4 * 32 + 4 * 64  # numbers kept per token
    by_hand = {
        "weights": 4 * P,
        "Adam": 8 * P,
        "gradients": 4 * P,
        "copies": 0,
        "slots": 0,
        "activations": tokens * 2 * layer * 4,
        "logits": tokens * NEW / (MEAN + NEW) * 258 * 3 * 4,
    }
    assert {name: parts[name] for name in by_hand} == pytest.approx(by_hand)
    assert list(parts) == [*PARTS, "total"]
    assert parts["total"] == pytest.approx(sum(parts[name] for name in PARTS))


def test_the_components_of_generation_by_hand(planned):
    fed = MEAN + 2 * NEW + REQUEST  # a revision's prompt has a response and a critique
    context = LONGEST + NEW + 2 * NEW + REQUEST
    by_hand = {
        "weights": 4 * P,
        "Adam": 0,
        "gradients": 0,
        "slots": 6 * context * 2 * 2 * 16 * 4,  # rows, tokens, layers, keys and values, K, bytes
        "activations": 6 * fed * (2 * 32 + 3 * 64 + context) * 4,
        "logits": 6 * 258 * (3 * 4 + 2 * 8),
    }
    parts = planned("sl")["model"]
    assert {name: parts[name] for name in by_hand} == pytest.approx(by_hand)


def test_the_phases_of_the_preference_stage_hold_one_model_each(planned):
    phases = planned("rm")
    assert list(phases) == ["policy", "feedback", "training"]
    scorer = P - EMBEDDINGS  # its head, of two labels in this folder's config, is a tiny one
    assert phases["policy"]["weights"] == phases["feedback"]["weights"] == 4 * P
    assert phases["training"]["weights"] == pytest.approx(4 * scorer, rel=0.01)
    assert phases["training"]["logits"] == phases["feedback"]["slots"] == 0
    assert phases["policy"]["slots"] == 6 * (LONGEST + NEW) * 2 * 2 * 16 * 4
    # four pairs, eight sequences, are less than a micro-batch of 1,000 tokens
    tokens = 4 * (MEAN + 2 * NEW)  # the prompt of a pair goes through the layers once
    assert phases["training"]["activations"] == pytest.approx(tokens * 2 * (192 + 172.8 + 256) * 4)


def test_ppo_holds_its_four_models_and_adam_in_all_phases(planned):
    phases = planned("ppo")
    assert list(phases) == ["policy", "training"]
    for parts in phases.values():
        assert parts["weights"] == pytest.approx(4 * (4 * P - 2 * EMBEDDINGS), rel=0.01)
        assert parts["Adam"] == pytest.approx(8 * (2 * P - EMBEDDINGS), rel=0.01)


def test_a_script_without_a_value_model_is_planned_with_less(planned, monkeypatch):
    full = planned("ppo")["training"]
    monkeypatch.setattr(train_ppo, "TRAINED", ("policy",))
    parts = planned("ppo")["training"]
    scorer = P - EMBEDDINGS
    assert full["Adam"] - parts["Adam"] == pytest.approx(8 * scorer, rel=0.01)
    assert full["weights"] - parts["weights"] == pytest.approx(4 * scorer, rel=0.01)
    assert full["activations"] == parts["activations"]  # the two learn one after the other


def test_bfloat16_halves_what_the_products_keep_and_adds_a_copy_of_the_layers(planned):
    parts, full = (planned("sl", f"--precision={p}") for p in ("bf16", "fp32"))
    assert parts["training"]["weights"] == 4 * P
    assert parts["training"]["copies"] == parts["model"]["copies"] == 2 * INSIDE
    assert parts["model"]["slots"] == full["model"]["slots"] / 2
    kept = 1000 * 2 * (24 * 32 + 2 * (5.4 * 32 + 4 * 64))
    assert parts["training"]["activations"] == pytest.approx(kept)


@pytest.mark.parametrize("precision, b", [("fp32", 4), ("bf16", 2)])
def test_several_processes_share_the_state_and_gather_layers_or_a_model(planned, precision, b):
    one, four = (planned("sl", f"--precision={precision}", processes=n) for n in (1, 4))
    for name in ("weights", "Adam", "gradients"):
        assert four["training"][name] == one["training"][name] / 4
    outside = 2 * EMBEDDINGS + NORM
    assert four["training"]["copies"] == INSIDE * (b + 4) + outside * (4 + 4)  # it has two layers
    assert four["model"]["copies"] == INSIDE * b + outside * 4
    assert four["model"]["slots"] == one["model"]["slots"]  # each process has its own rows


def test_the_plan_follows_the_config(planned):
    base = {stage: planned(stage) for stage in plan.SCRIPTS}
    for stage, phase in (("sl", "model"), ("rm", "policy")):
        parts = planned(stage, "--rows=12")[phase]
        assert parts["slots"] == 2 * base[stage][phase]["slots"]
    # PPO decodes no more rows than a process has episodes, and learns from a minibatch's
    assert planned("ppo", "--rows=12")["policy"]["slots"] * 6 == base["ppo"]["policy"]["slots"] * 8
    halved = planned("ppo", "--minibatches=4")["training"]
    assert halved["activations"] == base["ppo"]["training"]["activations"] / 2
    assert planned("ppo", "--episodes=16")["training"]["logits"] == (
        2 * base["ppo"]["training"]["logits"]
    )
    halved = planned("sl", "--micro_tokens=500")["training"]
    assert halved["activations"] == base["sl"]["training"]["activations"] / 2
    assert planned("sl", "--max_new_tokens=20")["model"]["slots"] > base["sl"]["model"]["slots"]
    few = planned("sl", "--batch_size=2")["training"]["activations"]
    assert few == pytest.approx(base["sl"]["training"]["activations"] * 2 * (MEAN + NEW) / 1000)
    again = planned("sl", "--gradient_checkpointing=true")["training"]
    layer = base["sl"]["training"]["activations"] / 2
    assert again["activations"] == pytest.approx(layer + 2 * 1000 * 32 * 4)


def test_the_logits_of_a_large_micro_batch_are_made_in_chunks(planned):
    flags = ("--micro_tokens=100000", "--batch_size=10000")
    assert planned("sl", *flags)["training"]["logits"] == 12 * plan.CHUNK * 258


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parameters_of_any_architecture_are_counted(architecture, folder, planned):
    for vocabulary in (258, 300):
        model = tiny_model(architecture, vocab=vocabulary)
        model.config.save_pretrained(folder / "model")
        layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
        inside = sum(p.numel() for layer in layers for p in layer.parameters())
        parts = planned("sl", "--precision=bf16")["training"]
        assert parts["weights"] == 4 * model.num_parameters()
        assert parts["copies"] == 2 * inside


def test_a_model_that_does_not_fit_this_machine_takes_no_memory(folder, planned):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    LlamaConfig(**sizes, **heads, vocab_size=128256).save_pretrained(folder / "model")
    before = parallel.peak_memory_mb()
    parts = planned("sl", processes=64)["training"]
    assert parts["weights"] == pytest.approx(4 * 70.55e9 / 64, rel=0.001)  # Llama 3.1 70B
    assert parallel.peak_memory_mb() - before < 500


def test_who_maps_each_block_by_itself_gets_no_holes(planned, monkeypatch):
    with_holes = planned("sl")["training"]["process"]
    monkeypatch.setenv(parallel.MALLOC, "131072")
    assert with_holes - planned("sl")["training"]["process"] > 300 * 2**20


def test_nothing_is_loaded_and_nothing_is_made(folder, capsys):
    before = sorted(folder.rglob("*"))
    main(["plan", str(folder / "config.toml"), "--processes", "2"])
    assert sorted(folder.rglob("*")) == before
    shown = capsys.readouterr().out
    names = ["sl model", "sl training", "rm policy", "rm feedback", "rm training"]
    for name in [*names, "ppo policy", "ppo training"]:
        assert f"\n{name}" in shown
    assert all(part in shown.splitlines()[0] for part in [*PARTS, "total"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["CONFIG", "--processes=0"], "processes must be at least 1"),
        (["CONFIG", "--processes=many"], "--processes: invalid int value: 'many'"),
        ([], "plan: missing a required argument: 'file'"),
        (["no/such.toml"], "no/such.toml: no such file"),
        (["CONFIG", "--rwos=8"], "--rwos: unknown key; did you mean --rows?"),
        (["CONFIG", "--model=modle"], "is not a model folder"),
        (["CONFIG", "--sl.prompts=none.jsonl"], "none.jsonl"),
    ],
)
def test_what_is_wrong_gets_one_sentence(words, message, folder, command):
    words = [str(folder / "config.toml") if word == "CONFIG" else word for word in words]
    code, out, err = command("minicai/__main__.py", "plan", *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_folder_that_is_no_language_model_is_refused(folder, planned):
    T5Config(num_layers=1).save_pretrained(folder / "model")
    with pytest.raises(plan.InputError, match="no language model can be made from its config"):
        planned("sl")


@pytest.mark.parametrize("name", ["tiny.toml", "tiny-short.toml", "tiny-harm-only.toml"])
def test_the_configs_of_the_tiny_world_can_be_planned(name, tmp_path):
    for stage in plan.SCRIPTS:
        path = str(ROOT / "configs" / name)
        phases = plan.planned(stage, [path, f"--out={tmp_path / 'out'}"], 2)
        sizes = [parts["total"] - parts["process"] for parts in phases.values()]
        assert all(0 < size < 2 * 2**30 for size in sizes)  # besides what this process has taken


def test_with_adapters_one_frozen_model_holds_all_roles(planned):
    # A and B of rank 3: r (in + out) in each of q, k, v, o, gate, up, down of two layers.
    pairs = 2 * 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    scorer = pairs + 32  # and a head
    roles = {  # trained, and all
        "sl": ([pairs], [pairs]),
        "rm": ([scorer], [scorer]),
        "ppo": ([pairs, scorer], [pairs, scorer, scorer]),  # the reference has none
    }
    for stage, (trained, adapted) in roles.items():
        parts = planned(stage, "--lora_rank=3", "--precision=bf16")["training"]
        head = 32 if stage == "rm" else EMBEDDINGS
        assert parts["weights"] == 2 * INSIDE + 4 * (EMBEDDINGS + NORM + head + sum(adapted))
        assert parts["Adam"] == 2 * parts["gradients"] == 8 * sum(trained)
        assert parts["copies"] == 0
