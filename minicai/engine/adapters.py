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
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minicai import InputError
from minicai.engine import parallel

PREFIX = "base_model.model."  # of PEFT's names
UNKNOWN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
_on = {"role": ""}  # the role whose adapters the layers add; "" is none


@dataclass(frozen=True)
class Lora:
    """How adapters are made. targets: paths or last names of linear layers; () = all in blocks."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()


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


class Pair(nn.Module):
    """A and B of one role in one layer, and alpha / r."""

    def __init__(self, layer: nn.Module, how: Lora):
        super().__init__()
        inside, outside = _sizes(layer)
        where = layer.weight.device
        self.A = nn.Parameter(torch.empty(how.rank, inside, device=where))
        self.B = nn.Parameter(torch.empty(outside, how.rank, device=where))
        self.scale = how.alpha / how.rank

    def delta(self) -> Tensor:
        """What the pair adds to W, [out, in]."""
        return self.scale * self.B @ self.A


class _Adapted:
    """A linear layer with adapters: `attach` gives one this class, and nothing else changes."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if _on["role"] not in self.adapters:
            return y
        pair = self.adapters[_on["role"]]
        # A x has r numbers per token. B adds to y in place: no second tensor of its size exists.
        low = F.linear(x, pair.A).flatten(0, -2).to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_(low, pair.B.t().to(y.dtype), alpha=pair.scale)
        return y


class AdaptedLinear(_Adapted, nn.Linear):
    """y = W x + b, with adapters."""


class AdaptedConv1D(_Adapted, Conv1D):
    """GPT-2's linear layer, which keeps W transposed."""


ADAPTED = {nn.Linear: AdaptedLinear, Conv1D: AdaptedConv1D}


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Numbers per token that go in, and that come out."""
    size = layer.weight.shape
    return (size[0], size[1]) if isinstance(layer, Conv1D) else (size[1], size[0])


def attach(model: PreTrainedModel, name: str, how: Lora, score: bool = False) -> None:
    """Gives the model a role, in place: a pair in each linear layer of the blocks, and a head.

    Of several processes all do so before the model is cut, and `draw` or `load` gives the numbers.
    The tensors of a mixture's experts are no linear layers and are not adapted.
    Raises InputError where no layer has such a name.
    """
    found = set()
    for path, layer in model.named_modules():
        kind = ADAPTED.get(type(layer), type(layer))
        names = {path, path.rpartition(".")[2]}
        in_block = any(part.isdigit() for part in path.split("."))
        if in_block and kind in ADAPTED.values() and (not how.targets or names & {*how.targets}):
            if type(layer) is not kind:
                layer.__class__, layer.adapters = kind, nn.ModuleDict()
            layer.adapters[name] = Pair(layer, how)
            found |= names
    missing = set(how.targets) - found
    if missing or not found:
        names = ", ".join(sorted(missing)[:3]) or "linear layers"
        raise InputError(f"lora_targets: {model.name_or_path} has no {names} in its blocks")
    if score:
        if not hasattr(model, "heads"):
            model.heads = nn.ModuleDict()
        width = model.config.get_text_config().hidden_size
        where = {"device": model.device, "dtype": torch.float32}
        model.heads[name] = nn.Linear(width, 1, bias=False, **where)


def pairs(model: nn.Module, name: str) -> dict[str, Pair]:
    """{path of the layer: its pair} of a role."""
    layers = model.named_modules()
    return {p: m.adapters[name] for p, m in layers if name in getattr(m, "adapters", ())}


@torch.no_grad()
def draw(model: nn.Module, name: str, seed: int) -> None:
    """First values: A from N(0, 1 / in), B zero, so that the role begins as the backbone."""
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs(model, name).values():
        drawn = torch.randn(pair.A.shape, generator=generator) / pair.A.shape[1] ** 0.5
        _put(pair.A, drawn)
        _put(pair.B, torch.zeros(pair.B.shape))


def _put(parameter: Tensor, values: Tensor) -> None:
    part, where = parallel.local_part(parameter)
    part.copy_(values[where])


@torch.no_grad()
def merge(model: nn.Module, deltas: dict[str, Tensor]) -> None:
    """Adds {path of a layer: what its pair adds [out, in]} to the plain weights, in place."""
    for path, delta in deltas.items():
        layer = model.get_submodule(path)
        part, where = parallel.local_part(layer.weight)
        delta = delta.t() if isinstance(layer, Conv1D) else delta
        part += delta[where].to(part)


class Role:
    """A model in one of its roles, which stands where a model is expected."""

    def __init__(self, backbone: PreTrainedModel, name: str):
        self.backbone, self.name = backbone, name

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
        heads = getattr(self.backbone, "heads", {})
        return heads[self.name] if self.name in heads else getattr(self.backbone, "score", None)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the role's pairs and its head."""
        parts = [*pairs(self.backbone, self.name).values(), *filter(None, [self.score])]
        return [parameter for part in parts for parameter in part.parameters()]

    def requires_grad_(self, on: bool = True) -> "Role":
        for parameter in self.parameters():
            parameter.requires_grad_(on)
        return self


# --- folders in PEFT's format ---------------------------------------------------------------------


def _named(model: Role) -> dict[str, Tensor]:
    """The role's parameters by PEFT's names."""
    found = {}
    for path, pair in pairs(model.backbone, model.name).items():
        found[f"{PREFIX}{path}.lora_A.weight"] = pair.A
        found[f"{PREFIX}{path}.lora_B.weight"] = pair.B
    if model.score:
        found[f"{PREFIX}score.weight"] = model.score.weight
    return found


def tensors(model: Role) -> dict[str, Tensor]:
    """The role's numbers by PEFT's names, whole, on the CPU. All processes call it together."""
    return {key: parallel.whole(p.detach()).cpu() for key, p in _named(model).items()}


def save(folder: Path, model: Role, numbers: dict[str, Tensor]) -> None:
    """Writes what `tensors` gave as a folder that peft and vLLM load on the same base."""
    layers = pairs(model.backbone, model.name)
    one = next(iter(layers.values()))
    rank = len(one.A)
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.score else "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": rank,
        "lora_alpha": one.scale * rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
        "fan_in_fan_out": any(isinstance(m, Conv1D) for m in model.modules()),
        "modules_to_save": ["score"] if model.score else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(numbers, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(settings, indent=2)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def read(folder: Path) -> tuple[Lora, dict[str, Tensor]]:
    """How the adapters of such a folder are made, and their numbers by PEFT's names.

    Raises InputError where they are not plain LoRA.
    """
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key in UNKNOWN if settings.get(key)]
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or other:
        what = ", ".join(other) or f"{settings.get('peft_type')}, bias {settings.get('bias')}"
        raise InputError(f"{path}: only plain LoRA can be used, not {what}; merge it with peft")
    numbers = load_file(folder / "adapter_model.safetensors")
    ends = ".lora_A.weight", ".lora_B.weight"
    halves = [
        {key.removeprefix(PREFIX).removesuffix(end) for key in numbers if key.endswith(end)}
        for end in ends
    ]
    other = [key for key in numbers if not key.endswith((*ends, "score.weight"))]
    if other or halves[0] != halves[1]:
        raise InputError(f"{path}: cannot use {', '.join(other[:3]) or 'an A without its B'}")
    how = Lora(settings["r"], settings["lora_alpha"], tuple(sorted(halves[0])))
    return how, numbers


@torch.no_grad()
def fill(model: Role, numbers: dict[str, Tensor], folder: Path) -> None:
    """Puts numbers by PEFT's names into the role. Raises InputError where shapes differ."""
    for key, tensor in _named(model).items():
        if key not in numbers or numbers[key].shape != tensor.shape:
            raise InputError(f"{folder}: its {key} does not fit {model.name_or_path}")
        _put(tensor, numbers[key])
