"""Metrics shown elsewhere too: each row of a stage's metrics.jsonl, as it is written, in TensorBoard or Weights & Biases (config field `log`).

Rows alone go there, no config, command line, code or environment. The file stays what counts: a resumed run forgets rows behind its checkpoint.
"""

from collections.abc import Callable
from pathlib import Path

from minicai import InputError
from minicai.engine.config import redact

_chosen: dict[Path, str] = {}  # by the stage's folder


def require(log: str) -> None:
    """Raises InputError where the package that `log` names is not installed; "" needs none."""
    try:
        if log == "tensorboard":
            import tensorboard  # noqa: F401
        if log == "wandb":
            import wandb  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'log = "{log}" needs a package that is not installed ({error}): pip install {log}, or leave log empty'
        ) from error


def choose(log: str, folder: Path) -> None:
    """Says where the rows of the stage in `folder` go, which is about to begin."""
    _chosen[folder] = log


def opened(path: Path) -> Callable[[list[dict]], None] | None:
    """What takes the new rows of a journal; None for all but the metrics.jsonl of a stage that has chosen one."""
    log = _chosen.get(path.parent, "") if path.name == "metrics.jsonl" else ""
    return {"tensorboard": _tensorboard, "wandb": _wandb}[log](path.parent) if log else None


def _numbers(row: dict) -> dict[str, float]:
    return {
        key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)
    }


def _tensorboard(folder: Path) -> Callable[[list[dict]], None]:
    """Events in folder/tensorboard: `tensorboard --logdir OUT` shows the stages side by side. Those that a resumed run makes anew are purged."""
    writer = None

    def add(rows: list[dict]) -> None:
        nonlocal writer
        from torch.utils.tensorboard import SummaryWriter

        if writer is None and rows:
            writer = SummaryWriter(folder / "tensorboard", purge_step=rows[0]["step"])
        for row in rows:
            for key, value in _numbers(row).items():
                writer.add_scalar(key, value, row["step"])
        if writer:
            writer.flush()

    return add


def _wandb(folder: Path) -> Callable[[list[dict]], None]:
    """A run named by the stage in project minicai, grouped by the output folder; a resumed stage is a new run there, with the steps that are left."""
    run = None

    def add(rows: list[dict]) -> None:
        nonlocal run
        import wandb

        if run is None and rows:
            quiet = wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            )
            run = wandb.init(
                project="minicai",
                group=redact(str(folder.parent)),
                name=folder.name,
                dir=str(folder),
                settings=quiet,
                reinit="create_new",
            )
        for row in rows:
            run.log(_numbers(row), step=row["step"])

    return add
