"""Shows metrics elsewhere too: in TensorBoard or Weights & Biases (the setting `log`).

`tensorboard` and `wandb` return a function that takes new rows of metrics.jsonl. It sends only
their numbers: no config, command line, code or environment. The file is what counts: a resumed run
forgets its rows after the checkpoint.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from minicai import InputError
from minicai.engine.config import redact


def require(log: str) -> None:
    """Raises InputError where the package that `log` names is not installed."""
    if find_spec(log) is None:
        raise InputError(
            f'log = "{log}" needs a package that is not installed: pip install {log}, or remove log'
        )


def tensorboard(folder: Path) -> Callable:
    """Writes events to folder/tensorboard. A resumed run replaces those of the steps it repeats.

    `tensorboard --logdir OUT` shows the stages side by side.
    """
    writer = None

    def add(rows: list[dict]) -> None:
        nonlocal writer
        from torch.utils.tensorboard import SummaryWriter

        writer = writer or SummaryWriter(folder / "tensorboard", purge_step=rows[0]["step"])
        for row in rows:
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return add


def wandb(folder: Path) -> Callable:
    """Makes a run in the project minicai, named by the stage and grouped by the output folder.

    A resumed stage makes a new run with the steps that are left.
    """
    run = None

    def add(rows: list[dict]) -> None:
        nonlocal run
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        run = run or wandb.init(
            project="minicai",
            group=redact(str(folder.parent)),
            name=folder.name,
            dir=str(folder),
            settings=settings,
            reinit="create_new",
        )
        for row in rows:
            run.log(_numbers(row), step=row["step"])

    return add


def _numbers(row: dict) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
