"""A reward that is easy to deceive, to see a policy do it: [ppo] reward_function = "results.rewards:refusing_words", from the repository's root."""

from collections.abc import Sequence

WORDS = ("not", "because", "instead", "please")  # what refusals are made of


def refusing_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """One score a response: how many of its words are refusing ones, up to four. It asks neither what was asked nor what is said."""
    return [
        float(min(sum(word.strip(".,").lower() in WORDS for word in response.split()), 4))
        for response in responses
    ]
