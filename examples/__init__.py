"""Whole experiments, one file each, beside the three scripts. Copy one and change it."""
