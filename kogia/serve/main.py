"""`kogia serve PATH`."""

from importlib.util import find_spec

from kogia.serve.config import ServeConfig

PARTS = ("fastapi", "uvicorn", "prometheus_client", "markdown_it", "nh3", "pygments", "latex2mathml")
"""Modules of the extra `server`."""


def main(config: ServeConfig) -> int:
    missing = [name for name in PARTS if find_spec(name) is None]
    if missing:
        raise ValueError(f"kogia serve takes {', '.join(missing)}, not installed here; pip install 'kogia[server]'")
    from kogia.serve.process import serve

    return serve(config)
