"""`kogia serve PATH`."""

from importlib.util import find_spec

from kogia.serve.config import ServeConfig

PARTS = ("fastapi", "uvicorn", "prometheus_client", "markdown_it", "nh3", "pygments", "latex2mathml")
"""Modules of the extra `server`."""
TELEMETRY = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
"""Those of `telemetry`."""


def main(config: ServeConfig) -> int:
    missing = [name for name in PARTS if find_spec(name) is None]
    if missing:
        raise ValueError(f"kogia serve takes {', '.join(missing)}, not installed here; pip install 'kogia[server]'")
    if config.otlp_endpoint is not None and not all(map(_is_there, TELEMETRY)):
        raise ValueError(
            "otlp_endpoint takes the OpenTelemetry SDK, not installed here; pip install 'kogia[telemetry]'"
        )
    from kogia.serve.process import serve

    return serve(config)


def _is_there(name: str) -> bool:
    """Also where the package that it is in is not."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
