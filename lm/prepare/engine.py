"""Stages: what is run in which order, by the processes of this machine or by Apache Beam.

A stage is many tasks. Each is a pure function from files to files, and leaves its report beside
them: a task whose report is there, with all the files that it names, is done. So a preparation that
was killed goes on, and one that is whole has nothing to do. A stage's folder is named by the hash
of all that decides its contents: its settings, its code, the packages it uses, what it reads.
"""

import collections
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import inspect
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from etils import epath

from lm import files, progress
from lm.prepare import shards
from lm.prepare.shards import Work

TASKS_OF_A_PROCESS = 64  # then another takes its place, with none of its memory


class Made:
    """The reports of the stages that are done: what plans are made of.

    Attributes:
      documents: the stage that wrote the documents as they are now.
    """

    def __init__(self):
        self._reports: dict[str, list[dict]] = {}
        self.documents = ""

    def add(self, stage: str, reports: list[dict]) -> "Made":
        self._reports[stage] = reports
        if any(output["kind"] == "documents" for report in reports for output in report["outputs"]):
            self.documents = stage
        return self

    def reports(self, stage: str) -> list[dict]:
        """The reports of a stage, in the order of its tasks."""
        return self._reports[stage]

    def outputs(self, stage: str, kind: str) -> list[dict]:
        """The outputs of a kind, in the order of tasks and within them."""
        outputs = []
        for report in self._reports[stage]:
            outputs += [output for output in report["outputs"] if output["kind"] == kind]
        return outputs

    def shards(self) -> list[str]:
        """The documents as they are now.

        Raises:
          ValueError: no stage has written any.
        """
        if not self.documents:
            counts = shards.merge(next(iter(self._reports.values())))["counts"]
            raise ValueError(f"the sources gave no documents; what was found is {counts}")
        return [output["path"] for output in self.outputs(self.documents, "documents")]

    def dropped(self) -> dict[str, int]:
        """How many documents went by each rule, so far."""
        dropped: dict[str, int] = {}
        for reports in self._reports.values():
            for what, by in shards.merge(reports)["counts"].items():
                kind, _, rule = what.partition(".")
                if kind == "dropped":
                    dropped[rule] = dropped.get(rule, 0) + sum(by.values())

        return dropped

    def buckets(self, stage: str, kind: str) -> list[list[tuple[str, int, int]]]:
        """For each bucket of a shuffle, the ranges of files that hold its records, in order."""
        outputs = self.outputs(stage, kind)
        count = len(outputs[0]["about"]) - 1 if outputs else 0
        buckets: list[list[tuple[str, int, int]]] = [[] for _ in range(count)]
        for output in outputs:
            bounds = output["about"]
            for bucket, (begin, end) in enumerate(zip(bounds, bounds[1:])):
                if end > begin:
                    buckets[bucket].append((output["path"], begin, end))

        return buckets


class Stage(NamedTuple):
    """A stage.

    Attributes:
      run: a function of a module, of a `Work`.
      plan: what is made -> the inputs of each task, JSON-able. Also a function of a module, or a
        partial of one.
      packages: whose versions decide its contents.
      reads: more that does, such as what identifies the files that it reads.
    """

    name: str
    run: Callable[[Work], None]
    plan: Callable[[Made], list[dict]]
    settings: Mapping[str, Any]
    packages: Sequence[str] = ()
    reads: Any = None


def each_shard(made: Made) -> list[dict]:
    """The plan of a stage that has a task for each shard of documents."""
    return [{"shard": path} for path in made.shards()]


class Task(NamedTuple):
    stage: Stage
    folder: str
    number: int
    inputs: dict


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each package.

    Raises:
      ValueError: one is not installed.
    """
    try:
        return {package: importlib.metadata.version(package) for package in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"this preparation needs the package {error.name}: pip install -c constraints.txt -e "
            "'.[prepare]'"
        ) from None


def folders(stages: Sequence[Stage], out: epath.Path) -> list[str]:
    """The folder of each stage.

    Raises:
      ValueError: a package that is not installed.
    """
    named = []
    before = ""
    for stage in stages:
        source = inspect.getsource(inspect.getmodule(stage.run))
        identity = dict(
            before=before,
            stage=f"{stage.run.__module__}.{stage.run.__qualname__}",
            code=files.short_hash(source.encode()),
            settings=stage.settings,
            packages=versions(stage.packages),
            reads=stage.reads,
        )
        before = files.short_hash(json.dumps(identity, sort_keys=True).encode())
        named.append(str(out / "stages" / f"{stage.name}-{before}"))

    return named


def _report_path(task: Task) -> epath.Path:
    return epath.Path(task.folder) / f"{task.number:05d}.json"


def done(task: Task) -> dict | None:
    """The report of a task, if it and all files that it names are there; else None."""
    path = _report_path(task)
    if not path.exists():
        return None
    report = files.read_json(path)
    if report["inputs"] != json.loads(json.dumps(task.inputs)):
        return None
    for output in report["outputs"]:
        file = epath.Path(output["path"])
        if not file.exists() or file.stat().length != output["size"]:
            logging.warning("%s has vanished, or been cut: it is made again", file)
            return None

    return report


def run_task(task: Task) -> dict:
    """Does a task, unless it is done, and returns its report.

    Raises:
      ValueError, OSError: it can't be done; the message names stage and files.
    """
    if report := done(task):
        return report
    work = Work(task.folder, task.number, task.inputs, task.stage.settings)
    try:
        task.stage.run(work)
        report = work.report() | {"inputs": task.inputs}
        files.write_whole(_report_path(task), json.dumps(report))
    except (ValueError, OSError, MemoryError) as error:
        raise ValueError(f"{_described(task)}: {error}") from error
    except Exception as error:
        error.add_note(f"in {_described(task)}")
        raise

    return json.loads(json.dumps(report))


def _described(task: Task) -> str:
    """A task as errors call it."""
    described = json.dumps(task.inputs)
    if len(described) > 300:
        described = described[:300] + "..."
    return f"stage {task.stage.name}, task {task.number}, of {described}"


# --- on this machine ---


def run_local(stages: Sequence[Stage], named: Sequence[str], workers: int) -> Made:
    """Runs stages in processes of this machine.

    Args:
      named: the stages' `folders`.

    Raises:
      ValueError: a task that can't be done; those beside it are done to their ends.
    """
    made = Made()
    with contextlib.ExitStack() as stack:
        pool = None
        for stage, folder in zip(stages, named):
            tasks = _tasks(stage, folder, made)
            reports: list[dict | None] = [done(task) for task in tasks]
            todo = [task for task, report in zip(tasks, reports) if report is None]
            # Its processes go on from stage to stage: what they import takes a second.
            if todo and workers > 1 and pool is None:
                pool = stack.enter_context(_pool(workers))

            size = sum(map(_input_size, todo)) / 1e6
            what = f"{stage.name}, {len(todo)} of {len(tasks)} tasks"
            with progress.activity(what, size, "MB") as activity:
                for task, report in _run_all(todo, pool, workers):
                    reports[task.number] = report
                    activity.add(_input_size(task) / 1e6)
            made.add(stage.name, reports)

    return made


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        workers,
        # A process without this one's threads and memory.
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=TASKS_OF_A_PROCESS,
    )


def _tasks(stage: Stage, folder: str, made: Made) -> list[Task]:
    inputs = stage.plan(made)
    # What decided the plan may be large, and is no matter of a task.
    stage = stage._replace(plan=each_shard, reads=None)
    return [Task(stage, folder, number, given) for number, given in enumerate(inputs)]


def _input_size(task: Task) -> int:
    """Bytes of what a task reads, as far as its inputs say."""
    size = 0
    for value in task.inputs.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and epath.Path(item).exists():
                size += epath.Path(item).stat().length
            elif isinstance(item, (list, tuple)) and len(item) == 3:
                _, *bounds = item
                if all(isinstance(bound, int) for bound in bounds):
                    size += bounds[1] - bounds[0]

    return size


def _run_all(
    tasks: Sequence[Task], pool: concurrent.futures.Executor | None, workers: int
) -> Iterator[tuple[Task, dict]]:
    """Yields each task with its report, as they end; without a pool they run here."""
    if pool is None:
        for task in tasks:
            yield task, run_task(task)
        return

    running: dict[concurrent.futures.Future, Task] = {}
    waiting = collections.deque(tasks)
    try:
        while waiting or running:
            # No more than the processes: what is running when one dies is known.
            while waiting and len(running) < workers:
                task = waiting.popleft()
                running[pool.submit(run_task, task)] = task
            ended, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                yield running[future], future.result()
                del running[future]
    except BrokenProcessPool:
        suspects = "\n  ".join(_described(task) for task in running.values())
        raise ValueError(
            "a process of the preparation was killed: out of memory, or by a fault of a library. "
            f"It was at one of:\n  {suspects}"
        ) from None


# --- by Apache Beam ---


def run_beam(stages: Sequence[Stage], named: Sequence[str], arguments: Sequence[str]) -> Made:
    """Runs stages as one Beam pipeline. A task is an element; stages wait for each other by their
    reports, of which the next one's plan is made.

    Args:
      named: the stages' `folders`.
      arguments: Beam's own, such as --runner=DataflowRunner. Without a runner it is FnApiRunner, in
        this process.

    Raises:
      ValueError: Beam is not installed, or a task that can't be done.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
    except ImportError:
        raise ValueError(
            "engine 'beam' needs Apache Beam: pip install -c constraints.txt -e '.[beam]'"
        ) from None

    options = PipelineOptions(list(arguments))

    # Beam's DirectRunner would download another runner first.
    runner = options.view_as(StandardOptions).runner or "FnApiRunner"
    with beam.Pipeline(runner=runner, options=options) as pipeline:
        made = pipeline | beam.Create([Made()])
        for stage, folder in zip(stages, named):
            tasks = made | f"plan {stage.name}" >> beam.FlatMap(
                functools.partial(_tasks, stage, folder)
            )
            reports = (
                tasks
                | f"deal {stage.name}" >> beam.Reshuffle()
                | f"run {stage.name}" >> beam.Map(_numbered_report)
                | f"gather {stage.name}" >> beam.combiners.ToList()
            )
            made = made | f"made {stage.name}" >> beam.Map(
                _add_reports, stage.name, beam.pvalue.AsSingleton(reports)
            )

    # All is done: what is left is to read it.
    return run_local(stages, named, 1)


def _numbered_report(task: Task) -> tuple[int, dict]:
    return task.number, run_task(task)


def _add_reports(made: Made, stage: str, numbered: list[tuple[int, dict]]) -> Made:
    reports = [report for _, report in sorted(numbered, key=_number)]
    # Beam's elements are not changed in place.
    copied = Made()
    copied._reports = dict(made._reports)
    copied.documents = made.documents
    return copied.add(stage, reports)


def _number(numbered: tuple[int, dict]) -> int:
    return numbered[0]
