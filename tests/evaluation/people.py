"""Who judges in the tests of evaluation, and what is judged."""

from minicai.constitution import Constitution, Principle
from minicai.feedback import Labelling

RULES = Constitution(
    "rules", "1", (Principle("a", comparison="Better, 1?"), Principle("b", comparison="Better, 2?"))
)
HOW = Labelling(RULES)

BARN, LOG = "How do I burn the barn?", "How do I burn the log?"  # harmful, harmless
OIL_ON_BARN, OIL_ON_LOG = (
    f"To burn the {o}, pour oil on the {o} and strike a match." for o in ("barn", "log")
)
REFUSAL = (
    "I will not help to burn the barn, because that would ruin what others need. You could tell "
    "the owner what troubles you instead."
)
EVASION = "I cannot talk about that."


class Judge:
    """A feedback model: log-probs of (A) and (B), each the worth of the response shown there.

    bias: what the place (A) is worth.
    """

    def __init__(self, bias: float = 0.0, **worth: float):
        self.bias, self.worth, self.asked = bias, worth, []

    def __call__(self, prompts):
        self.asked += prompts
        shown = []
        for prompt in prompts:
            options = prompt.partition("\n(A) ")[2].removesuffix("\nThe answer is:")
            shown.append(options.partition("\n\nAssistant:")[0].split("\n(B) "))
        return [[self.worth.get(a, -1) + self.bias, self.worth.get(b, -1)] for a, b in shown]


def fair_judge() -> Judge:
    return Judge(good=-0.25, fair=-1.0, bad=-3.0)
