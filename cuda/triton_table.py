"""What `python -m cuda.tune_triton` measured: (operation, kind, *key) -> triton_tilings.Tiling. Written by it."""

MEASURED: dict[tuple, tuple[int, ...]] = {}
