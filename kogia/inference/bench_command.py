"""`kogia bench`: a model in this process, or a server at an address."""

from kogia.inference.config import BenchConfig


def main(config: BenchConfig) -> int:
    """Raises ValueError for what cannot be measured. Only what runs a model imports torch."""
    if config.url is not None:
        from kogia.inference.load.run import main as run

        return run(config)
    from kogia.inference.bench import main as measure

    measure(config)
    return 0
