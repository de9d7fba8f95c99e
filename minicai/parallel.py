"""The machine underneath: device, precision, memory allocator.

Precision follows the usual recipe: weights, optimizer state and log-probs in float32; under "bf16" the forward and backward passes run in
autocast. "auto" takes bf16 only where the hardware multiplies it fast: without such units it is up to a hundred times slower than float32.
"""

import ctypes
import os
import platform
import resource

import torch

from minicai import InputError


def setup(device: str, precision: str) -> tuple[torch.device, str]:
    """Resolves "auto", prepares the process, returns the device and "fp32" or "bf16". Raises InputError on what is not to be had."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, not {device!r}")
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"precision must be auto, fp32 or bf16, not {precision!r}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("this version trains in one process: start the script with python, not torchrun")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: no CUDA device is available here; use --device=cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device == "cpu":
        _keep_freed_memory()
    return torch.device(device), precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _keep_freed_memory() -> None:
    """glibc gives each large block back to the kernel and faults it in anew, page by page: a third of a CPU training step."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc, m_trim_threshold, m_top_pad, m_mmap_threshold = ctypes.CDLL("libc.so.6"), -1, -2, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 64 << 20)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if platform.system() == "Darwin" else 1024)
