"""Eigenvalues of many layers: in which order, on which cores, how many at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from ww_train.batching import BATCH_BYTES, Bucket, Choose, Shortage, Solved, warn_once
from ww_train.calibration import costs_of
from ww_train.cores import one_core_each
from ww_train.linalg import Eigensolver, gram_eigenvalues

LOAD_BYTES = 1 << 28
"""Weights of small layers that may be in memory at a time, where they are loaded as they are needed."""

LARGE = 1024
"""On the CPU, smaller Gram matrices get one core each; larger ones all cores, one after another.

Up to twice this size they get one core each as long as there is one for every core.
"""


def work(N: int, M: int, rf: int = 1) -> float:
    """Operations of the float64 Gram matrices and their eigenvalues, `rf (N M² + 4/3 M³)`."""
    return float(rf) * M * M * (N + 4.0 * M / 3.0)


@dataclass(frozen=True, eq=False)
class Job:
    """Stacks that are made when their turn comes, so that only a few are in memory.

    Attributes:
        stacks: Makes the stacks to decompose, all with the same smaller dimension.
        M: Smaller dimension of a slice.
        device: Where the stacks are.
        load: Brings what `stacks` needs into memory; called before it, perhaps in another thread.
        release: Lets go of what `load` brought.
        retreat: Has `load` and `stacks` go on in host memory.
        nbytes: Memory that `load` takes, in bytes; 0 if everything is in memory already.
        collective: Whether `load` talks to other processes: it is then called in the caller's thread
            and in the order of the jobs.
    """

    stacks: Callable[[], Iterable[Tensor]]
    M: int
    device: torch.device
    load: Callable[[], object] = bool
    release: Callable[[], object] = bool
    retreat: Callable[[], object] = bool
    nbytes: int = 0
    collective: bool = False


def decompose(
    jobs: Sequence[Job], solver: Eigensolver = gram_eigenvalues, short: Shortage | None = None
) -> Generator[Solved, None, None]:
    """Eigenvalues of many layers, ascending, float64, one layer after another.

    On an accelerator the Gram matrices of one size are decomposed as a batch. On the CPU small layers
    are spread over the cores, because LAPACK gains nothing from a second core there; large layers use
    all cores in turn. Meanwhile one thread loads what comes next: for a large layer the one after
    it, for small ones up to `LOAD_BYTES` in all.

    Args:
        jobs: What to decompose.
        solver: Arithmetic to use; batching applies to `gram_eigenvalues` only.
        short: Called where an accelerator's memory did not suffice; None warns once.

    Yields:
        Each job's position and its eigenvalues: small layers of the CPU first, then large ones, then
        batches of accelerators. The job's weights are released when the next is asked for.

    Cost: see `gram` and `symmetric_eigenvalues`; one copy to the host a job on the CPU path, one for
    each batch of an accelerator.
    """
    short = short or warn_once()

    def solve(i: int) -> list[Tensor]:
        with torch.no_grad():
            return [solver(stack) for stack in jobs[i].stacks()]

    on_cpu = [(i, job.M) for i, job in enumerate(jobs) if job.device.type == "cpu"]
    together, in_turn = _spread(on_cpu)
    yield from _on_all_cores(jobs, together, solve)
    yield from _one_after_another(jobs, in_turn, solve)
    for device in dict.fromkeys(job.device for job in jobs if job.device.type != "cpu"):
        chosen = [i for i, job in enumerate(jobs) if job.device == device]
        if solver is gram_eigenvalues:
            solved = _batched(jobs, chosen, device, costs_of(device).fastest, short)
        else:
            solved = _in_turn(jobs, chosen, solve, short)
        for i, evals in solved:
            yield i, evals
            jobs[i].release()


def _spread(sizes: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Of positions with their sizes, which get one core each, and which all cores in turn.

    Small ones come first, whatever the number of cores: processes that load together rely on it.
    """
    small = [i for i, M in sizes if M < LARGE]
    medium = [i for i, M in sizes if LARGE <= M <= 2 * LARGE]
    large = [i for i, M in sizes if M > 2 * LARGE]
    cores = torch.get_num_threads()
    whole = len(medium) // cores * cores
    together = small + medium[:whole]
    if cores == 1 or len(together) < 2:
        return [], small + medium + large
    return together, medium[whole:] + large


def _begin(job: Job, reader: Executor) -> Callable[[], object]:
    """Start to load a job; the result waits until it is loaded."""
    if job.nbytes and not job.collective:
        return reader.submit(job.load).result
    job.load()
    return bool


def _one_after_another(
    jobs: Sequence[Job], indices: list[int], solve: Callable[[int], list[Tensor]]
) -> Iterator[Solved]:
    """Solve each on all cores while the next is loaded."""
    with ThreadPoolExecutor(1) as reader:
        loaded = _begin(jobs[indices[0]], reader) if indices else bool
        for i, following in zip_longest(indices, indices[1:]):
            loaded()
            loaded = bool if following is None else _begin(jobs[following], reader)
            yield i, solve(i)
            jobs[i].release()


def _on_all_cores(
    jobs: Sequence[Job], indices: list[int], solve: Callable[[int], list[Tensor]]
) -> Iterator[Solved]:
    """Solve each on one core, in order; as many are loaded as fit into `LOAD_BYTES`."""
    if not indices:
        return
    waiting: deque[tuple[int, Future[list[Tensor]]]] = deque()

    def solve_loaded(i: int, loaded: Callable[[], object]) -> list[Tensor]:
        loaded()
        return solve(i)

    def first() -> Iterator[Solved]:
        i, solving = waiting.popleft()
        yield i, solving.result()
        jobs[i].release()

    reader = ThreadPoolExecutor(1)
    try:
        with one_core_each() as pool:
            held = 0
            for i in indices:
                while waiting and held + jobs[i].nbytes > LOAD_BYTES:
                    held -= jobs[waiting[0][0]].nbytes
                    yield from first()
                held += jobs[i].nbytes
                waiting.append((i, pool.submit(solve_loaded, i, _begin(jobs[i], reader))))
            while waiting:
                yield from first()
    finally:
        reader.shutdown(cancel_futures=True)


def _in_turn(
    jobs: Sequence[Job], chosen: list[int], solve: Callable[[int], list[Tensor]], short: Shortage
) -> Iterator[Solved]:
    """Solve one after another on their accelerator, or on the host if there is no memory."""

    def attempt(i: int) -> list[Tensor] | None:
        try:
            jobs[i].load()
            return [part.cpu() for part in solve(i)]
        except torch.OutOfMemoryError:
            if jobs[i].collective:  # the others do not load it again
                raise
            return None

    for i in chosen:
        evals = attempt(i)
        if evals is None:
            short(jobs[i].device)
            jobs[i].retreat()
            jobs[i].load()
            evals = solve(i)
        yield i, evals


def _batched(
    jobs: Sequence[Job], chosen: list[int], device: torch.device, choose: Choose, short: Shortage
) -> Iterator[Solved]:
    """Decompose the Gram matrices of equal size together, with at most `BATCH_BYTES` waiting."""
    by_size: dict[int, list[int]] = {}
    for i in chosen:
        by_size.setdefault(jobs[i].M, []).append(i)
    for indices in by_size.values():
        bucket, held = Bucket(device, choose, short), 0
        for i in indices:
            if not _loaded(jobs[i]):
                short(device)
                yield from bucket.solve()
                jobs[i].retreat()
                jobs[i].load()
            held += jobs[i].nbytes
            yield from bucket.add(i, jobs[i].stacks, jobs[i].retreat)
            if bucket.nbytes + held >= BATCH_BYTES:
                yield from bucket.solve()
                held = 0
        yield from bucket.solve()


def _loaded(job: Job) -> bool:
    """Load it; False if its device has no memory for it."""
    try:
        job.load()
    except torch.OutOfMemoryError:
        if job.collective:  # the others do not load it again
            raise
        return False
    return True
