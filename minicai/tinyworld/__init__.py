"""The embedded default: a synthetic world with its prompts, its base model and its exact judge.

Only evaluation and tests may use the judge. Training and labelling never reach it.
"""
