"""Data sets of the Hugging Face Hub, `hf:org/name` or `hf:org/name/PATTERN`: files of a snapshot in the local cache.

As with models (`kogia.checkpoint.hub`), what is in the cache is taken as it is; the network is asked for what is not.
"""

from pathlib import Path

from kogia.data.config import HUB, file_kind

ENDS = ("parquet", "jsonl", "jsonl.gz", "json", "json.gz", "txt", "txt.gz")


def find_dataset(spec: str) -> list[str]:
    """The data files that `spec` names, sorted. ValueError that says why there are none, and how to get them."""
    org, _, rest = spec.removeprefix(HUB).partition("/")
    name, _, pattern = rest.partition("/")
    if not org or not name:
        raise ValueError(f"data source {spec!r}: write it as {HUB}org/name or {HUB}org/name/data/*.parquet")
    repository = f"{org}/{name}"
    patterns = [pattern] if pattern else [f"**/*.{end}" for end in ENDS] + [f"*.{end}" for end in ENDS]
    snapshot = _snapshot(repository, patterns, spec)
    found = {str(path) for each in patterns for path in snapshot.glob(each) if path.is_file() and file_kind(path.name)}
    if not found:
        raise ValueError(
            f"data source {spec!r}: the data set holds no file {pattern or 'that can be read'} (.parquet, .jsonl, "
            ".json, .txt); name a pattern behind it"
        )
    return sorted(found)


def _snapshot(repository: str, patterns: list[str], spec: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        try:
            cached = Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
            if any(any(cached.glob(pattern)) for pattern in patterns):
                return cached
        except (OSError, ValueError):  # not in the cache
            pass
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # what can go wrong in a network is a matter of three libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data source {spec!r}: not in the local cache, and the Hugging Face Hub could not be asked ({reason}); "
            f"fetch it where there is a network with `hf download --repo-type dataset {repository}`, or name files"
        ) from error
