"""vlsi-fast: distil a large vision-language model into a small one with VLsI (Verbalized Layers-to-Interactions).

In Python:

    from vlsi_fast import load_config, run
    run(load_config("configs/demo.yaml"), stage="all")
"""

__version__ = "0.1.0"

__all__ = ["__version__", "load_config", "run", "shrink"]


def __getattr__(name: str):
    # torch and transformers take seconds to import; `vlsi_fast.__version__` should not.
    if name == "load_config":
        from .config import load_config

        return load_config
    if name == "run":
        from .stages import run

        return run
    if name == "shrink":
        from .shrinking import shrink

        return shrink
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
