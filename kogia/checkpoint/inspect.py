"""`kogia inspect [PATH|PRESET]`."""

import json
from typing import Any

from kogia.checkpoint.config import InspectConfig
from kogia.checkpoint.inspect_table import print_presets, print_report
from kogia.checkpoint.inspection import inspect_model
from kogia.model.presets import PRESETS


def main(config: InspectConfig) -> int:
    """Print the report, or what presets there are. 1 where the files disagree with their config.json, else 0."""
    if not config.model:
        _list_presets(config)
        return 0
    report = inspect_model(config.model, config.context)
    if config.json:
        _print_json(report.to_json())
    else:
        print_report(report)
    return 1 if report.disagreements else 0


def _list_presets(config: InspectConfig) -> None:
    reports = [inspect_model(name, config.context) for name in PRESETS]
    if config.json:
        _print_json({"presets": [report.to_json() for report in reports]})
    else:
        print_presets(reports)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))  # ASCII: signs that steer a terminal are escaped
