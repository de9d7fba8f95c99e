"""What variants.py measures at each stage.

Each function takes the stage's config, a folder of its own, and the folder of the default's stages.
It returns the numbers, and the folder of the model whose answers are to be
judged ("" where there is none).

The exact judge is reached through minicai.evaluation.rates only, and nothing that it says goes
back into a stage.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import train_ppo
import train_rm
import train_sl
from minicai.critique import hygiene
from minicai.engine import config, parallel
from minicai.engine.data import read_jsonl, read_record
from minicai.engine.sampler import Sampling
from minicai.evaluation import rates as evaluate
from minicai.evaluation.agreement import answer, orders_as
from minicai.evaluation.measures import share
from minicai.feedback import at_a, in_both_orders
from minicai.tools import demo
from minicai.tools.judging import EvalConfig, questions

KINDS = {
    "sl": train_sl.SLConfig,
    "rm": train_rm.RMConfig,
    "ppo": train_ppo.PPOConfig,
    "eval": EvalConfig,
}
JAILBREAKS = 20  # harmful prompts that are asked in each jailbreak phrasing
Found = tuple[dict, str]


def write_data(cfg: train_sl.SLConfig, folder: Path) -> list[dict]:
    """Runs stage 1 without its training, into FOLDER/sl. Returns the rows of revisions.jsonl."""
    train_sl.main(dataclasses.replace(cfg, epochs=0, out=str(folder)))
    return read_jsonl(folder / "sl" / "revisions.jsonl")


def answers(cfg: EvalConfig, model: str) -> dict:
    """The rates of a model's answers to the evaluation prompts, and to jailbreak phrasings."""
    parallel.setup(cfg.device, cfg.precision)
    rows, _, phrased = questions([cfg.prompts], 0, [], JAILBREAKS)
    seeds = [(cfg.seed, k, 0) for k in range(len(rows))]
    seeds += [(cfg.seed, k, 1) for k in range(len(phrased))]
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.rows)
    ended = answer([*rows, *phrased], "answer", model, seeds, sampling)
    found = evaluate.stage_results("answer", rows, ended[: len(rows)], [], phrased)
    broken = {name: one["rate"] for name, one in found["jailbreaks"].items()}
    return found["eval"] | {"jailbroken": broken["all"], "jailbreaks": broken}


def base(cfg: EvalConfig, folder: Path, default: Path) -> Found:
    return {}, cfg.model


def phase_1(cfg: train_sl.SLConfig, folder: Path, default: Path) -> Found:
    """The default's own data, on which most variants train."""
    return {"rows": len(write_data(cfg, folder))}, ""


def revise(cfg: train_sl.SLConfig, folder: Path, default: Path) -> Found:
    """Critiques and revisions: how much harm is left after each round, and the last one's form."""
    return revised(write_data(cfg, folder)), ""


def talk_out(cfg: train_sl.SLConfig, folder: Path, default: Path) -> Found:
    """The same for harmful prompts in jailbreak phrasings; the plain prompt decides what harms."""
    asked = config.load(EvalConfig, "eval", [str(config.builtin("tiny.toml"))])
    _, _, phrased = questions([asked.prompts], 0, [], JAILBREAKS)
    file = folder / "jailbreaks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in phrased), encoding="utf-8")
    rows = write_data(dataclasses.replace(cfg, prompts=str(file)), folder)
    return revised([row | {"prompt": one["asked"]} for row, one in zip(rows, phrased)]), ""


def revised(rows: list[dict]) -> dict:
    final = evaluate.stage_results("final", rows, [True] * len(rows), [], [])["eval"]
    counts, steps = hygiene(rows), evaluate.revision_rates(rows)
    return {key: final[key] for key in ("harmful", "right_refusal", "rude")} | {
        "unchanged": counts["unchanged"] / max(counts["revisions"], 1),
        "hygiene": counts,
        "harmful_by_round": steps["harmful_by_round"],
        "by_principle": {
            name: {change: one["rate"] for change, one in found.items()}
            for name, found in steps["by_principle"].items()
        },
    }


def supervised(cfg: train_sl.SLConfig, folder: Path, default: Path) -> Found:
    return {"examples": train_sl.main(cfg)["examples"]}, str(folder)


def labels(cfg: train_rm.RMConfig, folder: Path, default: Path) -> Found:
    """The default's pairs, labelled again; nothing is trained."""
    (folder / "rm").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(default / "rm" / "pairs.jsonl", folder / "rm" / "pairs.jsonl")
    fixed = {"policy": f"{default}/sl", "preferences": "", "revision_pairs": 0, "epochs": 0}
    train_rm.main(dataclasses.replace(cfg, out=str(folder), **fixed))
    rows = read_jsonl(folder / "rm" / "comparisons.jsonl")
    found = evaluate.label_rates(rows)
    return {
        "accuracy": found["accuracy_vs_judge"],
        "ece": found["ece"],
        "entropy": found["entropy"],
        "undecided": share(row["p_first"] == 0.5 for row in rows),
        "position_bias": found["position_bias"],
        **place_bias(rows),
    }, ""


def place_bias(rows: Sequence[dict]) -> dict[str, float]:
    """What position (A) is worth to a response, over the AI labels of comparisons.jsonl.

    in_votes  = mean_k P(A) - 1/2            over pairs shown in both orders; NaN without any
    in_labels = mean_k p_first_k - truth_k   truth: 1, 1/2, 0 as the judge prefers the first
                                             response, neither, the second

    0 means no bias, 1/2 means that the position decides everything. In one order the first response
    is at (A), and labels have the bias of the votes. Averaged over both orders it cancels: a label
    that says p of (first, second) says 1 - p of (second, first). What is left in in_labels is the
    mean of the other errors.
    """
    rows = [row for row in rows if row["source"] == "ai"]
    orders = [in_both_orders(row["votes"]) for row in rows]
    preferred = evaluate.judged_preferences(rows)
    # sum of the truths = half of all pairs, and +- 1/2 for each pair with a preference
    truth = len(rows) / 2 + sum(0.5 if first else -0.5 for _, first in preferred)
    return {
        "in_votes": share(at_a(*both) - 0.5 for both in orders if both),
        "in_labels": share(row["p_first"] - truth / len(rows) for row in rows),
    }


def reward_model(cfg: train_rm.RMConfig, folder: Path, default: Path) -> Found:
    """Accuracy on the pairs that the default kept from training.

    No variant trains on their prompts: they are chosen by prompt and seed.
    """
    found = {"train_pairs": train_rm.main(cfg)["train_pairs"]}
    heldout = set(map(str, read_record(default / "rm" / "stage.json")["heldout_ids"]))
    pairs = read_jsonl(default / "rm" / "comparisons.jsonl")
    pairs = [row for row in pairs if str(row["id"]) in heldout]
    for name, sources in (("harm_accuracy", ("ai", "critique")), ("help_accuracy", ("human",))):
        judged = evaluate.judged_preferences([row for row in pairs if row["source"] in sources])
        found[name] = share(orders_as(str(folder), judged, cfg.micro_tokens))
    return found, ""


def policy(cfg: train_ppo.PPOConfig, folder: Path, default: Path) -> Found:
    record = train_ppo.main(cfg)
    hacking = evaluate.reward_hacking(
        read_jsonl(folder / "episodes.jsonl"), read_jsonl(folder / "metrics.jsonl")
    )
    hacked = float(bool(hacking["warning"]))
    return {"kl": record["kl"], "reward": record["reward"], "hacked": hacked}, str(folder)


def whole_run(words: list[str], folder: Path, default: Path) -> Found:
    """The demo from end to end."""
    demo.main(words)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    hacked = float(bool(summary["hacking"]["warning"]))
    found = {key: summary["ppo"][key] for key in ("kl", "reward")}
    return found | {"hacked": hacked}, f"{folder}/ppo"
