"""Stage 0: what every other room uses - command lines, run logs, timing, result tables, plots, process launch."""
