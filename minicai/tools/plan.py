"""What a stage takes of memory, before it takes any: `python train_sl.py CONFIG --plan`.

Models are made from their config.json as FakeTensors, which have shapes and no storage. The functions that the stage calls run on them as they
are, and what would be alive is counted. Each phase is planned at its fullest: every slot taken, every response of full length, a micro-batch of
as many tokens as it may have. Two things are modelled, not counted: the allocator's slack, and what several processes exchange.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from minicai import InputError
from minicai.engine import parallel
from minicai.engine.attention import Slots, last_hidden
from minicai.engine.checkpoint import require_folder
from minicai.engine.models import apply_head
from minicai.engine.sampler import draw
from minicai.engine.terminal import table
from minicai.rollout import Batch, collate

CPU = torch.device("cpu")
FEW = 4  # rows of generation that are counted; what they take is in proportion
SLACK = (
    3  # layers: holes in the CPU's heap take about as much as the activations of so many (LOG.md)
)
Phase = tuple[
    str, dict[str, int]
]  # its name, and the bytes that one process holds at its fullest moment, by component


# --- models without weights ------------------------------------------------------------------------------------------------------


def policy(path: str) -> PreTrainedModel:
    """What models.load_policy would load, without its weights. Raises InputError where the folder does not say what model it is."""
    return _shape(AutoModelForCausalLM, path, {})


def scorer(path: str, pad_id: int) -> PreTrainedModel:
    """What models.load_scorer would load, without its weights."""
    return _shape(
        AutoModelForSequenceClassification, path, {"num_labels": 1, "pad_token_id": pad_id}
    )


def _shape(auto: type, path: str, settings: dict) -> PreTrainedModel:
    folder = require_folder(path, "model", weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **settings)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return auto.from_config(config, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: no model can be made from its config.json: {next(iter(str(error).splitlines()), '')}"
        ) from error


def stand_in(folder: str, base: str) -> str:
    """A folder that an earlier stage makes, or while it is not there the base model's, which has the same shape."""
    return folder if (Path(folder) / "config.json").exists() else base


# --- what the phases do ----------------------------------------------------------------------------------------------------------


def batch(tokens: int, prompt: int, response: int) -> Batch:
    """As many sequences of a prompt and a response, in tokens, as `tokens` hold."""
    count = max(1, tokens // (prompt + response))
    return collate([[0] * prompt] * count, [[0] * response] * count, 0, CPU)


def decoding(model: PreTrainedModel, rows: int, fed: int, capacity: int) -> Slots:
    """The fullest step of generation: `fed` tokens come into each slot, and a token is drawn for each."""
    slots = Slots(rows, capacity)
    hidden = last_hidden(model, slots, [0] * rows, [[0] * fed] * rows)
    draw(
        apply_head(model.get_output_embeddings(), hidden),
        torch.zeros(rows, dtype=torch.float64),
        1.0,
    )
    return slots


def generation(
    name: str,
    models: dict[str, PreTrainedModel],
    by: str,
    precision: str,
    world: int,
    *,
    rows: int,
    fed: int,
    capacity: int,
    optimizer: torch.optim.Optimizer | None = None,
    beside: Iterable[str] = (),
) -> Phase:
    """The phase in which model `by` decodes in `rows` slots of `capacity` tokens, while the others and the optimizer's state stand by; of several
    processes each then has it whole, and those `beside` it."""
    counted = min(rows, FEW)
    with torch.no_grad():
        alive, slots = _count(
            models, optimizer, precision, lambda: decoding(models[by], counted, fed, capacity)
        )
    kept = sum(x.nbytes for layer in slots.layers.values() for x in layer)
    passing = {
        "key-value slots": kept,
        "activations": alive["other"] - kept,
        "logits": alive["logits"],
    }
    every = {component: size * rows // counted for component, size in passing.items()}
    return name, _standing(models, optimizer, world) | every | {
        "gathered weights": _whole(models, {by, *beside}, precision, world),
        "allocator slack": _slack(models, every["activations"]),
    }


def asking(
    name: str,
    models: dict[str, PreTrainedModel],
    precision: str,
    world: int,
    work: Callable[[], object],
) -> Phase:
    """A phase of `work` without learning, for which all models are whole in each process."""
    name, rows = phase(name, models, [], None, precision, world, work)
    return name, rows | {"gathered weights": _whole(models, models, precision, world)}


def update(
    optimizer: torch.optim.Optimizer, passes: int, work: Callable[[], object]
) -> Callable[[], None]:
    """An update of the weights after `passes` micro-batches. The optimizer has its state from now on."""

    def step() -> None:
        for _ in range(min(passes, 2)):  # the second finds the gradients of those before it
            work()
        torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], 1.0
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if not optimizer.state:
        step()
    return step


def phase(
    name: str,
    models: dict[str, PreTrainedModel],
    used: Sequence[str],
    optimizer: torch.optim.Optimizer | None,
    precision: str,
    world: int,
    work: Callable[[], object],
) -> Phase:
    """A phase in which `work` is done with the models `used`, while all stand by.

    Of several processes each then has two layers whole, weights and gradients, and for the length of a pass what is in no layer.
    """
    alive, _ = _count(models, optimizer, precision, work)
    copies = (
        alive["copies"] if world == 1 else 0
    )  # several processes hand the layers round as bfloat16, and autocast has nothing to copy
    rows = {
        "gradients": -(-alive["gradients"] // world),
        "bfloat16 copies": copies,
        "activations": alive["other"],
        "logits": alive["logits"],
        "gathered weights": sum(_ahead(models[m], precision) for m in used) if world > 1 else 0,
    }
    return name, _standing(models, optimizer, world) | rows | {
        "allocator slack": _slack(models, rows["activations"])
    }


# --- counting --------------------------------------------------------------------------------------------------------------------


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive, by kind, and how they stood when there were most."""

    def __init__(self, weights: list[Tensor], standing: list[Tensor], vocabulary: set[int]):
        super().__init__()
        self.weights, self.shapes = weights, {p.shape for p in weights if p.ndim > 1}
        self.vocabulary = vocabulary
        self.seen = WeakIdKeyDictionary({x.untyped_storage(): True for x in [*weights, *standing]})
        self.now = dict.fromkeys(("logits", "copies", "other"), 0)
        self.peak, self.most = dict(self.now, gradients=0), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in (x for x in tree_iter(out) if isinstance(x, Tensor)):
            storage = x.untyped_storage()
            if storage not in self.seen:
                kind = (
                    "copies"
                    if x.dtype == torch.bfloat16 and x.shape in self.shapes
                    else "logits"
                    if x.ndim and x.shape[-1] in self.vocabulary
                    else "other"
                )
                self.seen[storage] = True
                self._add(kind, storage.nbytes())
                weakref.finalize(storage, self._add, kind, -storage.nbytes())
        return out

    def _add(self, kind: str, size: int) -> None:
        self.now[kind] += size
        if size > 0 and sum(self.now.values()) > self.most:
            self.most = sum(self.now.values())
            gradients = sum(p.grad.nbytes for p in self.weights if p.grad is not None)
            self.peak = self.now | {"gradients": gradients, "other": self.now["other"] - gradients}


def _count(
    models: dict[str, PreTrainedModel],
    optimizer: torch.optim.Optimizer | None,
    precision: str,
    work: Callable,
) -> tuple[dict, object]:
    """Bytes alive besides weights and optimizer state at the fullest moment of `work`, by kind, and what it returned."""
    weights = [p for model in models.values() for p in model.parameters()]
    alive = _Alive(
        weights,
        [x for state in (optimizer.state.values() if optimizer else ()) for x in state.values()],
        {model.config.get_text_config().vocab_size for model in models.values()},
    )
    with alive, parallel.autocast(CPU, precision):
        returned = work()
    return alive.peak, returned


def _standing(
    models: dict[str, PreTrainedModel], optimizer: torch.optim.Optimizer | None, world: int
) -> dict[str, int]:
    """Weights of each model, and optimizer state, of which each process keeps its part: rows of every tensor, rounded up."""
    rows = {f"weights: {name}": _part(model.parameters(), world) for name, model in models.items()}
    return rows | {
        "optimizer state": _part(
            [x for s in optimizer.state.values() for x in s.values()] if optimizer else [], world
        )
    }


def _part(tensors: Iterable[Tensor], world: int) -> int:
    return sum(
        x.nbytes // max(len(x), 1) * -(-len(x) // world) if x.ndim else x.nbytes for x in tensors
    )


def _slack(models: dict[str, PreTrainedModel], activations: int) -> int:
    return activations * SLACK // max(SLACK, *(len(_layers(model)) for model in models.values()))


def _layers(model: PreTrainedModel) -> list[int]:
    """Numbers of weights in each layer."""
    return [
        sum(p.numel() for p in m.parameters())
        for m in model.modules()
        if type(m).__name__ in (model._no_split_modules or ())
    ]


def _whole(
    models: dict[str, PreTrainedModel], names: Iterable[str], precision: str, world: int
) -> int:
    """Whole models as several processes hand them round: layers in the precision of the products, the rest in float32."""
    inside = sum(sum(_layers(models[name])) for name in names)
    outside = sum(models[name].num_parameters() for name in names) - inside
    return inside * (2 if precision == "bf16" else 4) + outside * 4 if world > 1 else 0


def _ahead(model: PreTrainedModel, precision: str) -> int:
    """What is in no layer, and the two largest layers: weights as they are handed round, gradients in float32."""
    layers = sorted(_layers(model))
    outside = model.num_parameters() - sum(layers)
    return outside * 8 + sum(layers[-2:]) * ((2 if precision == "bf16" else 4) + 4)


# --- the table -------------------------------------------------------------------------------------------------------------------


def show(phases: list[Phase], device: torch.device, precision: str, world: int) -> dict:
    """Prints the plan, GiB a component and phase, and returns it in bytes.

    On a CPU the libraries are this process as it stands, and its allocator keeps what is freed, in pieces that do not always fit the next use,
    unless the environment has it map all large blocks one by one. On a GPU both are left out.
    """
    here = {"libraries": int(parallel.peak_memory_mb() * 2**20)} if device.type == "cpu" else {}
    threshold = os.environ.get(parallel.MALLOC, "")
    keeps = here and not (
        threshold.isdecimal() and int(threshold) <= 128 << 10
    )  # above 1 MiB there are holes again (LOG.md)
    phases = [
        (name, here | {k: size for k, size in rows.items() if keeps or k != "allocator slack"})
        for name, rows in phases
    ]
    names = [
        name
        for name in dict.fromkeys(name for _, rows in phases for name in rows)
        if any(rows.get(name) for _, rows in phases)
    ]
    totals = [sum(rows.values()) for _, rows in phases]
    cells = [[name, *(f"{rows.get(name, 0) / 2**30:.3f}" for _, rows in phases)] for name in names]
    if os.environ.get("RANK", "0") == "0":  # of several processes that plan, each by itself
        print(
            table(
                ["GiB a process", *(name for name, _ in phases)],
                [*cells, ["total", *(f"{size / 2**30:.3f}" for size in totals)]],
            )
        )
        processes = f"{world} process{'es' * (world > 1)}"
        print(
            f"\nThe largest phase takes {max(totals) / 2**30:.3f} GiB in each of {processes}, on {device.type} in {precision}."
        )
        if device.type != "cpu" or precision != "fp32" or world > 1:
            print(
                "Weights, gradients and optimizer state are exact; the rest was measured for fp32 in one process on a CPU, not on this device."
            )
    return {"phases": dict(phases), "total": max(totals)}
