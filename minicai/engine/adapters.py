"""Adapters: one frozen model in several roles (LoRA, Hu et al. 2021).

    y = W x + (alpha / r) B A x        equation 3; A [r, in] is random at first, and B [out, r] zero

W is frozen and shared. Each role has its own A and B in every linear layer, and a reward or value
model its own head:

    backbone     W                      the frozen reference of PPO: no role is on
    "policy"     W, A and B             trained in stages 1 and 3
    "reward"     W, A and B, head       trained in stage 2, frozen in stage 3
    "value"      W, A and B, head       a copy of the reward model's, trained in stage 3

`Role(model, name)` stands where a model is expected. It turns the role on while the layers run.
Adapters are float32 and so are their gradients. A folder in PEFT's format keeps those of one role.
"""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

PREFIX = "base_model.model."  # of PEFT's names
HEAD = f"{PREFIX}score.weight"
NAMES = re.compile(r"(^|\.)(adapters|heads)\.")  # of parameters, in a model
A, B = ".lora_A.weight", ".lora_B.weight"
PLAIN = {  # what PEFT's settings must be, where they are there
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
BASE = "base_sha256"  # the sum of the weights that the adapters were trained on
_on = {"role": ""}  # the role whose adapters the layers add; "" is none


@dataclass(frozen=True)
class Lora:
    """How adapters are made. targets: paths or last names of linear layers; () = all in blocks."""

    rank: int  # r; 0 = no adapters
    alpha: float
    targets: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


@contextmanager
def role(name: str) -> Iterator[None]:
    """Inside it, the layers add the adapters of this role."""
    before = _on["role"]
    _on["role"] = name
    try:
        yield
    finally:
        _on["role"] = before


def same_role() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For gradient checkpointing: the backward pass computes a layer again in its own role.

    Another role may be on by then. Without this the gradients are wrong, and nothing says so.
    """
    return nullcontext(), role(_on["role"])


# --- layers ---------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A and B of one role in one layer, and alpha / r."""

    def __init__(self, layer: nn.Module, how: Lora):
        super().__init__()
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        outside, inside = weight.shape
        self.A = nn.Parameter(torch.empty(how.rank, inside, device=weight.device))
        self.B = nn.Parameter(torch.empty(outside, how.rank, device=weight.device))
        self.scale = how.scale


class Adapted:
    """A linear layer with adapters: `attach` gives one this class, and nothing else changes."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if _on["role"] in self.adapters:
            pair = self.adapters[_on["role"]]
            # A x has r numbers per token. B adds to y in place: no second tensor of its size.
            low = F.linear(x, pair.A).flatten(0, -2).to(y.dtype)
            y.flatten(0, -2).addmm_(low, pair.B.t().to(y.dtype), alpha=pair.scale)
        return y


class AdaptedLinear(Adapted, nn.Linear):
    """y = W x + b, with adapters."""


class AdaptedConv1D(Adapted, Conv1D):
    """GPT-2's linear layer, which keeps W transposed."""


ADAPTED = {nn.Linear: AdaptedLinear, Conv1D: AdaptedConv1D}


def attach(model: PreTrainedModel, name: str, how: Lora, score: bool = False) -> "Role":
    """Gives the model a role, in place: a pair in each linear layer of the blocks, and a head.

    Of several processes all do so before the model is cut. `draw` or `fill` gives the numbers.
    The tensors of a mixture's experts are no linear layers and are not adapted.
    Raises InputError where no layer has such a name.
    """
    found, wanted = set(), set(how.targets)
    for path, layer in list(model.named_modules()):
        names = {path, path.rpartition(".")[2]}
        if not re.search(r"\.\d+\.", path) or (wanted and not names & wanted):
            continue
        if type(layer) in ADAPTED:
            layer.__class__, layer.adapters = ADAPTED[type(layer)], nn.ModuleDict()
        if isinstance(layer, Adapted):
            layer.adapters[name] = Pair(layer, how)
            found |= names
    if wanted - found or not found:
        missing = ", ".join(sorted(wanted - found)[:3]) or "linear layers"
        raise InputError(f"lora_targets: {model.name_or_path} has no {missing} in its blocks")
    if score:
        if not hasattr(model, "heads"):
            model.heads = nn.ModuleDict()
        width = model.config.get_text_config().hidden_size
        model.heads[name] = nn.Linear(width, 1, bias=False, device=model.device)
    return Role(model, name, how)


class Role:
    """A model in one of its roles, which stands where a model is expected."""

    def __init__(self, backbone: PreTrainedModel, name: str, how: Lora):
        self.backbone, self.name, self.how = backbone, name, how

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
        own = getattr(self.backbone, "heads", {})
        return own[self.name] if self.name in own else getattr(self.backbone, "score", None)

    def named(self) -> dict[str, nn.Parameter]:
        """The role's parameters by PEFT's names."""
        found = {}
        for path, layer in self.backbone.named_modules():
            if self.name in getattr(layer, "adapters", ()):
                pair = layer.adapters[self.name]
                found |= {PREFIX + path + A: pair.A, PREFIX + path + B: pair.B}
        return found | ({HEAD: self.score.weight} if self.score else {})

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the role's pairs and its head."""
        return list(self.named().values())

    def numbers(self) -> dict[str, Tensor]:
        """The same, whole, on the CPU. All processes call it together."""
        return {key: parallel.whole(p.detach()).cpu() for key, p in self.named().items()}

    def fill(self, numbers: dict[str, Tensor], source: str) -> None:
        """Puts numbers by PEFT's names into the role. Raises InputError where they do not fit."""
        own = self.named()
        for key in sorted(own.keys() | numbers.keys()):
            if key not in own or key not in numbers or own[key].shape != numbers[key].shape:
                raise InputError(f"{source}: {key} does not fit the model {self.name_or_path}")
            parallel.put(own[key], numbers[key])

    def draw(self, seed: int) -> None:
        """First values: A from N(0, 1 / in), B and head zero. The role begins as the backbone."""
        generator = torch.Generator().manual_seed(seed)
        for key, p in self.named().items():
            first = torch.zeros(p.shape)
            if key.endswith(A):
                first.normal_(0, p.shape[1] ** -0.5, generator=generator)
            parallel.put(p, first)


def drawn(model: PreTrainedModel, roles: dict[str, Lora], seed: int | None) -> dict[str, Role]:
    """The roles that the model has, with their first values."""
    views = {name: Role(model, name, how) for name, how in roles.items()}
    for view in views.values():
        view.draw(seed)
    return views


def _paths(numbers: dict[str, Tensor]) -> list[str]:
    """The layers that PEFT's names stand for."""
    return [key.removeprefix(PREFIX).removesuffix(A) for key in numbers if key.endswith(A)]


@torch.no_grad()
def merge(model: nn.Module, how: Lora, numbers: dict[str, Tensor]) -> None:
    """W + (alpha / r) B A, in place, with A and B by PEFT's names.

    Raises InputError where the model has no such linear layer.
    """
    layers, left = dict(model.named_modules()), numbers.keys() - {HEAD}
    for path in _paths(numbers):
        layer, pair = layers.get(path), (PREFIX + path + B, PREFIX + path + A)
        if isinstance(layer, nn.Linear | Conv1D) and pair[0] in numbers:
            delta = how.scale * numbers[pair[0]] @ numbers[pair[1]]
            layer.weight += delta.t() if isinstance(layer, Conv1D) else delta
            left -= {*pair}
    if left:
        raise InputError(f"{min(left)} is of no linear layer of {model.name_or_path}")


# --- folders in PEFT's format ---------------------------------------------------------------------


def save(folder: Path, model: Role, numbers: dict[str, Tensor]) -> None:
    """Writes a role, with the numbers it gave, so that peft and vLLM load it on the same base."""
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.score else "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": model.how.rank,
        "lora_alpha": model.how.alpha,
        "target_modules": _paths(numbers),
        "fan_in_fan_out": any(isinstance(m, Conv1D) for m in model.modules()),
        "modules_to_save": ["score"] if model.score else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    made_on = {BASE: hub.weights_sha256(model.name_or_path)}
    save_file(numbers, folder / "adapter_model.safetensors", made_on)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def read(folder: Path, base: str) -> tuple[Lora, dict[str, Tensor]]:
    """How the adapters of such a folder are made, and their numbers by PEFT's names.

    base: the model to use them with. Raises InputError where they are not plain LoRA, or were
    trained on other weights.
    """
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key, plain in PLAIN.items() if settings.get(key) not in (plain, None)]
    if other:
        raise InputError(f"{path}: {other[0]} is not that of plain LoRA; merge the model with peft")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        numbers = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        made_on = (file.metadata() or {}).get(BASE)
    if made_on and made_on != hub.weights_sha256(base):
        raise InputError(f"{folder}: it was trained on other weights than those of {base}")
    return Lora(settings["r"], settings["lora_alpha"], tuple(_paths(numbers))), numbers
