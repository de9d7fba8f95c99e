"""The machine: device, precision, and one process or many, on one host or several.

A script started with `python` is one process, and everything below about several processes then
changes nothing. `torchrun` starts many, each with a rank. They train one model together (FSDP2):
each process keeps its own part of every parameter, gradient and optimizer state.

    rank_slice, turns   this rank's part of a list     once       the first rank does it for all
    gather, joined      the parts of all ranks         total      a sum over the ranks
    shard, gathered     a model in parts; whole        even_out   equally many passes on each rank

Weights, optimizer state, gradient sums and log-probs are float32. Under "bf16" forward and backward
passes run in autocast, and processes exchange the weights of the layers as bfloat16. "auto" takes
bf16 only where the hardware has units for it: without them it is up to a hundred times slower than
float32.
"""

import atexit
import ctypes
import functools
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from minicai import InputError, RunError
from minicai.engine import terminal

MALLOC = "MALLOC_MMAP_THRESHOLD_"  # glibc's, in bytes: larger blocks are mapped one by one
Numbers = float | list[float] | Tensor

_process = {"device": torch.device("cpu"), "precision": "fp32"}


def setup(
    device: str = "auto", precision: str = "auto", timeout: int = 1800, threads: int = 0
) -> None:
    """Fixes device and precision for the whole process. Under torchrun it joins the group, once.

    device: "cpu", "cuda" or "auto". precision: "fp32", "bf16" or "auto": bf16 on a GPU that has it.
    timeout: seconds that a rank may keep the others waiting before all of them stop.
    threads: of the CPU; 0 = as many as torch takes, which is one per core.
    Raises InputError where the device is not available.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError("device cuda: no CUDA device is available here; use --device=cpu")
    if device == "auto":
        device = "cuda" if available else "cpu"
    if precision == "auto":
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if fast else "fp32"
    if threads:
        torch.set_num_threads(threads)
    if device == "cpu":
        _keep_freed_memory()
    several = launched("WORLD_SIZE", "1") > 1
    if several and device == "cuda":
        number, here = launched("LOCAL_RANK"), torch.cuda.device_count()
        if number >= here:
            raise InputError(f"process {number + 1} on a host with {here} CUDA devices: too many")
        torch.cuda.set_device(number)
        device = f"cuda:{number}"
    if several and not dist.is_initialized():
        _join("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout)
    _process.update(device=torch.device(device), precision=precision)


def launched(variable: str, alone: str = "") -> int:
    """A number that torchrun tells its processes; without torchrun, `alone`. Raises InputError."""
    told = os.environ.get(variable, alone)
    if not told.isdecimal():
        raise InputError(f"{variable} is {told or 'not set'}: start the processes with torchrun")
    return int(told)


def device() -> torch.device:
    """The device of this process: models are loaded there."""
    return _process["device"]


def precision() -> str:
    """ "fp32" or "bf16": what forward and backward passes compute in."""
    return _process["precision"]


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Inside it, passes compute in another precision than the process's."""
    before = _process["precision"]
    _process["precision"] = precision
    try:
        yield
    finally:
        _process["precision"] = before


def autocast() -> torch.autocast:
    """Products in bfloat16 where the precision is bf16. Every forward pass enters it by itself."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=precision() == "bf16")


def _join(backend: str, timeout: int) -> None:
    """Enters the process group. Only the first rank prints.

    A rank that fails prints the reason and exits at once, and then the others stop too.
    """
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (ValueError, RuntimeError) as error:  # a variable is missing, or nobody answers
        kind = InputError if isinstance(error, ValueError) else RunError
        raise kind(
            f"this process cannot join the others at {os.environ.get('MASTER_ADDR', '?')} "
            f"({str(error).splitlines()[0]}); start all of them with torchrun, within {timeout} s"
        ) from error
    atexit.register(dist.destroy_process_group)
    if dist.get_rank():
        terminal.QUIET, sys.stdout = True, open(os.devnull, "w")  # noqa: SIM115

    def stop(kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        reason = kind.__name__
        if lost_peer(error):
            reason = f"another rank has ended, or has kept this one waiting for {timeout} seconds"
        print(
            f"rank {rank()} of {world()} on {platform.node()} stops: {reason}. All ranks stop "
            f"together; the same command (without --overwrite) resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly exit might wait for the others

    sys.excepthook = stop


def lost_peer(error: BaseException) -> bool:
    """Whether an error means that another rank has ended or does not answer."""
    said = str(error).lower()
    words = ("connection", "timed out", "timeout", "nccl")
    return world() > 1 and isinstance(error, RuntimeError) and any(word in said for word in words)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


# --- work -----------------------------------------------------------------------------------------


def require(count: int, what: str) -> None:
    """Raises InputError where `count` things cannot be divided among the processes."""
    if count < world():
        raise InputError(
            f"{what}: {count} cannot be split over {world()} processes; raise the number, or start "
            f"fewer processes"
        )


def rank_slice(items):
    """This rank's items of a list, range or tensor: every world()-th, from number rank() on."""
    return items[rank() :: world()]


def gather(items: list) -> list:
    """What all ranks made of their rank_slice, in the order of the whole list, on every rank."""
    parts = _of_all(items)
    whole = [None] * sum(map(len, parts))
    for k, part in enumerate(parts):
        whole[k :: len(parts)] = part
    return whole


def turns(done: int, total: int, size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of this rank's groups of `size` items, among done ... total - 1.

    Groups may be empty where few items are left. One rank works on a whole group, as a single
    process would: the same batches give the same digits.
    """
    for first in range(done, total, size * world()):
        mine = min(first + rank() * size, total)
        yield mine, min(mine + size, total)


def joined(items: list) -> list:
    """What all ranks made of one turn, in the order of the ranks, on every rank."""
    return list(chain(*_of_all(items)))


def _of_all(items: list) -> list[list]:
    parts = [items] * world()
    if world() > 1:
        dist.all_gather_object(parts, items)
    return parts


def once(function: Callable, *arguments):
    """Calls the function on the first rank only. Every rank returns its result when it is done.

    Every rank raises its InputError or RunError, too.
    """
    if world() == 1:
        return function(*arguments)
    told = [None, None]
    if rank() == 0:
        try:
            told[0] = function(*arguments)
        except (InputError, RunError) as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def total(x: Numbers) -> Numbers:
    """The sum over the ranks of a number, of each number of a list, or of tensors of one shape."""
    if world() == 1:
        return x
    summed = x.clone() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed if isinstance(x, Tensor) else summed.tolist()


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return total(float(flag)) > 0


def even_out(batches: list[list[int]]) -> list[list[int]]:
    """This rank's micro-batches, and empty ones until every rank has equally many.

    The ranks meet in every layer of every forward and backward pass: one with fewer passes would
    keep the others waiting for ever. An empty batch adds exactly 0.
    """
    most = max(joined([len(batches)]))
    return batches + [[]] * (most - len(batches))


def backward(loss: Tensor) -> None:
    """Adds this rank's part of the gradients of a loss that is divided by the whole batch's count.

    The gradient of the whole batch is the sum of the ranks' gradients. FSDP takes their mean, hence
    the factor.
    """
    (loss * world()).backward()


def clip_grad_norm(model: torch.nn.Module, limit: float) -> float:
    """Scales the gradients to a norm of at most `limit`, over all ranks. Returns the old norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return whole(norm).item()


def whole(x: Tensor) -> Tensor:
    """A tensor of which each rank may have a part, on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# --- models ---------------------------------------------------------------------------------------


@functools.cache
def _mesh(device_type: str) -> DeviceMesh:
    """All processes in one row; with several hosts a row for each host.

    Then parameters travel only inside a host, and only gradients between hosts.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    if local in (1, world()):
        return init_device_mesh(device_type, (world(),))
    shape = world() // local, local
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("hosts", "processes"))
    backend = dist.group.WORLD._get_backend(torch.device(device_type))
    for group in mesh.get_all_groups():  # by default they wait as long as they like
        dist.distributed_c10d._set_pg_timeout(backend.options._timeout, group)
    return mesh


@torch.no_grad()
def shard(model: torch.nn.Module, whole: torch.nn.Module | None = None) -> torch.nn.Module:
    """Cuts each parameter over the ranks, in place: each layer is a group, and the rest another.

    model: without weights, on the "meta" device. whole: the same with weights, on the first rank,
    which sends each rank its part.

    Under bf16 the layers are exchanged and used as bfloat16, and their gradients summed in float32.
    The rest (embeddings, last norm, head) stays float32, since heads are applied in float32.
    Raises InputError where the model does not name its layers.
    """
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    if not layers:
        raise InputError(
            f"{type(model).__name__}: several processes cannot share this kind of model: "
            f"it does not name its layers"
        )
    # By default the outermost group would stay whole after a forward pass without a backward pass:
    # an optimizer made then holds parameters that never change. Nothing raises an error.
    how = {"mesh": _mesh(device().type), "reshard_after_forward": True}
    policy = MixedPrecisionPolicy()
    if precision() == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mp_policy=policy, **how)
    fully_shard(model.eval(), **how).to_empty(device=device())
    weights = whole.state_dict() if whole else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)
    for name, buffer in model.named_buffers():
        if whole:
            buffer.copy_(whole.get_buffer(name))
        dist.broadcast(buffer, 0)
    model.under_hooks = lambda function, *arguments: function(*arguments)
    register_fsdp_forward_method(model, "under_hooks")
    return model


def weight_precision(frozen: bool = False) -> str:
    """The precision in which the layers' weights are used.

    One process keeps float32 weights and autocast converts them; several exchange them as bfloat16.
    Frozen weights below adapters are kept as bfloat16 (models.freeze).
    """
    return precision() if frozen or world() > 1 else "fp32"


def forward_pass(function: Callable) -> Callable:
    """Decorates function(model, ...), which then computes under autocast.

    A sharded model has its parameters whole inside, as in a call of the model itself, so that the
    function may call a part of the model and apply the head by itself.
    """

    @functools.wraps(function)
    def inside(model, *arguments):
        with autocast():
            if hasattr(model, "under_hooks"):  # sharded, maybe in one of its roles (adapters.py)
                return model.under_hooks(function, model, *arguments)
            return function(model, *arguments)

    return inside


@contextmanager
def gathered(*models: torch.nn.Module) -> Iterator[None]:
    """Inside it, every rank has all parameters of sharded models.

    So each rank computes by itself: as many passes as it likes, of any part of the model. All ranks
    enter together. There is no training inside.
    """
    sharded = [model for model in models if hasattr(model, "under_hooks")]
    parts = []
    for model in sharded:
        parts += [module for module in model.modules() if isinstance(module, FSDPModule)]
        model.set_reshard_after_forward(False)
        model.under_hooks(lambda: None)  # the first pass of all must be the whole model's
    for handle in [part.unshard(async_op=True) for part in parts]:
        handle.wait()
    try:
        yield
        # FSDP notes the order of forward passes, and prefetches in a backward pass what the last
        # one before it ended with: that must be the same on a rank that had nothing to generate.
        for model in sharded:
            model.under_hooks(lambda: None)
    finally:
        for part in parts:
            part.reshard()
        for model in sharded:
            model.set_reshard_after_forward(True)


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank keeps, which may be empty."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> None:
    """Puts a whole tensor's values into a parameter, of which this rank may keep a part."""
    if isinstance(parameter, DTensor):
        place = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values, *place, src_data_rank=None)  # every rank has the values
    parameter.copy_(values)


# --- the process itself ---------------------------------------------------------------------------


def _keep_freed_memory() -> None:
    """Keeps glibc from returning large blocks to the system and mapping them again.

    That takes 3 to 11 % of a CPU training step (LOG.md). MALLOC in the environment switches it on.
    """
    if platform.libc_ver()[0] == "glibc" and MALLOC not in os.environ:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 << 20)  # M_TOP_PAD


def device_name() -> str:
    """The device and the number of processes, for the record."""
    threads = torch.get_num_threads()
    name = f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
    return name if world() == 1 else f"{name}; {world()} processes"


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if platform.system() == "Darwin" else 1024)
