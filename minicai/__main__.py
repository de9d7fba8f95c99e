"""python -m minicai COMMAND        (COMMAND --help: its keys)

demo [--out=DIR] [--seed=N] [--config=FILE] [--overwrite]   Constitutional AI from end to end on the embedded tiny world:
                            SL-CAI, reward model, PPO, evaluation, report. No network, no download. Again: goes on, or says that it is done.
eval CONFIG [--key=value]   judges the models in the config's output folder on prompts that no training stage saw
elo CONFIG MODEL MODEL ...  Elo of any model folders by answers to the config's [eval] prompts, compared by its feedback model in both orders
agree CONFIG FILE           agreement of AI labels with a file of human preferences, by confidence and with their calibration
choices MODEL FILE          accuracy on a multiple-choice file ("prompt", "corrects", "incorrects"), by log-prob
report DIR [--watch]        writes DIR/report.html and, of a finished run, DIR/summary.json from what the run left in DIR;
                            --watch: again and again while it trains, for a browser to follow
plan CONFIG [--processes=N] memory of each stage, GiB per process: nothing is loaded or written
constitution ACTION         new, check, try, diff: write a constitution, and see what it does before you train on it
chat MODEL                  talk to a model, or to two of them side by side; have them criticise and revise what they said
"""

import difflib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from minicai import InputError
from minicai.engine import config, terminal

COMMANDS = ("demo", "eval", "elo", "agree", "choices", "report", "plan", "constitution", "chat")
STREAM = 4  # keeps the random numbers of evaluation apart from those of the stages


@dataclass
class EvalConfig(config.Run):
    """[eval] in the config file."""

    prompts: str = config.path_field(
        "minicai:tinyworld/data/eval.jsonl"
    )  # {"prompt", "kind"}: harmful or benign
    failures: tuple[str, ...] = config.path_field(
        ("minicai:tinyworld/failures.jsonl",)
    )  # lines {"prompt", "failure"} to ask again; "" = none
    jailbreaks: int = 0  # use the first so many harmful prompts in each jailbreak phrasing as well
    limit: int = 0  # use the first so many prompts, or pairs of agree; 0 = all
    feedback: str = config.path_field()  # who compares in elo and agree: "" = the base model
    temperature: float = 1.0  # as in training; 0 = greedy
    max_new_tokens: int = 256  # length limit of a response
    rows: int = 256  # sequences decoded side by side; memory, not results


def demo(arguments: list[str]) -> None:
    """The main job: every stage in order, then a table, three examples and the paths of what was written."""
    options = dict(a.removeprefix("--").partition("=")[::2] for a in _joined(arguments))
    path = options.pop("config", "") or str(config.builtin("tiny.toml"))
    flags = [path] + [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]
    import train_ppo
    import train_rm
    import train_sl
    from minicai.engine.data import read_prompts
    from minicai.evaluation.rates import require_known

    evaluation = config.load(EvalConfig, "eval", flags)
    out, policy, earlier, stages = Path(evaluation.out), "", [], []
    if not terminal.hushed():
        print(f"model   {evaluation.model}\noutput  {out.resolve()}", flush=True)
    for turn in range(1, evaluation.alternate + 1):
        here = out if turn == evaluation.alternate else out / f"round{turn}"
        # A later round's policy seldom does harm, so that its own answers teach no more what harm is: the comparisons of the rounds before do.
        own = [
            *flags,
            f"--out={here}",
            *([f"--sl.policy={policy}", f"--rm.earlier={json.dumps(earlier)}"] if policy else []),
        ]
        stages += [
            (train_sl, config.load(train_sl.SLConfig, "sl", own)),
            (train_rm, config.load(train_rm.RMConfig, "rm", own)),
            (train_ppo, config.load(train_ppo.PPOConfig, "ppo", own)),
        ]
        policy, earlier = (
            str(here / "ppo"),
            [str(here / "rm" / "comparisons.jsonl")],
        )  # which holds those of the rounds before
    require_known(
        [{"prompt": prompt} for prompt in read_prompts(stages[0][1].prompts)[:1]],
        stages[0][1].prompts,
    )
    for (
        module,
        cfg,
    ) in stages:  # each stage resumes, or says that it is finished; --overwrite makes the later ones start anew as well
        module.main(cfg)
    evaluate(evaluation, "python -m minicai demo " + " ".join(arguments))
    if not (out / "summary.json").exists() or evaluation.overwrite:
        _report(out)
    print(_closing(out))


def evaluate(cfg: EvalConfig, command: str) -> None:
    """Answers of base, sl and ppo to the evaluation prompts, judged; and the labels, reward model and revisions, judged likewise. Past failures are
    asked again, and harmful prompts in jailbreak phrasings; what fails now is in failures.jsonl, in the form of `failures`."""
    from minicai.engine import checkpoint, parallel
    from minicai.engine.audit import models_record, weights_sha256
    from minicai.engine.data import disk_full_guard, read_jsonl, read_prompts
    from minicai.engine.models import load_policy, load_tokenizer
    from minicai.engine.sampler import respond
    from minicai.evaluation import rates as judged
    from minicai.evaluation.agreement import write_rows
    from minicai.evaluation.jailbreaks import jailbreaks
    from minicai.prompts import as_turns
    from minicai.report import summary as report

    device, precision = parallel.setup(cfg.device, cfg.precision)
    asked = list(zip(read_prompts(cfg.prompts), read_jsonl(cfg.prompts)))[: cfg.limit or None]
    answers = [
        {"id": k, "prompt": prompt, "kind": row.get("kind")}
        for k, (prompt, row) in enumerate(asked)
    ]
    past = [
        {**row, "prompt": prompt}
        for path in cfg.failures
        for row, prompt in zip(read_jsonl(path), read_prompts(path))
    ]
    judged.require_known(answers, cfg.prompts)
    judged.require_known(past, ", ".join(cfg.failures))
    harmful, benign = (
        [row["prompt"] for row in answers if row["kind"] == kind] for kind in ("harmful", "benign")
    )
    phrased = jailbreaks(harmful[: cfg.jailbreaks], benign)
    out, began = Path(cfg.out), time.monotonic()
    base, folder = checkpoint.require_folder(cfg.model, "model"), out / "eval"
    made_from = {
        stage: checkpoint.fingerprint(str(checkpoint.require_folder(str(out / stage), stage)))
        for stage in ("sl", "rm", "ppo")
    }
    comparisons, revisions = (
        judged.require_known(read_jsonl(out / file), out / file)
        for file in ("rm/comparisons.jsonl", "sl/revisions.jsonl")
    )
    if checkpoint.open_stage(folder, config.dump(cfg, "eval", made_from), cfg.overwrite):
        return print(f"{folder}: finished already; --overwrite starts anew")
    (out / "base").mkdir(exist_ok=True)
    for file in filter(Path.is_file, base.iterdir()):
        with disk_full_guard(out / "base"):
            shutil.copyfile(file, out / "base" / file.name)

    results = {}
    for stage in ("base", "sl", "ppo"):
        tokenizer, model, ended = (
            load_tokenizer(str(out / stage)),
            load_policy(str(out / stage), device),
            [],
        )
        with (
            terminal.Progress(f"eval: {stage}", len(answers), "prompts") as progress,
            parallel.autocast(device, precision),
        ):
            for turn, rows in enumerate((answers, past + phrased)):
                seeds = [(STREAM, cfg.seed, k, turn) for k in range(len(rows))]
                texts, ends = respond(
                    model,
                    tokenizer,
                    [as_turns(row["prompt"]) for row in rows],
                    seeds,
                    max_new_tokens=cfg.max_new_tokens,
                    temperature=cfg.temperature,
                    rows=cfg.rows,
                    progress=None if turn else progress,
                )
                ended.append(ends)
                for row, text in zip(rows, texts):
                    row[stage] = text
        results[stage] = judged.stage_results(stage, answers, ended[0], past, phrased)

    agree = _reward_model_agrees(out / "rm", comparisons, device, precision)
    hacking = judged.reward_hacking(
        read_jsonl(out / "ppo" / "episodes.jsonl"), read_jsonl(out / "ppo" / "metrics.jsonl")
    )
    if hacking["warning"]:
        terminal.warn(f"{out / 'ppo'}: {hacking['warning']}")
    failures = judged.failures(answers, "ppo", weights_sha256(out / "ppo"), cfg.seed)
    verdicts = judged.verdicts(answers, results, revisions, comparisons)
    for name, rows in {
        "answers": answers,
        "replayed": past,
        "jailbreaks": phrased,
        "failures": failures,
        "verdicts": verdicts,
    }.items():
        write_rows(folder / f"{name}.jsonl", rows)
    checkpoint.finish_stage(
        folder,
        {
            "run": report.provenance(command),
            **{
                key: {stage: found[key] for stage, found in results.items()}
                for key in results["base"]
            },
            "eval": {
                "prompts": {"harmful": len(harmful), "benign": len(benign)},
                **{stage: found["eval"] for stage, found in results.items()},
            },
            "revision": judged.revision_rates(revisions) | judged.revision_steps(revisions),
            "labels": judged.label_rates(comparisons) | judged.label_agreement(comparisons),
            "rm_accuracy_vs_judge": judged.share(agree),
            "rm_judged_pairs": len(agree),
            "hacking": hacking,
            "models": models_record(str(out / stage) for stage in results),
            "seconds": time.monotonic() - began,
        },
    )


def _reward_model_agrees(
    folder: Path, comparisons: list[dict], device, precision: str
) -> list[bool]:
    """For each held-out pair between which the judge has a preference, whether the reward model has the same."""
    from minicai.engine.data import read_record
    from minicai.engine.models import load_scorer, load_tokenizer
    from minicai.evaluation import rates as judged
    from train_rm import score_pairs

    heldout = set(map(str, read_record(folder / "stage.json")["heldout_ids"]))
    preferences, tokenizer = (
        judged.judged_preferences([row for row in comparisons if str(row["id"]) in heldout]),
        load_tokenizer(str(folder)),
    )
    scores = score_pairs(
        [row for row, _ in preferences],
        load_scorer(str(folder), device, tokenizer.pad_token_id),
        tokenizer,
        device,
        precision,
    )
    return [(a > b) == first for a, b, (_, first) in zip(*scores, preferences)]


def _report(out: Path) -> None:
    from minicai.report import page as report

    report.write(out, report.summarise(out))


def _closing(out: Path) -> str:
    """The table, the example answers and the paths that end the demo."""
    from minicai.engine.data import read_jsonl
    from minicai.report import summary as report

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    answers = read_jsonl(out / "eval" / "answers.jsonl")
    examples = [row for row in answers if row["kind"] == "harmful"][:2] + [
        row for row in answers if row["kind"] == "benign"
    ][:1]
    names = {"base": "base", "sl": "SL-CAI", "ppo": "RL-CAI"}
    lines = ["", report.headline(summary), ""]
    for row in examples:
        lines += (
            [f"Human: {row['prompt']}"]
            + [f"  {name:<7} {terminal.plain(row[stage])}" for stage, name in names.items()]
            + [""]
        )
    written = [
        out / name
        for name in (
            "report.html",
            "summary.json",
            "sl/revisions.jsonl",
            "rm/comparisons.jsonl",
            "ppo",
        )
    ]
    return "\n".join(
        lines
        + [f"wrote  {path}" for path in written]
        + [f"talk   python -m minicai chat {out / 'ppo'} --against={out / 'base'}"]
    )


def contest(name: str, arguments: list[str]) -> None:
    """elo CONFIG MODEL MODEL ... or agree CONFIG FILE: runs it into OUT/elo or OUT/agree, or says that it is done, and prints the result."""
    from minicai import constitution
    from minicai.engine import checkpoint, parallel
    from minicai.engine.audit import weights_sha256
    from minicai.engine.data import read_preferences, read_prompts
    from minicai.evaluation import agreement as compare
    from minicai.report.summary import number

    words = [a for a in arguments if not a.startswith("--")]
    if name == "elo" and (len(words) < 3 or len(set(words)) < len(words)):
        raise InputError(
            "elo: expected a config and two or more different model folders, for example: "
            "python -m minicai elo configs/tiny.toml out/tiny/sl out/tiny/ppo"
        )
    if name == "agree" and len(words) != 2:
        raise InputError(
            "agree: expected a config and one file of preferences, for example: "
            "python -m minicai agree configs/tiny.toml human.jsonl.gz"
        )
    cfg = config.load(EvalConfig, "eval", words[:1] + [a for a in arguments if a.startswith("--")])
    device, precision = parallel.setup(cfg.device, cfg.precision)
    rules, feedback, folder = (
        constitution.load(cfg.constitution),
        cfg.feedback or cfg.model,
        Path(cfg.out) / name,
    )
    models = [*(words[1:] if name == "elo" else []), feedback]
    for model in models:
        checkpoint.require_folder(model, name)
    rules.usable("comparison")
    asked = (read_prompts(cfg.prompts) if name == "elo" else read_preferences(words[1]))[
        : cfg.limit or None
    ]
    made_from = {
        "constitution": rules.sha256,
        "models": ", ".join(f"{model} {weights_sha256(model)[:12]}" for model in models),
    }
    made_from |= {"file": words[1]} if name == "agree" else {}
    record = checkpoint.open_stage(folder, config.dump(cfg, "eval", made_from), cfg.overwrite)
    if record:
        print(f"{folder}: finished already; --overwrite starts anew")
    elif name == "elo":
        record = compare.rate(
            models[:-1],
            asked,
            feedback,
            rules,
            folder,
            seeds=[(STREAM, cfg.seed, k, 0) for k in range(len(asked))],
            seed=cfg.seed,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            rows=cfg.rows,
            device=device,
            precision=precision,
        )
        checkpoint.finish_stage(folder, record)
    else:
        record = compare.agree(
            asked,
            feedback,
            rules,
            folder,
            seed=cfg.seed,
            rows=cfg.rows,
            device=device,
            precision=precision,
        )
        checkpoint.finish_stage(folder, record)
    if name == "elo":
        rows = [
            [m, *(f"{x:.0f}" for x in (r["elo"], *r["interval"])), number(r["win_rate"])]
            for m, r in record["elo"].items()
        ]
        print(terminal.table(["model", "Elo", "low", "high", "win rate"], rows))
    else:
        parts = [
            ("all", record),
            *((f"{p['low']:.1f}-{p['high']:.1f} sure", p) for p in record["by_confidence"]),
        ]
        rows = [
            [label, str(p["count"]), *map(number, (p["rate"], *p["interval"]))]
            for label, p in parts
        ]
        print(
            terminal.table(["agreement", "pairs", "rate", "low", "high"], rows)
            + f"\nexpected calibration error {number(record['ece'])}"
        )
    print(f"wrote  {folder}")


def choices(arguments: list[str]) -> None:
    """Prints the accuracy of a model on a multiple-choice file."""
    if len(arguments) != 2:
        raise InputError(
            "choices: expected a model folder and a file, for example: python -m minicai choices out/tiny/ppo hhh.jsonl"
        )
    from minicai.engine import checkpoint, parallel
    from minicai.evaluation import agreement as compare
    from minicai.evaluation.choices import read_choices
    from minicai.report.summary import number

    checkpoint.require_folder(arguments[0], "choices")
    items, (device, precision) = read_choices(arguments[1]), parallel.setup("auto", "auto")
    found = compare.choose(arguments[0], items, rows=64, device=device, precision=precision)
    low, high = found["interval"]
    print(
        f"accuracy {number(found['rate'])} ({number(low)}–{number(high)}) of {found['count']} items; "
        f"mean probability of the correct options {number(found['p_correct'])}"
    )


def _joined(arguments: list[str]) -> list[str]:
    """`--out DIR` as `--out=DIR`."""
    words, flags = config.split(arguments)
    if words:
        raise InputError(
            f"demo: unexpected {words[0]!r}; write --config {words[0]} to use another config"
        )
    return flags


def usage(arguments: list[str]) -> str:
    """What --help prints: of the command that is named, with its keys, or of all commands."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command == "constitution":
        from minicai.tools import constitution as workshop

        return config.usage(workshop.__doc__, workshop.TryConfig)
    if command == "chat":
        from minicai.tools import chat

        return config.usage(chat.__doc__, chat.ChatOptions)
    own = re.search(rf"(?m)^  {command} .*(\n {{6,}}.*)*", __doc__) if command else None
    if not own:
        return f"{__doc__.rstrip()}\n\n--quiet: results and errors alone"
    if command in ("choices", "plan", "report"):
        return f"python -m minicai {own[0].strip()}"
    others = (
        "\n\nFurther keys of the stages, as --sl.rounds=2: python train_sl.py --help, train_rm.py, train_ppo.py"
        * (command == "demo")
    )
    return config.usage(f"python -m minicai {own[0].strip()}{others}", EvalConfig)


def main(arguments: list[str]) -> None:
    """Runs the command that the first argument names. Raises InputError where there is no such command."""
    command, *rest = arguments or [""]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "python -m minicai is one process; torchrun is for train_sl.py, train_rm.py and train_ppo.py"
        )
    if any(argument.partition("=")[0] == "--plan" for argument in rest):
        raise InputError(
            "--plan: use python -m minicai plan CONFIG, which plans all three stages"
        )
    if command == "demo":
        demo(rest)
    elif command == "eval":
        from minicai.report import summary as report

        evaluate(
            cfg := config.load(EvalConfig, "eval", rest), "python -m minicai eval " + " ".join(rest)
        )
        print(report.rated(Path(cfg.out)))
    elif command == "report":
        folders = [argument for argument in rest if argument != "--watch"]
        if len(folders) != 1 or not Path(folders[0]).is_dir():
            raise InputError(
                "report: expected the output folder of a run, for example: python -m minicai report out/tiny [--watch]"
            )
        from minicai.report import page as report

        (report.watch if "--watch" in rest else report.draw)(Path(folders[0]))
    elif command in ("elo", "agree"):
        contest(command, rest)
    elif command == "choices":
        choices(rest)
    elif command == "plan":
        from minicai.tools import plan

        plan.main(rest)
    elif command == "constitution":
        from minicai.tools import constitution as workshop

        workshop.main(rest)
    elif command == "chat":
        from minicai.tools import chat

        chat.main(rest)
    else:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        raise InputError(
            (f"unknown command {command!r}" if command else "no command given")
            + (
                f"; did you mean {near[0]}?"
                if near
                else f"; known: {', '.join(COMMANDS)} (see python -m minicai --help)"
            )
        )


if __name__ == "__main__":
    terminal.run(main, usage)
