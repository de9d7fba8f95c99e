"""The commands around the three stages."""
