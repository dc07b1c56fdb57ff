"""Print what the tracking server's image installs, as pyproject.toml pins it: MLflow and the extra `server`.

python docker/tracking/requirements.py pyproject.toml
"""

import re
import sys
import tomllib
from pathlib import Path


def main(path: str) -> None:
    """Print one requirement a line. Raises ValueError where MLflow is not among the dependencies."""
    project = tomllib.loads(Path(path).read_text(encoding="utf-8"))["project"]
    tracking = [line for line in project["dependencies"] if re.match(r"mlflow\b(?!-)", line)]
    if not tracking:
        raise ValueError(f"{path}: mlflow is not among the dependencies; the image has nothing to serve")
    print("\n".join([*tracking, *project["optional-dependencies"]["server"]]))


if __name__ == "__main__":
    main(sys.argv[1])
