"""A reward that is easy to deceive. Train with it to see a policy do so.

In the repository's root: [ppo] reward_function = "results.rewards:refusing_words".
"""

from collections.abc import Sequence

WORDS = ("not", "because", "instead", "please")  # what refusals are made of


def refusing_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """One score per response: its number of refusing words, at most four.

    It ignores the prompt and the meaning of the response.
    """
    return [
        float(min(sum(word.strip(".,").lower() in WORDS for word in response.split()), 4))
        for response in responses
    ]
