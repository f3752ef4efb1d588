"""The command `rev2net-cluster`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dataloaders.errors import UserError, describe_failure, stop_printing

if TYPE_CHECKING:
    from cluster.doctor import Row
    from cluster.jobs import JobFolder
    from cluster.site import Site
    from cluster.submit import Placement
    from rev2net.config import Config

_SUBMIT_EXAMPLES = """examples:
  rev2net-cluster submit configs/demo.yaml --gpus-per-node 2 --site configs/cluster/example.yaml
  rev2net-cluster submit configs/demo.yaml --nodes 2 --gpus-per-node 8 train.global_batch=128 --dry-run
  rev2net-cluster submit configs/demo.yaml --tasks-per-node 2 --executor local
"""
_PREPARE_EXAMPLES = """What follows is what `rev2net prepare` takes, see `rev2net prepare kinetics --help` and so on.

examples:
  rev2net-cluster prepare kinetics videos data/kinetics400 --annotations train.csv val.csv --tasks 64
  rev2net-cluster prepare folder videos data --flow-device cuda --tasks 8 --site configs/cluster/example.yaml --dry-run
"""
_SWEEP_EXAMPLES = """The tasks share the runs of `rev2net sweep`; what a lost task was at, another one goes on with.
Where they are many, let them log to a server (MLFLOW_TRACKING_URI, or tracking.uri=): SQLite is for few.

examples:
  rev2net-cluster sweep configs/demo.yaml --tasks 6 --gpus-per-node 1 --site configs/cluster/example.yaml
  rev2net-cluster sweep configs/ucf101-imagenet/rev2net.yaml --full --tasks 64 --gpus-per-node 8 --dry-run
  rev2net-cluster sweep configs/demo.yaml --tasks 2 --tasks-per-node 1 --executor local
"""
_JOB_EXAMPLES = """A JOB is the number that submit prints, or the name of the job's folder.

examples:
  rev2net-cluster status
  rev2net-cluster logs 4711 --follow
  rev2net-cluster logs 4711 --rank 8 --stderr
  rev2net-cluster cancel 4711 rev2net-demo-20261123-141500
"""
_DOCTOR_EXAMPLES = """examples:
  rev2net-cluster doctor
  rev2net-cluster doctor --processes 8 --storage /data/kinetics
  rev2net-cluster doctor --nodes 4 --gpus-per-node 8 --site site.yaml --storage /data/kinetics
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 0, 2 after a user's mistake, 1 after a failure, 130 stopped."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"rev2net-cluster: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `logs JOB | head`
        stop_printing()
        return 1
    except (OSError, RuntimeError) as error:
        print(f"rev2net-cluster failed: {describe_failure(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rev2net-cluster: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    # Overrides may stand anywhere, which argparse's own positionals do not allow beside sub-commands.
    options, rest = _parser().parse_known_args(argv)
    if options.command == "prepare":
        return _prepare(options, rest)
    trains = options.command in ("submit", "sweep")
    unknown = [text for text in rest if text.startswith("-") or "=" not in text or not trains]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not an option of {options.command}: see rev2net-cluster --help")
    if trains:
        return {"submit": _submit, "sweep": _sweep}[options.command](options, [*options.overrides, *rest])
    return {"status": _status, "logs": _logs, "cancel": _cancel, "doctor": _doctor}[options.command](options)


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
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    _add_ranks_of_a_node(submit)
    _add_experiment(submit)
    _add_job_options(submit)
    _add_sweep(commands)
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
    _add_job_commands(commands)
    doctor = commands.add_parser(
        "doctor",
        help="check this machine or some nodes: versions, codecs, all-reduce, storage",
        description="Check this machine, or nodes in a Slurm job, within a minute; exit status 1 if it is broken.",
        epilog=_DOCTOR_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--processes", type=int, metavar="N", help="ranks of the all-reduce here (default 2)")
    doctor.add_argument("--storage", type=Path, metavar="DIR", help="measure reading the files of this folder")
    doctor.add_argument("--nodes", type=int, metavar="N", help="check so many nodes, and an all-reduce over them")
    _add_ranks_of_a_node(doctor)
    _add_site(doctor)
    return parser


def _add_ranks_of_a_node(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs, and tasks, on each machine")
    parser.add_argument("--tasks-per-node", type=int, metavar="T", help="tasks on each machine without GPUs")


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the experiment")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes to the configuration")


def _add_sweep(commands: argparse._SubParsersAction[_Parser]) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="search the loss weights as a Slurm array",
        description="Search the loss weights as a Slurm array; each task trains one run after another on one machine.",
        epilog=_SWEEP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_experiment(sweep)
    sweep.add_argument("--tasks", type=int, required=True, metavar="N", help="tasks of the array")
    sweep.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of each task, one rank on each")
    sweep.add_argument("--tasks-per-node", type=int, metavar="T", help="ranks of each task without GPUs")
    sweep.add_argument("--full", action="store_true", help="all combinations, not one weight at a time")
    _add_job_options(sweep)


def _add_job_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    texts = {
        "status": (
            "how jobs stand",
            "One line for each job, the newest last: its state, its progress, its last words.",
        ),
        "logs": ("what a rank of a job writes", "Print the log of one rank (of a preparation: of one share)."),
        "cancel": ("end jobs", "End jobs that run or wait; a training saves its state, and submit goes on from it."),
    }
    how_many: dict[str, int | str] = {"status": "*", "logs": 1, "cancel": "+"}
    for name, (summary, description) in texts.items():
        parser = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=_JOB_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("jobs", metavar="JOB", nargs=how_many[name])
        _add_folder(parser, "where the jobs' folders are (default runs/jobs)")
        if name == "logs":
            parser.add_argument("--rank", type=int, default=0, metavar="N", help="which (default 0)")
            parser.add_argument("--stderr", action="store_true", help="its standard error, not its standard output")
            parser.add_argument("--follow", action="store_true", help="go on until the job has ended")


def _add_folder(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--folder", type=Path, default=Path("runs/jobs"), metavar="DIR", help=text)


def _add_site(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", type=Path, metavar="YAML", help="partition, account and so on of your cluster")
    _add_folder(parser, "each job gets a folder of its own in it, on storage that all nodes see (default runs/jobs)")


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    _add_site(parser)
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm", help="where (default slurm)")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script, submit nothing")


def _prepare(options: argparse.Namespace, words: list[str]) -> int:
    from cluster.prepare import Preparation
    from cluster.site import load_site
    from cluster.submit import require_slurm
    from dataloaders.prepare_cli import add_prepare_arguments, read_listing, read_settings
    from dataloaders.reuse import open_donors

    if options.tasks < 1:
        raise UserError(f"--tasks {options.tasks} is not possible: give 1 or more")
    parser = _Parser(prog="rev2net prepare")
    add_prepare_arguments(parser)
    args = parser.parse_args(words)
    # A mistake is better found here than after waiting in the queue. The GPU, if any, is the tasks' own.
    settings = read_settings(args)
    replace(settings, flow_device="cpu").check()
    open_donors(args.reuse, settings)
    if args.share is not None:
        raise UserError("--share is what each of the tasks gets by itself: leave it out")
    preparation = Preparation(
        words=tuple(words),
        out=args.out,
        tasks=options.tasks,
        gpus=1 if args.flow_device == "cuda" and not args.no_flow else 0,
        site=load_site(options.site),
        parent=options.folder,
    )
    if options.dry_run:
        _refuse_dry_run_of_local(options)
        sys.stdout.write(preparation.script())
        return 0
    listing = read_listing(args)
    if options.executor == "slurm":
        require_slurm()
        job, log = preparation.submit()
        print(
            f"job {job.id}: {len(listing.clips)} clips in {options.tasks} tasks; "
            f"then job {job.numbers[-1]} makes the shards and writes to {log}"
        )
        return 0
    failure = preparation.run_here()
    if failure is not None:
        print(f"preparation failed: {failure}", file=sys.stderr)
    return 0 if failure is None else 1


def _sweep(options: argparse.Namespace, overrides: list[str]) -> int:
    from cluster.site import load_site
    from cluster.submit import Placement, check_accelerator, require_slurm
    from cluster.sweep import SweepArray, SweepWork
    from rev2net.config import load_config
    from rev2net.grid import Search, sweep_config

    if options.tasks < 1:
        raise UserError(f"--tasks {options.tasks} is not possible: give 1 or more")
    config = load_config(options.config, overrides)
    array = SweepArray(
        work=SweepWork(config=sweep_config(config), search=Search.of(config, full=options.full)),
        name=f"rev2net-sweep-{options.config.stem}",
        tasks=options.tasks,
        placement=Placement.from_options(
            nodes=1, gpus_per_node=options.gpus_per_node, tasks_per_node=options.tasks_per_node
        ),
        site=load_site(options.site),
        parent=options.folder,
    )
    _check_batch(config, array.placement)
    check_accelerator(array.placement, array.site)
    if options.dry_run:
        _refuse_dry_run_of_local(options)
        sys.stdout.write(array.script())
        return 0
    if options.executor == "slurm":
        require_slurm()
        job, log = array.submit()
        print(f"job {job.id}: {options.tasks} tasks work on {job.output}; the first writes to {log}")
        return 0
    failure = array.run_here()
    if failure is not None:
        print(f"sweep failed: {failure}", file=sys.stderr)
    return 0 if failure is None else 1


def _refuse_dry_run_of_local(options: argparse.Namespace) -> None:
    if options.executor != "slurm":
        raise UserError("--dry-run shows the script of --executor slurm; the local executor has none")


def _submit(options: argparse.Namespace, overrides: list[str]) -> int:
    from cluster.jobs import possible_folders
    from cluster.site import load_site
    from cluster.submit import Placement, check_accelerator, latest_of, require_slurm, sbatch_script
    from rev2net.config import load_config

    placement = Placement.from_options(
        nodes=options.nodes, gpus_per_node=options.gpus_per_node, tasks_per_node=options.tasks_per_node
    )
    site = load_site(options.site)
    name = f"rev2net-{options.config.stem}"
    if options.dry_run:
        _refuse_dry_run_of_local(options)
    elif options.executor == "slurm":
        require_slurm()
    if options.executor == "local" and placement.nodes != 1:
        raise UserError(f"--executor local has one machine, not {placement.nodes}: give --nodes 1")
    config = load_config(options.config, overrides)
    _check_batch(config, placement)
    check_accelerator(placement, site)
    if options.dry_run:
        folder = next(possible_folders(options.folder, name))
        latest = latest_of(config)
        sys.stdout.write(sbatch_script(placement=placement, site=site, folder=folder, name=name, latest=latest))
        return 0
    _refuse_second(options, config.output)
    return _start_training(config, placement, site, name, options)


def _start_training(config: Config, placement: Placement, site: Site, name: str, options: argparse.Namespace) -> int:
    from cluster.jobs import Job, new_folder, now, record
    from cluster.submit import latest_of, submit_local, submit_slurm, wait_local
    from cluster.task import Task, TrainWork

    task = Task(work=TrainWork(config=config))
    with new_folder(options.folder, name, config.yaml()) as folder:
        if options.executor == "slurm":
            latest = latest_of(config)
            job = submit_slurm(task, placement=placement, site=site, folder=folder, name=name, latest=latest)
        else:
            job = submit_local(task, placement=placement, site=site, folder=folder)
        submitted = Job(
            ids=(job.job_id,),
            ranks=placement.tasks,
            kind="train",
            name=name,
            output=str(Path(config.output).absolute()),
            executor=options.executor,
            submitted=now(),
        )
        record(folder, submitted)
    first = job.task(0).paths
    print(
        f"job {job.job_id}: {placement.nodes} x {placement.tasks_per_node} tasks; rank 0 writes to {first.stdout}",
        flush=True,
    )
    if options.executor == "slurm":
        return 0
    failure = wait_local(job)
    if failure is None:
        return 0
    print(f"job {job.job_id} failed: {failure}", file=sys.stderr)
    return 1


def _refuse_second(options: argparse.Namespace, output: str) -> None:
    """A job that is being cancelled may still save: another one in its folder would begin before that."""
    from cluster.jobs import read_jobs
    from cluster.status import read_statuses

    place = str(Path(output).absolute())
    jobs = (each for each in read_jobs(options.folder) if each.job.executor == options.executor)
    own = [each for each in jobs if each.job.kind == "train" and each.job.output == place]
    for each, status in zip(own, read_statuses(own), strict=True):
        if status.alive:
            raise UserError(
                f"job {each.job.id} ({status.state}) trains in {output}: wait until it has ended, or choose another "
                "output=; `rev2net-cluster cancel` ends it, and it saves first"
            )


def _check_batch(config: Config, placement: Placement) -> None:
    # Training refuses it as well, but only after the job has waited in the queue.
    total, micro, tasks = config.train.global_batch, config.train.micro_batch, placement.tasks
    step = tasks * micro
    if total % step == 0:
        return
    fits = map(str, config.train.possible_ranks)
    batches = [str(batch) for batch in (total // step * step, (total // step + 1) * step) if batch]
    raise UserError(
        f"train.global_batch={total} cannot be shared by {tasks} tasks in micro-batches of train.micro_batch={micro}: "
        f"make it {' or '.join(batches)}, or take {' or '.join(fits)} tasks"
    )


def _selected(options: argparse.Namespace) -> tuple[list[JobFolder], list[JobFolder]]:
    """The jobs that are named, and all there are."""
    from cluster.jobs import read_jobs, select

    known = read_jobs(options.folder)
    return select(known, options.jobs, options.folder), known


def _status(options: argparse.Namespace) -> int:
    from cluster.status import read_statuses, table

    jobs, _ = _selected(options)
    print(table(jobs, read_statuses(jobs)) if jobs else f"no jobs in {options.folder}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    from cluster.status import show_log

    ((job,), _) = _selected(options)
    try:
        show_log(job, options.rank, stderr=options.stderr, follow=options.follow)
    except KeyboardInterrupt:  # how one ends --follow
        print()
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from cluster.status import cancel

    jobs, known = _selected(options)
    cancel(jobs, known)
    print(f"cancelled: {', '.join(each.job.id for each in jobs)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from cluster.doctor import diagnose

    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes {options.processes} is not possible: give 1 or more")
    here = (options.nodes, options.gpus_per_node, options.tasks_per_node, options.site) == (None,) * 4
    rows = diagnose(processes=options.processes or 2, storage=options.storage) if here else _diagnose_nodes(options)
    healthy = True
    for row in rows:
        print(f"{row.state:<5} {row.name:<20} {row.text}", flush=True)
        healthy = healthy and row.state != "FAIL"
    return 0 if healthy else 1


def _diagnose_nodes(options: argparse.Namespace) -> Iterator[Row]:
    from cluster.doctor_nodes import diagnose_nodes
    from cluster.site import load_site
    from cluster.submit import Placement, require_slurm

    if options.nodes is None:
        raise UserError("--gpus-per-node, --tasks-per-node and --site are for the nodes of a job: give --nodes N too")
    if options.processes is not None:
        raise UserError("--processes is for this machine, --nodes for others: leave one of them out")
    placement = Placement.from_options(
        nodes=options.nodes, gpus_per_node=options.gpus_per_node, tasks_per_node=options.tasks_per_node
    )
    site = load_site(options.site)
    require_slurm()
    return diagnose_nodes(placement=placement, site=site, storage=options.storage, parent=options.folder)


if __name__ == "__main__":
    sys.exit(main())
