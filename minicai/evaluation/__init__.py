"""All that judges, none of it reachable from training."""
