"""minicai COMMAND, or python -m minicai COMMAND

  demo [--key=value]         Constitutional AI from end to end, on the embedded
                             tiny world: SL-CAI, reward model, PPO, evaluation,
                             report; no network
  eval CONFIG                judge the models in the config's output folder on
                             prompts that no training stage saw
  elo CONFIG MODEL MODEL ... Elo of any model folders, by a feedback model
  agree CONFIG FILE          agreement of AI labels with human preferences
  choices MODEL FILE         accuracy on a multiple-choice file, by log-prob
  report DIR [--watch]       write DIR/report.html, and DIR/summary.json of a
                             finished run
  report DIR OTHER           write DIR/compare.html: two runs side by side
  plan CONFIG                the memory of each stage; loads no weights
  data FILE [--model=MODEL]  what prompts or pairs a file holds: docs/data.md
  constitution ACTION        new, import, check, try, diff: write one, and see
                             what it does
  chat MODEL                 talk to a model, or to two of them side by side
  doctor                     what this machine has: torch, GPU, memory, disk

minicai COMMAND --help prints the settings of a command. --version prints the
version. --quiet prints only results and errors. Run the same command again to
resume it.
"""

import importlib
import inspect
import os
import sys

from minicai import InputError, __version__
from minicai.engine import config, terminal

COMMANDS = {  # name: where its function is, the options that --help lists, their section
    "demo": ("tools.demo", "main", "EvalConfig", "eval"),
    "eval": ("tools.demo", "evaluate", "EvalConfig", "eval"),
    "elo": ("tools.judging", "elo", "EvalConfig", "eval"),
    "agree": ("tools.judging", "agree", "EvalConfig", "eval"),
    "choices": ("tools.judging", "choices", "ChoicesOptions", ""),
    "report": ("tools.demo", "report", "ReportOptions", ""),
    "plan": ("tools.plan", "main", "", ""),
    "data": ("tools.data", "main", "DataOptions", ""),
    "constitution": ("tools.constitution", "main", "TryConfig", "try"),
    "chat": ("tools.chat", "main", "ChatOptions", ""),
    "doctor": ("tools.doctor", "main", "DoctorOptions", ""),
}
TRAIN = "gradient_checkpointing lora_rank lora_alpha lora_targets save_every alternate log timeout "
UNUSED = {  # settings that a command's config may have, and that it does not use
    "demo": "feedback timeout",
    "eval": TRAIN + "constitution skip_bad skip_long feedback",
    "elo": TRAIN + "micro_tokens skip_long failures jailbreaks",
    "agree": TRAIN
    + "micro_tokens prompts helpful_prompts failures jailbreaks temperature max_new_tokens",
    "constitution": TRAIN + "constitution micro_tokens skip_long",
}


def usage(arguments: list[str]) -> str:
    """The text of --help: of the command that is named, with its keys, or of all commands."""
    words, flags = config.split(arguments)
    if not words or words[0] not in COMMANDS:
        return __doc__
    place, function, options, section = COMMANDS[words[0]]
    module = importlib.import_module(f"minicai.{place}")
    text = module.__doc__ if function == "main" else inspect.getdoc(getattr(module, function))
    found = [*words[1:2], *flags] if section else []
    if section and function == "main":  # these take a config file as --config=FILE only
        found = config.with_config(flags)
    unused = UNUSED.get(words[0], "").split()
    return config.usage(text, getattr(module, options), section, found, unused) if options else text


def main(arguments: list[str]) -> None:
    """Runs the command that the first argument names. Raises InputError where there is none."""
    name, *rest = arguments or [""]
    if name == "--version":
        print(f"minicai {__version__}")
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "minicai is one process; torchrun is for train_sl.py, train_rm.py and train_ppo.py"
        )
    if not name:
        raise InputError("expected a command; minicai --help lists them")
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{config.nearest(name, COMMANDS)}")
    place, function, *_ = COMMANDS[name]
    if name == "chat" and sys.stderr.isatty():  # torch is imported next, which takes seconds
        terminal.say("loading ...")
    config.call(name, getattr(importlib.import_module(f"minicai.{place}"), function), rest)


def command() -> None:
    """`minicai`, the same as `python -m minicai`."""
    terminal.run(main, usage)


if __name__ == "__main__":
    command()
