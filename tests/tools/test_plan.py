"""The plan of memory: weights, gradients, optimizer state and slots by hand. test_plan_measured.py has plans against what stages take."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_ppo
import train_rm
import train_sl
from minicai import InputError
from minicai.engine import config, parallel
from minicai.engine.models import response_logprobs
from minicai.tools import plan
from tests.conftest import ROOT, tiny_model

STAGES = {
    "sl": (train_sl, train_sl.SLConfig),
    "rm": (train_rm, train_rm.RMConfig),
    "ppo": (train_ppo, train_ppo.PPOConfig),
}
# tests/conftest.py's llama: embeddings and head of 64 tokens, two layers (attention, MLP, two norms), a norm
WEIGHTS = 2 * 64 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
TENSORS = 2 + 2 * 9 + 1


@pytest.fixture
def folder(tmp_path):
    """A model's folder without its weights."""
    tiny_model().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def updating(folder, world, precision="fp32", passes=2, tokens=60):
    model = plan.policy(folder)
    batch, optimizer = plan.batch(tokens, 4, 6), torch.optim.AdamW(model.parameters(), fused=True)
    step = plan.update(
        optimizer,
        passes,
        lambda: response_logprobs(model, batch.ids, batch.lengths, batch.mask).sum().backward(),
    )
    return plan.phase("updates", {"it": model}, ["it"], optimizer, precision, world, step)[1]


def test_weights_gradients_and_optimizer_state_by_hand(folder):
    rows = updating(folder, 1)
    assert rows["weights: it"] == rows["gradients"] == 4 * WEIGHTS
    assert (
        rows["optimizer state"] == 2 * 4 * WEIGHTS + 4 * TENSORS
    )  # two moments, and a count of steps for each tensor
    assert rows["gathered weights"] == rows["bfloat16 copies"] == 0
    assert (
        updating(folder, 1, passes=1)["gradients"] < rows["gradients"]
    )  # its fullest moment is before the backward pass is through


def test_two_processes_have_half_of_what_is_cut_and_two_layers_whole(folder):
    one, two = updating(folder, 1), updating(folder, 2)
    assert two["weights: it"] == two["gradients"] == 2 * WEIGHTS
    assert (
        two["optimizer state"] == one["optimizer state"] / 2 + 2 * TENSORS
    )  # the counts are not cut
    assert two["gathered weights"] == 8 * WEIGHTS  # it has two layers
    assert (two["activations"], two["logits"]) == (one["activations"], one["logits"])
    assert updating(folder, 2, "bf16")["gathered weights"] == 8 * WEIGHTS - 2 * (
        WEIGHTS - 2 * 64 * 32 - 32
    )  # layers as bfloat16, gradients float32


def test_what_comes_and_goes_is_counted_while_it_lives(folder):
    def work():
        x = torch.zeros(250, 1000)
        y = x + 1
        del x
        z = y * 2
        return z.view(-1)

    rows = plan.phase("work", {"it": plan.policy(folder)}, [], None, "fp32", 1, work)[1]
    assert (rows["activations"], rows["logits"]) == (2 * 1_000_000, 0)  # x and y, then y and z
    rows = plan.phase(
        "work",
        {"it": plan.policy(folder)},
        [],
        None,
        "fp32",
        1,
        lambda: [torch.zeros(250, 1000), torch.zeros(10, 64)],
    )[1]
    assert (rows["activations"], rows["logits"]) == (
        1_000_000,
        10 * 64 * 4,
    )  # 64 is the size of the vocabulary


def test_slots_of_generation_by_hand(folder):
    rows = plan.generation(
        "sampling", {"it": plan.policy(folder)}, "it", "fp32", 1, rows=10, fed=5, capacity=30
    )[1]
    assert (
        rows["key-value slots"] == 10 * 30 * 2 * 2 * 2 * 8 * 4
    )  # rows, tokens, layers, keys and values, heads, their size, bytes
    assert plan.generation(
        "sampling", {"it": plan.policy(folder)}, "it", "bf16", 3, rows=10, fed=5, capacity=30
    )[1]["gathered weights"] == 4 * WEIGHTS - 2 * (WEIGHTS - 2 * 64 * 32 - 32)


def test_several_processes_gather_all_the_models_that_a_phase_asks(folder):
    models = {name: plan.policy(folder) for name in ("feedback", "jury 1", "jury 2")}
    one = plan.generation(
        "thinking", {"it": plan.policy(folder)}, "it", "fp32", 2, rows=10, fed=5, capacity=30
    )[1]["gathered weights"]
    assert (
        plan.generation(
            "thinking", models, "feedback", "fp32", 2, rows=10, fed=5, capacity=30, beside=models
        )[1]["gathered weights"]
        == 3 * one
    )
    assert (
        plan.asking("labelling", models, "fp32", 2, lambda: None)[1]["gathered weights"]
        == 3 * one
        == 3 * 4 * WEIGHTS
    )


def test_logits_of_generation_are_counted(tmp_path):
    tiny_model(vocab=4096).config.save_pretrained(tmp_path)
    rows = plan.generation(
        "sampling", {"it": plan.policy(str(tmp_path))}, "it", "fp32", 1, rows=10, fed=1, capacity=30
    )[1]
    assert (
        10 * 4096 * (4 + 4 + 8) <= rows["logits"] <= 10 * 4096 * 40
    )  # log-probs, probabilities, their sums in float64 at the least


def test_autocast_keeps_bfloat16_copies_of_the_matrices_of_a_model_that_trains(folder):
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert updating(folder, 1, "bf16", 1, 2000)["bfloat16 copies"] == 2 * matrices


def test_slack_is_the_activations_of_three_layers(folder, tmp_path):
    rows = updating(folder, 1)
    assert rows["allocator slack"] == rows["activations"]  # it has two
    shape = tiny_model().config
    shape.num_hidden_layers = 8
    shape.save_pretrained(tmp_path / "deep")
    rows = updating(str(tmp_path / "deep"), 1)
    assert rows["allocator slack"] == 3 * rows["activations"] // 8


@pytest.mark.parametrize("threshold", ["", "131072"])
def test_who_tells_the_allocator_to_keep_nothing_gets_no_slack_and_an_untuned_allocator(
    folder, threshold, monkeypatch, capsys
):
    monkeypatch.delenv(parallel.MALLOC, raising=False)
    if threshold:
        monkeypatch.setenv(parallel.MALLOC, threshold)
    tuned = []
    monkeypatch.setattr(parallel.platform, "system", lambda: "Linux")
    monkeypatch.setattr(parallel.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(
        parallel.ctypes,
        "CDLL",
        lambda _: SimpleNamespace(mallopt=lambda *given: tuned.append(given)),
    )
    device, _ = parallel.setup("cpu", "fp32")
    assert bool(tuned) != bool(threshold)
    rows = updating(folder, 1)
    shown = plan.show([("updates", rows)], device, "fp32", 1)["phases"]["updates"]
    assert rows.keys() - shown.keys() == ({"allocator slack"} if threshold else set())
    assert ("allocator slack" in capsys.readouterr().out) != bool(threshold)


def test_a_missing_or_unreadable_folder_is_refused(folder):
    with pytest.raises(
        InputError, match=r"is not a model folder \(no config.json\); did you mean .*model\?"
    ):
        plan.policy(folder.replace("model", "modle"))
    Path(folder, "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError, match=r"no model can be made from its config\.json"):
        plan.scorer(folder, 0)
    assert (
        plan.stand_in(folder + "/later", "base") == "base"
        and plan.stand_in(folder, "base") == folder
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_planned_stage_loads_and_writes_nothing(stage, tmp_path, monkeypatch, capsys):
    module, kind = STAGES[stage]
    for name in {"load_policy", "load_scorer"} & vars(module).keys():
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("weights were loaded"))
    arguments = [
        str(ROOT / "configs/tiny.toml"),
        f"--out={tmp_path / 'out'}",
        "--rows=8",
        "--micro_tokens=200",
    ]
    one, two = (module.main(config.load(kind, stage, [*arguments, f"--plan={n}"])) for n in (1, 2))
    assert not (tmp_path / "out").exists()
    assert one["total"] == max(sum(rows.values()) for rows in one["phases"].values())
    for name, rows in one["phases"].items():
        for row, size in rows.items():
            if row.startswith("weights") or row == "optimizer state":
                assert 0.5 * size <= two["phases"][name][row] <= 0.501 * size
    shown = capsys.readouterr().out
    assert (
        f"The largest phase takes {one['total'] / 2**30:.3f} GiB in each of 1 process, on cpu in fp32.\n"
        in shown
        and "allocator slack" in shown
    )


def test_rationales_are_planned_for_and_make_comparisons_longer(tmp_path):
    arguments = [
        str(ROOT / "configs/tiny.toml"),
        f"--out={tmp_path}",
        "--rows=8",
        "--micro_tokens=200",
        "--plan",
    ]
    plain, thought = (
        train_rm.main(config.load(train_rm.RMConfig, "rm", [*arguments, *more]))["phases"]
        for more in ([], ["--labels=chain_of_thought", "--thought_tokens=40"])
    )
    assert (
        thought.keys() - plain.keys() == {"thinking"}
        and thought["thinking"]["key-value slots"] > plain["sampling"]["key-value slots"]
    )
    assert thought["labelling"]["activations"] > plain["labelling"]["activations"]


@pytest.mark.parametrize("stage, override", [("rm", "--preferences="), ("ppo", "--precision=bf16")])
def test_a_stage_without_human_pairs_and_frozen_models_in_bf16_can_be_planned(
    stage, override, tmp_path, capsys
):
    module, kind = STAGES[stage]
    for n in (1, 8):
        planned = module.main(
            config.load(
                kind,
                stage,
                [
                    str(ROOT / "configs/tiny.toml"),
                    f"--out={tmp_path}",
                    "--rows=8",
                    f"--plan={n}",
                    override,
                ],
            )
        )
        assert planned["total"] > 0 and not any(
            rows.get("bfloat16 copies") for rows in planned["phases"].values() if n == 8
        )
    assert "in each of 8 processes" in capsys.readouterr().out


def test_no_two_models_of_the_preference_stage_live_at_the_same_time(tmp_path, monkeypatch):
    loaded = []

    def watched(original):
        def load(*arguments, **settings):
            assert [ref() for ref in loaded] == [None] * len(loaded)
            model = original(*arguments, **settings)
            loaded.append(weakref.ref(model))
            return model

        return load

    for name in ("load_policy", "load_scorer"):
        monkeypatch.setattr(train_rm, name, watched(getattr(train_rm, name)))
    train_rm.main(
        config.load(
            train_rm.RMConfig,
            "rm",
            [
                str(ROOT / "configs/tiny.toml"),
                f"--out={tmp_path}",
                "--policy=minicai:tinyworld/base",
                "--limit=6",
                "--preferences_limit=4",
                "--revision_pairs=0",
                "--epochs=1",
            ],
        )
    )
    assert len(loaded) == 3
