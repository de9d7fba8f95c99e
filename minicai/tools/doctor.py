"""minicai doctor [--out=DIR]: what this machine has, and what is not installed.

The device and precision that a run takes, free memory, free disk, and the command that installs
each optional package, in a clone. The exit code is 0, whatever is missing.
"""

import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from minicai import __version__
from minicai.engine import config, parallel
from minicai.engine.terminal import plain

OPTIONAL = {  # what for: a package, and what pip installs it by
    "plots in the report": ("matplotlib", "-e '.[report]'"),
    "notebook": ("jupytext", "-e '.[docs]'"),
    "tests": ("pytest", "-e '.[test]'"),
    "tests of adapters": ("peft", "-e '.[peft]'"),
    "comparison with TRL": ("trl", "-e '.[bench]'"),
    "log = tensorboard": ("tensorboard", "tensorboard"),
    "log = wandb": ("wandb", "wandb"),
}


@dataclass
class DoctorOptions:
    """Options."""

    out: str = "."  # where a run will write: the disk to look at


def main(flags: list[str]) -> None:
    """Prints one table: what, and what of it is here."""
    out = Path(config.options(DoctorOptions, flags).out).expanduser().absolute()
    disk = next(place for place in (out, *out.parents) if place.is_dir())
    parallel.setup()
    gpu, bf16 = "none: a run takes the CPU", found("/proc/cpuinfo", "bf16")
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        gpu = f"{torch.cuda.get_device_name()}, {gib(free)} of {gib(whole)} free"
        bf16 = "yes" if parallel.precision() == "bf16" else "no"
    kib = found("/proc/meminfo", r"MemAvailable: +(\d+)")
    rows = {
        "minicai": f"{__version__}, Python {platform.python_version()}",
        "torch": f"{torch.__version__}, transformers {version('transformers')}",
        "GPU": gpu,
        "bf16 in hardware": bf16,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "free memory": gib(int(kib) * 2**10) if kib.isdecimal() else kib,
        "free disk": f"{gib(shutil.disk_usage(disk).free)} at {disk}",
    }
    for use, (package, command) in OPTIONAL.items():
        try:
            rows[use] = f"{package} {version(package)}"
        except PackageNotFoundError:
            rows[use] = f"not installed: pip install {command}"
    for what, here in rows.items():
        print(plain(f"{what:<22}{here}"))


def found(file: str, pattern: str) -> str:
    """What a file of the system says: the group of a pattern, "yes" without one, or "no".

    "unknown" on a system that has no such file.
    """
    try:
        match = re.search(pattern, Path(file).read_text())
    except OSError:
        return "unknown"
    return match.group(match.lastindex or 0).replace(pattern, "yes") if match else "no"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
