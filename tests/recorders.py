"""What a script computes while it runs, and the same computed naively, to compare with.

The naive side calls a model of transformers with one row at a time: no packing, no padding, no
mask, no micro-batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F


@contextmanager
def recorded(module, name: str) -> Iterator[list]:
    """The calls of module.name, as they are made: [(arguments, result), ...]."""
    calls, original = [], getattr(module, name)

    def record(*arguments, **named):
        result = original(*arguments, **named)
        calls.append((arguments, result))
        return result

    with patch.object(module, name, record):
        yield calls


@contextmanager
def stopped(module, name: str, call: int) -> Iterator[list]:
    """Raises KeyboardInterrupt at the `call`-th call of module.name. Gives the calls made."""
    calls, original = [], getattr(module, name)

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    with patch.object(module, name, stop):
        yield calls


class Descent(torch.optim.SGD):
    """Gradient descent in AdamW's place: a step is linear in the gradient, so errors show."""

    def __init__(self, parameters, lr=1.0, *positional, **named):
        super().__init__(parameters, lr=lr)
        self.rates, self.settings = [], dict(zip(("betas", "eps"), positional)) | named

    def step(self, closure=None):
        self.rates.append([group["lr"] for group in self.param_groups])
        super().step()


@contextmanager
def descent() -> Iterator[list[Descent]]:
    """AdamW is Descent inside. Gives the optimizers that are made."""
    made = []

    def make(*arguments, **settings):
        made.append(Descent(*arguments, **settings))
        return made[-1]

    with patch.object(torch.optim, "AdamW", make):
        yield made


def weights(*models) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def step(loss: torch.Tensor, models, rates, limit: float = 1e9) -> list[float]:
    """One step of gradient descent, by hand. Returns the norm of each model's gradient.

    A gradient whose norm exceeds `limit` is scaled down to it.
    """
    norms = []
    for model, rate in zip(models, rates):
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
        norms.append(torch.cat([g.flatten() for g in found]).norm().item())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found):
                parameter -= rate * min(1.0, limit / norms[-1]) * gradient
    return norms


# --- one row at a time ----------------------------------------------------------------------------


def response_logprobs(model, prompt: list[int], response: list[int], temperature=1.0):
    """Log-probs [len(response)] of the tokens of a response."""
    ids = torch.tensor([prompt + response])
    logprobs = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


def values(model, prompt: list[int], response: list[int]):
    """Values [len(response)] of the states in which the tokens were chosen."""
    hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
    return model.score(hidden[len(prompt) - 1 : -1])[:, 0]


def score(model, prompt: list[int], response: list[int]):
    """The score of a whole response, read at its last token."""
    hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state
    return model.score(hidden[0, -1])[0]


def nll(model, rows) -> torch.Tensor:
    """L_SL: minus the mean log-prob of all response tokens of (prompt, response) ids."""
    return -torch.cat([response_logprobs(model, *row) for row in rows]).mean()


def bradley_terry(model, pairs, labels, margin: float, centering: float) -> torch.Tensor:
    """L_RM of pairs (prompt, first, second) of ids with labels P(first is better)."""
    found = []
    for (prompt, first, second), p in zip(pairs, labels):
        a, b = score(model, prompt, first), score(model, prompt, second)
        loss = -p * F.logsigmoid(a - b - margin) - (1 - p) * F.logsigmoid(b - a - margin)
        found.append(loss + centering * (a + b) ** 2)
    return torch.stack(found).mean()
