"""What a cluster asks of its users: one YAML file per site, read into a typed model."""

from __future__ import annotations

import difflib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dataloaders.errors import UserError
from dataloaders.yaml_file import read_mapping


class Site(BaseModel):
    """Settings of one Slurm site. Unknown keys are refused.

    What is not given is left to Slurm's own defaults, but for the two times.

    Only `time_minutes`, `signal_delay_s`, `max_timeouts` and `env` mean something to the local executor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    wckey: str | None = Field(None, description="workload characterization key, where the site keeps account of them")
    time_minutes: int = Field(1440, gt=0, description="time limit of one stay in the queue; the job requeues itself")
    memory_gb: float | None = Field(None, gt=0, description="per node")
    cpus_per_task: int | None = Field(None, gt=0)
    signal_delay_s: int = Field(120, gt=0, description="how long before the time limit Slurm sends the signal")
    max_timeouts: int = Field(100, ge=0, description="how often the job may run into its time limit and go on")
    env: dict[str, str] = Field(default_factory=dict, description="exported before the tasks start")
    setup: tuple[str, ...] = Field((), description="shell commands before the tasks start, such as 'module load gcc'")
    container: str | None = Field(
        None,
        min_length=1,
        description="command before the interpreter, such as 'apptainer exec --nv /images/rev2net.sif'",
    )
    python: str | None = Field(
        None,
        min_length=1,
        description="interpreter on the nodes, or in the container; the one that submits if not given",
    )

    @model_validator(mode="after")
    def _check(self) -> Site:
        # Slurm may send the signal a minute early: a job that has just begun would be killed by it.
        if self.signal_delay_s + 60 >= 60 * self.time_minutes:
            raise ValueError(
                f"signal_delay_s={self.signal_delay_s} leaves no time to train within time_minutes={self.time_minutes} "
                "(Slurm may send the signal a minute early): make it shorter, or the time longer"
            )
        return self


def load_site(path: Path | None) -> Site:
    """The settings in a YAML file; the defaults when there is none.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest valid one), a value of another type.
    """
    if path is None:
        return Site()
    if not path.is_file():
        raise UserError(f"there is no site file {path}: give a YAML file such as configs/cluster/example.yaml")
    tree = read_mapping(path, "a site file is a mapping of settings")
    try:
        return Site.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(where, Site.model_fields, n=1, cutoff=0.0)
        return f"unknown site setting {where!r}; the nearest valid one is {close[0]!r}"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}={first['input']!r}: {message}" if where else message
