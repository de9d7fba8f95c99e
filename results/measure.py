"""The measurements of variants.py, one function per stage.

Each takes the stage's config, a folder for its output, and the folder of the default's stages. It
returns the numbers that it measured, and the folder of the model whose answers are to be judged, or
"" for no model.

The exact judge is used only through minicai.evaluation.rates, and no stage reads its verdicts.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import train_ppo
import train_rm
import train_sl
from minicai import __main__ as commands
from minicai import constitution
from minicai.critique import hygiene
from minicai.engine import config, parallel
from minicai.engine.data import read_jsonl, read_prompts
from minicai.engine.models import load_policy, load_scorer, load_tokenizer
from minicai.engine.sampler import respond
from minicai.evaluation import rates as evaluate
from minicai.evaluation.jailbreaks import jailbreaks
from minicai.examples import load_comparisons, load_examples
from minicai.prompts import Prompt, as_turns
from minicai.tools import phases

KINDS = {
    "sl": train_sl.SLConfig,
    "rm": train_rm.RMConfig,
    "ppo": train_ppo.PPOConfig,
    "eval": commands.EvalConfig,
}
Found = tuple[dict, str]


def write_data(cfg: train_sl.SLConfig, folder: Path, prompts: Sequence[Prompt] = ()) -> list[dict]:
    """Writes or completes the data of stage 1 in `folder`: revisions.jsonl and helpful.jsonl.

    `prompts` replace the prompts of the config. Returns the rows of revisions.jsonl.
    """
    device, precision = parallel.setup(cfg.device, cfg.precision)
    prompts, harmless = (
        prompts or read_prompts(cfg.prompts)[: cfg.limit or None],
        read_prompts(cfg.helpful_prompts)[: cfg.helpful_limit or None],
    )
    return train_sl.write_data(
        cfg,
        constitution.load(cfg.constitution),
        load_examples(cfg.examples) if cfg.examples else (),
        prompts,
        harmless,
        load_policy(cfg.model, device, precision),
        load_tokenizer(cfg.model),
        device,
        precision,
        folder,
    )[0]


def questions(cfg: commands.EvalConfig) -> tuple[list[dict], list[dict]]:
    """The evaluation prompts with their kinds, and 20 harmful ones in each jailbreak phrasing."""
    rows = [
        {"prompt": prompt, "kind": row["kind"]}
        for prompt, row in zip(read_prompts(cfg.prompts), read_jsonl(cfg.prompts))
    ]
    harmful, benign = (
        [row["prompt"] for row in rows if row["kind"] == kind] for kind in ("harmful", "benign")
    )
    return rows, jailbreaks(harmful[:20], benign)


def answers(cfg: commands.EvalConfig, model: str) -> dict:
    """The rates of a model's answers to these questions, as `minicai eval` computes them."""
    device, precision = parallel.setup(cfg.device, cfg.precision)
    tokenizer, policy = load_tokenizer(model), load_policy(model, device, precision)
    rows, phrased = questions(cfg)
    ends = []
    for turn, asked in enumerate((rows, phrased)):
        with parallel.autocast(device, precision):
            texts, ended = respond(
                policy,
                tokenizer,
                [as_turns(row["prompt"]) for row in asked],
                [(commands.STREAM, cfg.seed, k, turn) for k in range(len(asked))],
                max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                rows=cfg.rows,
            )
        ends.append(ended)
        for row, text in zip(asked, texts):
            row["answer"] = text
    found = evaluate.stage_results("answer", rows, ends[0], [], phrased)
    return found["eval"] | {
        "jailbroken": found["jailbreaks"]["all"]["rate"],
        "jailbreaks": {name: one["rate"] for name, one in found["jailbreaks"].items()},
    }


def base(cfg: commands.EvalConfig, folder: Path, default: Path) -> Found:
    return {}, cfg.model


def phase_1(cfg: train_sl.SLConfig, folder: Path, default: Path) -> Found:
    """Writes the default's own data, on which most variants train."""
    return {"rows": len(write_data(cfg, folder))}, ""


def revise(cfg: train_sl.SLConfig, folder: Path, default: Path) -> Found:
    """Critiques and revisions: the rate of harm per round, and rates of the last revision."""
    return revised(write_data(cfg, folder)), ""


def talk_out(cfg: train_sl.SLConfig, folder: Path, default: Path) -> Found:
    """The same for harmful prompts in jailbreak phrasings, judged by the plain prompt."""
    _, phrased = questions(
        config.load(commands.EvalConfig, "eval", [str(config.builtin("tiny.toml"))])
    )
    rows = write_data(cfg, folder, [one["prompt"] for one in phrased])
    return revised([row | {"prompt": one["asked"]} for row, one in zip(rows, phrased)]), ""


def revised(rows: list[dict]) -> dict:
    final = evaluate.stage_results("final", rows, [], [], [])["eval"]
    counts, steps = hygiene(rows), evaluate.revision_steps(rows)["by_principle"]
    return {key: final[key] for key in ("harmful", "right_refusal", "rude")} | {
        "unchanged": counts["unchanged"] / max(counts["revisions"], 1),
        "hygiene": counts,
        "harmful_by_round": evaluate.revision_rates(rows)["harmful_by_round"],
        "by_principle": {
            name: {change: one["rate"] for change, one in found.items()}
            for name, found in steps.items()
        },
    }


def supervised(cfg: train_sl.SLConfig, folder: Path, default: Path) -> Found:
    return {"examples": train_sl.main(cfg)["examples"]}, str(folder)


def labels(cfg: train_rm.RMConfig, folder: Path, default: Path) -> Found:
    """Labels the default's pairs again."""
    device, precision = parallel.setup(cfg.device, cfg.precision)
    rules, path = constitution.load(cfg.constitution), cfg.feedback or cfg.model
    phases.check_rm_settings(cfg, rules)
    examples = (
        load_comparisons(cfg.examples, cfg.labels == "chain_of_thought") if cfg.examples else ()
    )
    rows = train_rm.label(
        cfg,
        rules,
        examples,
        read_jsonl(default / "rm" / "pairs.jsonl"),
        [],
        path,
        load_tokenizer(path),
        device,
        precision,
        folder,
    )
    rates = evaluate.label_rates(rows)
    return {
        "accuracy": rates["accuracy_vs_judge"],
        "ece": evaluate.label_agreement(rows)["ece"],
        "entropy": rates["entropy"],
        "undecided": evaluate.share(row["p_first"] == 0.5 for row in rows),
        "position_bias": rates["position_bias"],
        **evaluate.place_bias(rows),
    }, ""


def reward_model(cfg: train_rm.RMConfig, folder: Path, default: Path) -> Found:
    """Accuracy on the pairs that the default held out.

    They are chosen by prompt and seed, so no variant trains on their prompts.
    """
    found = {"train_pairs": train_rm.main(cfg)["train_pairs"]}
    device, precision = parallel.setup(cfg.device, cfg.precision)
    tokenizer = load_tokenizer(str(folder))
    model = load_scorer(str(folder), device, tokenizer.pad_token_id)
    heldout = set(
        map(
            str,
            json.loads((default / "rm" / "stage.json").read_text(encoding="utf-8"))["heldout_ids"],
        )
    )
    pairs = [
        row for row in read_jsonl(default / "rm" / "comparisons.jsonl") if str(row["id"]) in heldout
    ]
    for name, sources in (("harm_accuracy", ("ai", "critique")), ("help_accuracy", ("human",))):
        judged = evaluate.judged_preferences([row for row in pairs if row["source"] in sources])
        scores = train_rm.score_pairs(
            [row for row, _ in judged], model, tokenizer, device, precision
        )
        found[name] = evaluate.share((a > b) == first for a, b, (_, first) in zip(*scores, judged))
    return found, ""


def policy(cfg: train_ppo.PPOConfig, folder: Path, default: Path) -> Found:
    record = train_ppo.main(cfg)
    hacking = evaluate.reward_hacking(
        read_jsonl(folder / "episodes.jsonl"), read_jsonl(folder / "metrics.jsonl")
    )
    return {
        "kl": record["kl"],
        "reward": record["reward"],
        "hacked": float(bool(hacking["warning"])),
    }, str(folder)


def whole_run(words: list[str], folder: Path, default: Path) -> Found:
    """The demo from end to end."""
    commands.demo(words)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {key: summary["ppo"][key] for key in ("kl", "reward")} | {
        "hacked": float(bool(summary["hacking"]["warning"]))
    }, str(folder / "ppo")
