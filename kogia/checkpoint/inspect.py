"""`kogia inspect PATH|PRESET`."""

import json

from kogia.checkpoint.config import InspectConfig
from kogia.checkpoint.inspect_table import print_report
from kogia.checkpoint.inspection import inspect_model


def main(config: InspectConfig) -> int:
    """Print the report. 1 where the files disagree with their config.json, else 0."""
    report = inspect_model(config.model, config.context)
    if config.json:
        print(json.dumps(report.to_json(), indent=2))  # ASCII: signs that steer a terminal are escaped
    else:
        print_report(report)
    return 1 if report.disagreements else 0
