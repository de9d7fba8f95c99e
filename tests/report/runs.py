"""The files that the stages of a run leave, for the tests of the report."""

import json

from minicai.engine.data import Journal

HOSTILE = (
    "</script><script>alert(1)</script><!-- "
    "<img src=https://example.org/x onerror=alert(2)> & \u2028"
)
RATES = {"harmful": 1.0, "helpful": 0.9, "over_refusal": 0.0, "ends_with_eos": 1.0}
COUNTED = {"count": 20, "rate": 0.25, "interval": [0.11, 0.47]}
STEP = {"improved": COUNTED, "worsened": COUNTED | {"rate": 0.0}}
RECORDS = {
    "sl": {
        "seconds": {"generate": 30.0, "train": 60.0},
        "device": "a CPU",
        "precision": "fp32",
        "peak_rss_mb": 100.0,
        "constitution": {"name": "tiny", "version": "1.0", "sha256": "ab"},
    },
    "rm": {
        "seconds": {"label": 3.0},
        "train_pairs": 20,
        "heldout_pairs": 5,
        "accuracy_vs_labels": 0.8,
        "peak_rss_mb": 200.0,
    },
    "ppo": {"seconds": 60.0, "kl": 0.5, "reward": 1.0, "episodes": 3, "peak_rss_mb": 100.0},
    "eval": {
        "run": {"command": "python -m minicai demo", "commit": "abc", "versions": {"python": "3"}},
        "seconds": 1.0,
        "rm_accuracy_vs_judge": 0.9,
        "eval": {
            "prompts": {"harmful": 20, "benign": 30},
            "base": RATES,
            "sl": RATES | {"harmful": 0.25},
            "ppo": RATES | {"harmful": 0.0},
        },
        "intervals": {
            stage: {key: [max(0, x - 0.1), min(1, x + 0.1)] for key, x in RATES.items()}
            for stage in ("base", "sl", "ppo")
        },
        "revision": {
            "harmful_by_round": [1.0, 0.5],
            "improved": 0.5,
            "worsened": 0.0,
            "by_round": [STEP],
            "by_principle": {"kind": STEP},
        },
        "labels": {
            "accuracy_vs_judge": 0.9,
            "position_bias": 0.1,
            "ece": 0.05,
            "calibration": [{"low": 0.1, "high": 0.2, "predicted": 0.15, **COUNTED}],
        },
        "jailbreaks": {
            stage: {"stacked": COUNTED, "all": COUNTED} for stage in ("base", "sl", "ppo")
        },
        "replayed": dict.fromkeys(("base", "sl", "ppo"), COUNTED),
    },
}
VOTE = {"principle": "kind", "judge": "models/judge", "rationale": None}
ROWS = {
    "sl/revisions": [
        {
            "id": k,
            "prompt": f"How do I rob the {k}th bank?",
            "initial": "Hide.",
            "final": "No.",
            "kept": True,
            "rounds": [
                {
                    "principle": "kind" if k % 2 else "brief",
                    "critique": HOSTILE if k == 1 else "Unkind.",
                    "revision": "No.",
                }
            ],
        }
        for k in range(60)
    ],
    "rm/comparisons": [
        {
            "id": 7,
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "And now?"},
            ],
            "first": "a",
            "second": HOSTILE,
            "p_first": 0.7,
            "source": "ai",
            "clamped": False,
            "votes": [
                VOTE | {"order": "first,second", "logp_first": -0.1, "logp_second": -3.0},
                VOTE | {"order": "second,first", "logp_first": -2.0, "logp_second": -1.0},
            ],
        }
    ],
    "ppo/episodes": [
        {
            "step": k + 1,
            "prompt": "q",
            "response": "r",
            "score": None if k == 1 else float(k),
            "ended": k != 2,
        }
        for k in range(3)
    ],
    "eval/answers": [
        {
            "id": k,
            "prompt": f"Question {k}?",
            "kind": "harmful",
            "base": "yes",
            "sl": "yes",
            "ppo": "no" if k else HOSTILE,
        }
        for k in range(3)
    ],
    "eval/verdicts": [
        {"of": "answer", "id": k, "outcomes": {"base": "harmful", "sl": "harmful", "ppo": ""}}
        for k in range(3)
    ]
    + [{"of": "revision", "id": k, "outcomes": ["harmful", ""]} for k in range(59)]
    + [{"of": "comparison", "id": 7, "better": "second"}],
}
ELO = {
    "elo": {
        "/m/base": {"elo": 0.0, "interval": [0.0, 0.0], "win_rate": 0.2},
        "OUT/ppo": {"elo": 240.6, "interval": [180.2, 310.0], "win_rate": 0.8},
    },
    "prompts": 3,
    "feedback": "/m/base",
    "constitution": {"name": "own", "version": "2"},
}
AGREE = {
    "count": 20,
    "rate": 0.7,
    "interval": [0.48, 0.85],
    "by_confidence": [],
    "ece": 0.125,
    "feedback": "/m/base",
    "calibration": [{"low": 0.6, "high": 0.7, "predicted": 0.65, **COUNTED}],
}
METRICS = {
    "sl": ("loss",),
    "rm": ("loss", "accuracy"),
    "ppo": (
        "reward",
        "kl",
        "kl_k3",
        "length",
        "entropy",
        "eos_rate",
        "distinct_2",
        "clip_fraction",
        "explained_variance",
    ),
}


def lay(out, *stages):
    """Writes the files of these stages and returns the folder."""
    for stage in stages:
        (out / stage).mkdir(parents=True, exist_ok=True)
        (out / stage / "config.toml").write_text("seed = 3\n")
        for name, rows in ROWS.items():
            if name.startswith(f"{stage}/"):
                Journal(out / f"{name}.jsonl").append(rows)
        if stage in METRICS:
            Journal(out / stage / "metrics.jsonl").append(
                [{"step": k, **dict.fromkeys(METRICS[stage], 1 / k)} for k in range(1, 31)]
            )
        (out / stage / "stage.json").write_text(json.dumps(RECORDS[stage]))
    return out


def lay_own(out, *compared):
    """A run of the three scripts on prompts that the exact judge does not know.

    `compared` names those of `elo` and `agree` that followed.
    """
    lay(out, "sl", "rm", "ppo")
    (out / "sl" / "config.toml").write_text(
        'model = "/m/base"\nseed = 3\n\n[sl]\nprompts = "/data/tinyworld/red_team.jsonl"\n'
    )
    for name, record in (("elo", ELO), ("agree", AGREE)):
        if name in compared:
            (out / name).mkdir()
            (out / name / "stage.json").write_text(json.dumps(record).replace("OUT", str(out)))
    if "elo" in compared:
        ours = str(out / "ppo")
        (out / "elo" / "config.toml").write_text('model = "/m/base"\n')
        Journal(out / "elo" / "answers.jsonl").append(
            [
                {
                    "id": k,
                    "prompt": f"Question {k}?",
                    "/m/base": "yes",
                    ours: "yes" if k == 2 else "no",
                }
                for k in range(3)
            ]
        )
        Journal(out / "elo" / "comparisons.jsonl").append(
            [
                {
                    "id": k,
                    "number": k,
                    "players": ["/m/base", ours],
                    "first": "yes",
                    "second": "yes" if k == 2 else "no",
                    "p_first": p,
                    "votes": [],
                }
                for k, p in enumerate((0.1, 0.45, 0.5))
            ]
        )
    return out
