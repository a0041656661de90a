"""Two processes joined by gloo that run functions of the tests; started once for a test file."""

import contextlib
import itertools
import multiprocessing
import pathlib
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from ww_train import ranks

ROOT = str(pathlib.Path(__file__).parents[1])
START, ANSWER, COLLECTIVE = 150, 100, 45  # seconds; a busy machine is not a hang


class Pair:
    """Runs a function on both ranks and returns what they return, in the order of the ranks."""

    def __init__(self, folder):
        context = multiprocessing.get_context("spawn")
        sys.path.insert(0, ROOT)  # the processes find the functions by their module
        try:
            pipes = [context.Pipe() for _ in range(2)]
            self.ends = [own for own, _ in pipes]
            self.processes = [
                context.Process(target=serve, args=(rank, str(folder / "store"), end), daemon=True)
                for rank, (_, end) in enumerate(pipes)
            ]
            for process in self.processes:
                process.start()
        finally:
            sys.path.remove(ROOT)
        self.wait = START

    def __call__(self, function, *args):
        for end in self.ends:
            end.send((function, args))
        answers = []
        for rank, end in enumerate(self.ends):
            if not end.poll(self.wait):
                self.close()
                raise TimeoutError(f"rank {rank} does not answer: {function.__name__} hangs")
            answers.append(end.recv())
        self.wait = ANSWER
        for good, answer in answers:
            if not good:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join(10)


def serve(rank, store, end):
    """What each process does: join the other, then one function after another."""
    torch.set_num_threads(1 + rank)  # different rounding on each, if nothing is sent
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=COLLECTIVE),
    )
    with contextlib.suppress(EOFError):
        while True:
            function, args = end.recv()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    answer = True, function(*args)
            except Exception as error:
                answer = False, f"rank {rank}: {type(error).__name__}: {error}"
            end.send(answer)


@contextlib.contextmanager
def no_room(rank, number):
    """One rank has no memory when it asks for the number-th time to hold a sharded tensor whole."""
    given, asked = ranks.room, itertools.count(1)

    def room(sharded):
        if next(asked) == number and dist.get_rank() == rank:
            raise torch.OutOfMemoryError("no more memory")
        return given(sharded)

    ranks.room = room
    try:
        yield
    finally:
        ranks.room = given


@contextlib.contextmanager
def devices_at_gather(module):
    """Which devices a module hands to `on_device` around each `gather`."""
    inside, seen, given = [None], [], (module.on_device, module.gather)

    @contextlib.contextmanager
    def on_device(devices):
        inside.append({str(device) for device in devices})
        yield
        inside.pop()

    def gather(own, group):
        seen.append(inside[-1])
        return given[1](own, group)

    module.on_device, module.gather = on_device, gather
    try:
        yield seen
    finally:
        module.on_device, module.gather = given
