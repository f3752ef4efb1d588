"""A real MLflow server on this machine, with a store of its own, that can be stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from tiny import environment, free_port, wait


class MlflowServer:
    """The server of a folder.

    Attributes:
        uri: where it answers while it runs.
    """

    def __init__(self, folder: Path) -> None:
        self._port, self._folder = free_port(), folder
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it answers."""
        words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        words += ["--default-artifact-root", f"{self._folder}/artifacts"]
        with (self._folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *words], stdout=log, stderr=log, env=environment(), start_new_session=True
            )
        wait("the MLflow server", self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return True
        except OSError:
            return False

    def stop(self) -> None:
        """kill -9 of all its processes, if it runs."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
