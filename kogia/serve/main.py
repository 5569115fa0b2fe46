"""`kogia serve PATH`."""

from kogia.serve.config import ServeConfig


def main(config: ServeConfig) -> int:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"kogia serve takes FastAPI and uvicorn ({error}); pip install 'kogia[server]'") from None
    from kogia.serve.process import serve

    return serve(config)
