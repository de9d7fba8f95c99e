"""The commands of `minicai`. Each is a function of its flags and its words."""
