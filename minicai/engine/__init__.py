"""How it runs fast and everywhere: models, attention, sampling, checkpoints, processes."""
