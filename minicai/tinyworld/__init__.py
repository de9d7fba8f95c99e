"""The embedded default: a synthetic world, its prompts, its base model, and the exact judge that evaluation alone may use."""
