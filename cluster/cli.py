"""The command `rev2net-cluster`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dataloaders.errors import UserError, describe_failure

if TYPE_CHECKING:
    from cluster.submit import Placement
    from rev2net.config import Config

_SUBMIT_EXAMPLES = """examples:
  rev2net-cluster submit configs/demo.yaml --gpus-per-node 2 --site configs/cluster/example.yaml
  rev2net-cluster submit configs/demo.yaml --nodes 2 --gpus-per-node 8 train.global_batch=64 --dry-run
  rev2net-cluster submit configs/demo.yaml --tasks-per-node 2 --executor local
"""
_PREPARE_EXAMPLES = """What follows is what `rev2net prepare` takes, see `rev2net prepare kinetics --help` and so on.

examples:
  rev2net-cluster prepare kinetics videos data/k400 --annotations train.csv val.csv --tasks 64
  rev2net-cluster prepare folder videos data --flow-device cuda --tasks 8 --site configs/cluster/example.yaml --dry-run
"""
_DOCTOR_EXAMPLES = """examples:
  rev2net-cluster doctor
  rev2net-cluster doctor --processes 8 --storage /data/kinetics
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 0, 2 after a user's mistake, 1 after a failure."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"rev2net-cluster: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"rev2net-cluster failed: {describe_failure(error)}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    # Overrides may stand anywhere, which argparse's own positionals do not allow beside sub-commands.
    options, rest = _parser().parse_known_args(argv)
    if options.command == "prepare":
        return _prepare(options, rest)
    unknown = [text for text in rest if text.startswith("-") or "=" not in text or options.command != "submit"]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not an option of {options.command}: see rev2net-cluster --help")
    if options.command == "submit":
        return _submit(options, [*options.overrides, *rest])
    return _doctor(options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rev2net-cluster", description="Rev2Net on a cluster.")
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser(
        "submit",
        help="train a configuration as a Slurm job",
        description="Train a configuration as a Slurm job (through submitit), one task per GPU.",
        epilog=_SUBMIT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    submit.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the experiment")
    submit.add_argument("overrides", metavar="key=value", nargs="*", help="changes to the configuration")
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    submit.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs, and tasks, on each machine")
    submit.add_argument("--tasks-per-node", type=int, metavar="T", help="tasks on each machine without GPUs")
    _add_job_options(submit)
    prepare = commands.add_parser(
        "prepare",
        help="prepare a data set as a Slurm array",
        description="Prepare a data set as a Slurm array: each task transcodes its share, a last job makes the shards.",
        usage="%(prog)s {folder,list,ucf101,hmdb51,kinetics} ... --tasks N [options]",
        epilog=_PREPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    prepare.add_argument("--tasks", type=int, required=True, metavar="N", help="tasks of the array")
    _add_job_options(prepare)
    doctor = commands.add_parser(
        "doctor",
        help="check this machine: versions, codecs, all-reduce, storage",
        description="Check this machine within a minute; exit status 1 if something needed is broken.",
        epilog=_DOCTOR_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--processes", type=int, default=2, metavar="N", help="ranks of the all-reduce (default 2)")
    doctor.add_argument("--storage", type=Path, metavar="DIR", help="measure reading the files of this folder")
    return parser


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", type=Path, metavar="YAML", help="partition, account and so on of your cluster")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm", help="where (default slurm)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/jobs"),
        metavar="DIR",
        help="scripts, logs and pickles of the jobs, on storage that all nodes see (default runs/jobs)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script, submit nothing")


def _prepare(options: argparse.Namespace, words: list[str]) -> int:
    from cluster.prepare import array_script, run_local, submit_array
    from cluster.site import load_site
    from dataloaders.prepare_cli import add_prepare_arguments, read_listing, read_settings

    if options.tasks < 1:
        raise UserError(f"--tasks {options.tasks} is not possible: give 1 or more")
    parser = _Parser(prog="rev2net prepare")
    add_prepare_arguments(parser)
    args = parser.parse_args(words)
    # A mistake is better found here than after waiting in the queue. The GPU, if any, is the tasks' own.
    replace(read_settings(args), flow_device="cpu").check()
    if args.share is not None:
        raise UserError("--share is what each of the tasks gets by itself: leave it out")
    site = load_site(options.site)
    gpus = 1 if args.flow_device == "cuda" and not args.no_flow else 0
    if options.dry_run:
        _refuse_dry_run_of_local(options)
        sys.stdout.write(array_script(tasks=options.tasks, gpus=gpus, site=site, folder=options.folder))
        return 0
    listing = read_listing(args)
    if options.executor == "slurm":
        first, last = submit_array(words, tasks=options.tasks, gpus=gpus, site=site, folder=options.folder)
        print(
            f"job {first.job_id.split('_')[0]}: {len(listing.clips)} clips in {options.tasks} tasks; "
            f"then job {last.job_id} makes the shards and writes to {last.paths.stdout}"
        )
        return 0
    failure = run_local(words, tasks=options.tasks, gpus=gpus, site=site, folder=options.folder)
    if failure is not None:
        print(f"preparation failed: {failure}", file=sys.stderr)
    return 0 if failure is None else 1


def _refuse_dry_run_of_local(options: argparse.Namespace) -> None:
    if options.executor != "slurm":
        raise UserError("--dry-run shows the script of --executor slurm; the local executor has none")


def _submit(options: argparse.Namespace, overrides: list[str]) -> int:
    from cluster.site import load_site
    from cluster.submit import Placement, require_slurm, sbatch_script, submit_local, submit_slurm, wait_local
    from cluster.task import Task, TrainWork
    from rev2net.config import load_config

    placement = Placement.from_options(
        nodes=options.nodes, gpus_per_node=options.gpus_per_node, tasks_per_node=options.tasks_per_node
    )
    site = load_site(options.site)
    name = f"rev2net-{options.config.stem}"
    if options.dry_run:
        _refuse_dry_run_of_local(options)
    if options.executor == "slurm" and not options.dry_run:
        require_slurm()
    config = load_config(options.config, overrides)
    _check_batch(config, placement)
    if options.dry_run:
        sys.stdout.write(sbatch_script(placement=placement, site=site, folder=options.folder, name=name))
        return 0
    task = Task(work=TrainWork(config=config))
    if options.executor == "slurm":
        job = submit_slurm(task, placement=placement, site=site, folder=options.folder, name=name)
    else:
        job = submit_local(task, placement=placement, site=site, folder=options.folder)
    first = job.task(0).paths
    print(f"job {job.job_id}: {placement.nodes} x {placement.tasks_per_node} tasks; rank 0 writes to {first.stdout}")
    if options.executor == "slurm":
        return 0
    failure = wait_local(job)
    if failure is None:
        return 0
    print(f"job {job.job_id} failed: {failure}", file=sys.stderr)
    return 1


def _check_batch(config: Config, placement: Placement) -> None:
    # Training refuses it as well, but only after the job has waited in the queue.
    train = config.train
    if train.global_batch % (placement.tasks * train.micro_batch):
        raise UserError(
            f"train.global_batch={train.global_batch} cannot be shared by {placement.tasks} tasks in micro-batches of "
            f"train.micro_batch={train.micro_batch}: make it a multiple of {placement.tasks * train.micro_batch}"
        )


def _doctor(options: argparse.Namespace) -> int:
    from cluster.doctor import diagnose

    if options.processes < 1:
        raise UserError(f"--processes {options.processes} is not possible: give 1 or more")
    healthy = True
    for row in diagnose(processes=options.processes, storage=options.storage):
        print(f"{row.state:<5} {row.name:<20} {row.text}", flush=True)
        healthy = healthy and row.state != "FAIL"
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
