"""The settings of the three scripts: their defaults, bounds, and which of them name models.

A new setting fails nothing here. A default that changes by accident does.
"""

import dataclasses

import pytest

from train_ppo import PPOConfig
from train_rm import RMConfig
from train_sl import SLConfig

TRAINING = {"epochs": 1, "batch_size": 64, "lr": 1e-5, "warmup": 10, "adam_eps": 1e-8}
DEFAULTS = {  # of each script; the paper's where it names one
    SLConfig: {
        **TRAINING,
        **{"limit": 0, "helpful_limit": 0, "rounds": 4, "helpful_samples": 2, "temperature": 1.0},
        **{"max_new_tokens": 256, "grad_clip": 1.0, "principles": "random", "style": "plain"},
        **{"keep": "all", "schedule": "constant"},
    },
    RMConfig: {
        **TRAINING,
        **{"limit": 0, "preferences_limit": 0, "candidates": 2, "temperature": 1.0, "thoughts": 1},
        **{"max_new_tokens": 256, "clamp": 0.4, "heldout": 0.1, "grad_clip": 1.0, "principles": 1},
        **{"swap": True, "revision_pairs": 0, "margin": 0.0, "centering": 0.01, "labels": "soft"},
        **{"vote": "mean"},
    },
    PPOConfig: {
        **{"helpful_share": 0.5, "iterations": 60, "episodes": 64, "temperature": 1.0},
        **{"max_new_tokens": 256, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "epochs": 4},
        **{"minibatches": 4, "clip_range": 0.2, "value_clip_range": 0.2, "vf_coef": 0.1},
        **{"lr": 1e-6, "value_lr": 1e-6, "grad_clip": 1.0, "kl_target": 0.0, "kl_horizon": 10000},
        **{"target_kl": 0.1, "missing_eos_penalty": 1.0, "schedule": "constant"},
        **{"kl_estimator": "k1", "adam_eps": 1e-8},
    },
}
LEAST = {"candidates": 2}  # of a count that must not be 0: 1 elsewhere
MOST = {"gamma": 1, "lam": 1, "helpful_share": 1, "heldout": 0.99, "clamp": 0.49}
MODELS = {"model", "policy", "critic", "feedback", "jury", "reward"}
each = pytest.mark.parametrize("kind", DEFAULTS)


@each
def test_the_defaults_are_those_of_the_paper(kind):
    cfg = kind()
    assert {name: getattr(cfg, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]


@each
def test_counts_and_shares_have_their_bounds_and_paths_to_models_are_known(kind):
    fields = {field.name: field.metadata for field in dataclasses.fields(kind)}
    for name, metadata in fields.items():
        least = metadata.get("at_least", 1)  # a number that must be above 0 has a tiny bound
        assert least == LEAST.get(name, 1) or 0 < least < 1e-9
        assert metadata.get("at_most") == MOST.get(name)
        assert metadata.get("model", False) == (name in MODELS)
