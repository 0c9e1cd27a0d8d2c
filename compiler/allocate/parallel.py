"""Where tasks run: in this process, in processes of this machine, or on the workers of a dask scheduler."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.compiler.allocate.task import Outcome, Task, run_task
from bitwright.compiler.errors import ToolchainError, UsageError

CONNECT_S = 15
SCHEMES = ("tcp://", "tls://")

# Tasks in, (number of the task, outcome) out, in the order in which they finish.
Runner = Callable[[Sequence[Task]], Iterator[tuple[int, Outcome]]]


@contextmanager
def runner(*, workers: int = 1, scheduler: str | None = None) -> Iterator[Runner]:
    """Open the place where tasks run; processes and connections are kept until the end.

    Args:
        workers: Processes of this machine; 1 runs in this process.
        scheduler: Address of a dask scheduler, e.g. ``tcp://10.0.0.1:8786``; its workers need Bitwright.

    Raises:
        UsageError: The address or the number is wrong.
        ToolchainError: dask is not installed, no scheduler answers, or a process was killed.
    """
    if workers < 1:
        msg = "at least one process is needed"
        raise UsageError(msg, where="workers", fix="pass 1 or more")
    if scheduler is not None:
        with _connected(scheduler) as client:
            yield lambda tasks: _on_cluster(client, tasks)
    elif workers == 1:
        yield lambda tasks: ((k, run_task(task)) for k, task in enumerate(tasks))
    else:
        # Not forked: ONNX Runtime's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context)
        try:
            yield lambda tasks: _in_processes(pool, tasks)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_processes(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
    try:
        futures: dict[Future[Outcome], int] = {pool.submit(run_task, t): k for k, t in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        msg = "a worker process ended before it finished its task"
        raise ToolchainError(
            msg,
            where="sensitivity",
            fix="use fewer workers if memory ran out; a script needs `if __name__ == '__main__':` to use several",
        ) from error


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    if not address.startswith(SCHEMES):
        msg = f"'{address}' is not the address of a dask scheduler"
        raise UsageError(msg, where="--scheduler", fix="pass e.g. tcp://10.0.0.1:8786")
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        msg = "dask is not installed"
        raise ToolchainError(
            msg, where="--scheduler", fix="pip install 'bitwright[distributed]', here and on the workers"
        ) from error
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        msg = f"no dask scheduler answers at {address}: {error}"
        raise ToolchainError(
            msg, where="--scheduler", fix="start one with `dask scheduler`, and workers with `dask worker`"
        ) from error
    try:
        yield client
    finally:
        client.close()


def _on_cluster(client: Any, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
    """Send every file once; the scheduler copies it to the workers that need it."""
    distributed: Any = importlib.import_module("distributed")
    sent: dict[str, Any] = {}
    numbers: dict[Any, int] = {}
    for k, task in enumerate(tasks):
        for name in task.files:
            if name not in sent:
                sent[name] = client.scatter(Path(task.folder, name).read_bytes())
        contents = {name: sent[name] for name in task.files}
        numbers[client.submit(run_shipped, task, contents, pure=False)] = k
    try:
        for future in distributed.as_completed(list(numbers), loop=client.loop):
            yield numbers[future], future.result()
    except (distributed.KilledWorker, distributed.CancelledError, OSError) as error:
        msg = f"the cluster lost a task: {error}"
        raise ToolchainError(
            msg, where="--scheduler", fix="look at the workers' logs; they may have run out of memory"
        ) from error


def run_shipped(task: Task, contents: Mapping[str, bytes]) -> Outcome:
    """Run a task on a machine that does not have its files.

    Args:
        task: The task; its folder means nothing here.
        contents: File name -> content.
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-", ignore_cleanup_errors=True) as folder:
        for name, content in contents.items():
            Path(folder, name).write_bytes(content)
        return run_task(replace(task, folder=folder))
