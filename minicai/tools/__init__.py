"""The commands of `python -m minicai`. Each is a function of its flags and its words."""
