"""minicai: Constitutional AI (Bai et al. 2022, arXiv 2212.08073) in plain PyTorch.

The method is the seven files of this folder. They import torch, the standard library and each
other, and nothing from the folders below.

    losses.py           every equation
    prompts.py          a prompt, a dialogue, and each request that is put to a model
    constitution.py     principles
    examples.py         few-shot examples in front of the requests
    critique.py         phase 1: respond, criticise, revise
    feedback.py         phase 2: votes of a feedback model -> a soft label
    rollout.py          batches, the mask, what PPO learns from, what to watch

The folders run it, measure it and show it. Each imports only the method and the folders above it.

    engine/             models, attention, sampler, data, settings, checkpoints, processes
    tinyworld/          the synthetic world of the demo, its base model and its judge
    evaluation/         rates, Elo, agreement: nothing that trains imports it
    report/             summary.json and report.html
    tools/              the demo, the chat, the memory plan, checks of constitutions
    __main__.py         minicai COMMAND

The three stages are scripts beside this folder: train_sl.py, train_rm.py, train_ppo.py. They import
the method and the engine. Larger experiments are single files in examples/.

Where to begin: with the script of one stage, from top to bottom. Its loop is in main, in numbered
steps. Follow a name only when you want its equation (losses.py), its request (prompts.py) or its
data (critique.py, feedback.py). docs/walkthrough.md explains the equations in the order of a run.
The engine can wait: engine/stage.py and engine/sampler.py are the files of it that a script leans
on most.
"""

import os
import sys

__version__ = "0.2.0"


class InputError(ValueError):
    """Something that the user gave is wrong: one sentence that names the file, line or key.

    Commands print it and exit with code 2.
    """


class RunError(RuntimeError):
    """A run cannot continue, although its input is right: one sentence.

    Commands print it and exit with code 1.
    """


# torch's threads spin while they wait, which is slow beside other programs. So they spin shortly,
# unless the user has set how. It must be set before torch is imported (bench/waiting.py).
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"

# Ctrl-C before terminal.run, while a command still imports, is one line too.
sys.excepthook = lambda kind, *rest: (
    sys.exit("interrupted") if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
)
