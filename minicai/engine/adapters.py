"""Adapters: one frozen model in several roles (LoRA, Hu et al. 2021).

    y = W x + (alpha / r) B A x        equation 3; A [r, in] is random at first, and B [out, r] zero

W is frozen and shared. Each role has its own A and B in every linear layer, and a reward or value
model its own head:

    backbone     W                      the frozen reference of PPO: no role is on
    "policy"     W, A and B             trained in stages 1 and 3
    "reward"     W, A and B, head       trained in stage 2, frozen in stage 3
    "value"      W, A and B, head       a copy of the reward model's, trained in stage 3

`Role(model, name)` is used where a model is expected. It turns the role on while the layers run.
Adapters are float32 and so are their gradients. A folder in PEFT's format keeps those of one role.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minicai import InputError
from minicai.engine import hub, parallel
from minicai.engine.config import Lora

PREFIX = "base_model.model."  # of PEFT's names
HEAD = f"{PREFIX}score.weight"
A, B = ".lora_A.weight", ".lora_B.weight"
PLAIN = {  # what PEFT's settings must be, where they are there
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
LINEAR = (nn.Linear, Conv1D)
BLOCK = re.compile(r"\.\d+\.")  # in a path: model.layers.0.mlp, transformer.h.0.attn
BASE = "base_sha256"  # the sum of the weights that the adapters were trained on
_on = ContextVar("role", default="")  # the role whose adapters the layers add; "" is none


@contextmanager
def role(name: str) -> Iterator[None]:
    """Inside it, the layers add the adapters of this role."""
    before = _on.set(name)
    try:
        yield
    finally:
        _on.reset(before)


def same_role() -> tuple:
    """For gradient checkpointing: the backward pass computes a layer again in its own role.

    Another role may be on by then. Without this the gradients are wrong, and nothing says so.
    """
    return nullcontext(), role(_on.get())


# --- layers ---------------------------------------------------------------------------------------


def matrix(layer: nn.Module) -> Tensor:
    """W [out, in] of a linear layer, not a copy. GPT-2's layers keep it transposed."""
    return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight


class Pair(nn.Module):
    """A and B of one role in one layer, and alpha / r."""

    def __init__(self, layer: nn.Module, how: Lora):
        super().__init__()
        (outside, inside), device = matrix(layer).shape, layer.weight.device
        self.A = nn.Parameter(torch.empty(how.rank, inside, device=device))
        self.B = nn.Parameter(torch.empty(outside, how.rank, device=device))
        self.scale = how.alpha / how.rank


def _adapt(layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
    """Adds (alpha / r) B A x to the output of a layer, where a role is on that adapts it."""
    name = _on.get()
    if name in layer.adapters:
        pair = layer.adapters[name]
        y.add_(F.linear(F.linear(inputs[0], pair.A), pair.B), alpha=pair.scale)


def attach(model: PreTrainedModel, name: str, how: Lora, score: bool = False) -> "Role":
    """Gives the model a role, in place: a pair in each linear layer of the blocks, and a head.

    Of several processes all do so before the model is cut. `draw` or `fill` gives the numbers.
    The tensors of a mixture's experts are no linear layers and are not adapted.
    Raises InputError where no layer has such a name.
    """
    blocks = [(f".{path}", x) for path, x in model.named_modules() if BLOCK.search(path)]
    linear = [(path, layer) for path, layer in blocks if isinstance(layer, LINEAR)]
    for target in how.targets or [""]:
        found = [layer for path, layer in linear if path.endswith(target and f".{target}")]
        if not found:
            raise InputError(
                f"lora_targets: no linear {target} in the blocks of {model.name_or_path}"
            )
        for layer in found:
            if not hasattr(layer, "adapters"):
                layer.adapters = nn.ModuleDict()
                layer.register_forward_hook(_adapt)
            layer.adapters[name] = Pair(layer, how)
    if score:
        width = model.config.get_text_config().hidden_size
        model.add_module(f"{name}_head", nn.Linear(width, 1, bias=False, device=model.device))
    return Role(model, name, how)


@dataclass(eq=False)
class Role:
    """A model in one of its roles, which is used where a model is expected."""

    backbone: PreTrainedModel
    name: str
    how: Lora

    def __getattr__(self, key: str):
        return getattr(self.backbone, key)

    def __call__(self, **inputs):
        with role(self.name):
            return self.backbone(**inputs)

    def base_model(self, **inputs):
        """The layers, with the role's adapters."""
        with role(self.name):
            return self.backbone.base_model(**inputs)

    @property
    def score(self) -> nn.Module | None:
        """The head of a reward or value model."""
        own = getattr(self.backbone, f"{self.name}_head", None)
        return own or getattr(self.backbone, "score", None)

    def named(self) -> dict[str, nn.Parameter]:
        """The role's parameters by PEFT's names."""
        found = {}
        for name, parameter in self.backbone.named_parameters():
            path, ours, letter = name.partition(f".adapters.{self.name}.")
            if ours:
                found[f"{PREFIX}{path}.lora_{letter}.weight"] = parameter
        if self.score:
            found[HEAD] = self.score.weight
        return found

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the role's pairs and its head."""
        return list(self.named().values())

    def numbers(self) -> dict[str, Tensor]:
        """The same, whole, on the CPU. All processes call it together."""
        return {key: parallel.whole(p.detach()).cpu() for key, p in self.named().items()}

    def fill(self, numbers: dict[str, Tensor]) -> None:
        """Puts numbers by PEFT's names into the role. Raises ValueError where they do not fit."""
        own = self.named()
        for key in own.keys() | numbers.keys():
            if key not in own or key not in numbers or own[key].shape != numbers[key].shape:
                raise ValueError(key)
            parallel.put(own[key], numbers[key])

    def draw(self, seed: int) -> "Role":
        """First values: A from N(0, 1 / in), B and head zero. The role begins as the backbone."""
        generator = torch.Generator().manual_seed(seed)
        for key, p in self.named().items():
            first = torch.zeros(p.shape)
            if key.endswith(A):
                first.normal_(0, p.shape[1] ** -0.5, generator=generator)
            parallel.put(p, first)
        return self


@torch.no_grad()
def merge(model: nn.Module, how: Lora, numbers: dict[str, Tensor]) -> None:
    """W + (alpha / r) B A, in place, with A and B by PEFT's names.

    Raises InputError where the model has no such linear layer.
    """
    left = numbers.keys() - {HEAD}
    for path, layer in model.named_modules():
        a, b = PREFIX + path + A, PREFIX + path + B
        if a in left and isinstance(layer, LINEAR):
            matrix(layer).add_(numbers[b] @ numbers[a], alpha=how.alpha / how.rank)
            left -= {a, b}
    if left:
        raise InputError(f"{min(left)} is of no linear layer of {model.name_or_path}")


# --- folders in PEFT's format ---------------------------------------------------------------------


def save(folder: Path, model: Role, numbers: dict[str, Tensor]) -> None:
    """Writes a role, with the numbers it gave, so that peft and vLLM load it on the same base."""
    settings = PLAIN | {
        "task_type": "SEQ_CLS" if model.score else "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": model.how.rank,
        "lora_alpha": model.how.alpha,
        "target_modules": [k[len(PREFIX) : -len(A)] for k in numbers if k.endswith(A)],
        "fan_in_fan_out": any(isinstance(m, Conv1D) for m in model.modules()),
    }
    folder.mkdir(exist_ok=True)
    base = {BASE: hub.weights_sha256(model.name_or_path)}
    save_file(numbers, folder / "adapter_model.safetensors", base)
    (folder / hub.ADAPTER).write_text(json.dumps(settings, indent=2))


def read(folder: Path, base: str) -> tuple[Lora, dict[str, Tensor]]:
    """How the adapters of such a folder are made, and their numbers by PEFT's names.

    base: the model to use them with. Raises InputError where they are not plain LoRA, or were
    trained on other weights.
    """
    path = folder / hub.ADAPTER
    settings = json.loads(path.read_bytes())
    for key, plain in PLAIN.items():
        if (settings.get(key) or plain) != plain:
            raise InputError(f"{path}: {key} is not that of plain LoRA; merge the model with peft")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        numbers = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        made_on = (file.metadata() or {}).get(BASE)
    if made_on and made_on != hub.weights_sha256(base):
        raise InputError(f"{folder}: it was trained on other weights than those of {base}")
    return Lora(settings["r"], settings["lora_alpha"], tuple(settings["target_modules"])), numbers
