"""vLLM's engine API as first specified, by its own names: thin adapters over this package.

New code uses `WeightSync`. Errors of arguments are `ValueError`, as they were.
"""
