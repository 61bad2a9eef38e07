"""Where the sides of the comparison with TRL run: each in a process of its own, with files of its own."""

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rank_data import HOUSE, Row

Result = dict[str, Any]


class SideFailed(RuntimeError):
    """A side's process ended badly: most often it was too much for the memory."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Where files go, where human rankings are, and how often each side runs."""

    folder: Path
    data: Path
    repeats: int
    variants: bool = True

    def prepare(self, row: Row) -> Path:
        folder = self.folder / row.name
        row.write(folder)
        self._python("benchmarks.rank_data", str(folder), str(self.data), row=row)
        return folder

    def run(self, row: Row, folder: Path, side: str) -> Result:
        """One process of one side."""
        file = folder / f"{side}.json"
        self._python("benchmarks.rank_sides", str(folder), side, str(file), row=row)
        return json.loads(file.read_text(encoding="utf-8"))

    def _python(self, module: str, *words: str, row: Row) -> None:
        run_python([sys.executable, "-m", module, *words], row, cache=self.folder / "cache")


def run_python(command: list[str], row: Row, *, cache: Path) -> None:
    """A process without network or telemetry, with the row's threads and device, and with nothing kept from an earlier one.

    Raises: SideFailed with the end of what it said."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    if row.device == "cpu":
        offline["CUDA_VISIBLE_DEVICES"] = ""
    offline["RANKLOOP_CACHE"] = str(cache / uuid.uuid4().hex)  # no run finds what another one computed
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": str(row.threads), "MKL_NUM_THREADS": str(row.threads)}
    done = subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        what = " ".join(["python", *command[1:]])
        raise SideFailed(f"{what} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
