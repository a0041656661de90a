import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ww_train import WWPGD, measure
from ww_train.callbacks import background
from ww_train.callbacks import copies as copies_room
from ww_train.callbacks.monitor import SpectralMonitor
from ww_train.callbacks.sharing import Ranks

from .accelerator import Stream, move
from .oracles import gaussian
from .pair import Pair
from .training import adamw, net, same, train, wrap
from .watching import helpers

TAGS = ("ww_alpha/", "ww_erg_gap/", "ww_traps/")


def watch(*arguments, **options):
    usual = {"background": True, "budget": None, "summary": False}
    return SpectralMonitor(*arguments, **{**usual, **options})


def started(*arguments, **options):
    """A monitor that has measured once, which is in the foreground."""
    monitor = watch(*arguments, **{"at_end": False, **options})
    monitor.start()
    return monitor


def epochs(monitor, number):
    for _ in range(number):
        monitor.epoch_end()
        monitor.settle()


def deep(layers=6):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(24, 24) for _ in range(layers)])


def of_layers(record):
    return {tag: value for tag, value in record.items() if tag.startswith(TAGS)}


def expected(model):
    return of_layers(measure(model, randomize=True).scalars())


@pytest.fixture
def spy(monkeypatch):
    """What the thread measures: names of the layers, who did it, with how many cores."""
    calls = []

    def spying(copies, *, layers, **options):
        calls.append((tuple(layers), threading.current_thread(), torch.get_num_threads()))
        return measure(copies, layers=layers, **options)

    monkeypatch.setattr(background, "measure", spying)
    return calls


def test_each_record_tells_what_was_at_its_own_step():
    model = net()
    opt = adamw(model)
    truth = {}
    with watch(model, opt) as monitor:
        truth[0] = expected(model)
        for epoch in (1, 2, 3):
            train(model, opt, 2, first=2 * epoch)
            monitor.epoch_end()
            truth[epoch] = expected(model)
            monitor.settle()
    records = {int(r["step"]): of_layers(r) for r in monitor.history}
    assert records == truth
    assert [r["step"] for r in monitor.history] == [0, 1, 2, 3]
    assert monitor.history[-1]["ww/num_measured"] == 2.0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("steers", [False, True])
def test_training_is_bit_for_bit_the_same(threads, steers):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for watched in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(24, 300), nn.Dropout(0.1), nn.Linear(300, 24))
            opt = wrap(model, strength=0.1) if steers else adamw(model)
            monitor = watch(model, opt) if watched else None
            for epoch in range(3):
                for i in range(4):
                    train(model, opt, 1, first=4 * epoch + i)
                    if monitor:
                        monitor.step()
                if monitor:
                    monitor.epoch_end()
                elif steers:
                    opt.end_epoch()
            if monitor:
                monitor.close()
            results.append((model, torch.rand(1)))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    (bare, random), (watched_model, after) = results
    assert same(bare, watched_model)
    assert torch.equal(random, after)


def test_one_thread_with_one_core_measures_and_is_gone_at_the_end(spy):
    model = net()
    before = torch.get_num_threads()
    with watch(model, adamw(model)) as monitor:
        for _ in range(3):
            monitor.step()
            monitor.epoch_end()
            monitor.settle()
    threads = {thread for _, thread, _ in spy}
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert {cores for _, _, cores in spy} == {1}
    assert torch.get_num_threads() == before
    assert helpers() == []


def test_few_copies_are_held_and_every_layer_has_its_turn(monkeypatch, spy):
    model = deep()
    opt = adamw(model)
    monkeypatch.setattr(background, "COPY_BYTES", 2 * 4 * 24 * 24)
    monitor = started(model, opt)
    monitor.step()
    monitor.epoch_end()
    truth, steps = {0: expected(model), 1: expected(model)}, 1
    for _ in range(3):
        monitor.settle()
        train(model, opt, 1, first=steps)
        steps += 1
        monitor.step()
        truth[steps] = expected(model)
    monitor.settle()
    assert [i for layers, _, _ in spy for i in layers] == list(range(6))
    assert [r["step"] for r in monitor.history] == [0, 1, 2, 3]
    for record in monitor.history[1:]:
        own = of_layers(record)
        assert len(own) == 2 * len(TAGS)
        assert own.items() <= truth[int(record["step"])].items()
    assert monitor.report.scalars()["ww/num_layers"] == 6.0
    monitor.close()


def test_the_stalest_layers_come_first(monkeypatch, spy):
    monkeypatch.setattr(background, "COPY_BYTES", 4 * 4 * 24 * 24)
    model = deep()
    monitor = started(model)
    epochs(monitor, 3)
    assert [i for (i,), _, _ in spy] == [0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 2, 3]
    monitor.close()


def test_a_busy_thread_is_not_given_more(monkeypatch):
    go, begun = threading.Event(), []

    def slow(copies, **options):
        begun.append(1)
        assert go.wait(60)
        return measure(copies, **options)

    monkeypatch.setattr(background, "measure", slow)
    monitor = started(net())
    for _ in range(5):
        assert monitor.epoch_end() == {}
    assert len(begun) <= 1
    go.set()
    monitor.settle()
    assert [r["step"] for r in monitor.history] == [0, 1]
    monitor.close()


def test_what_fails_in_the_thread_warns_once_and_the_next_is_tried(monkeypatch):
    luck = [False, False, True, True]  # the first lots end at their first layer

    def unlucky(copies, **options):
        if luck.pop(0):
            return measure(copies, **options)
        raise RuntimeError("device lost")

    monkeypatch.setattr(background, "measure", unlucky)
    monitor = started(net())
    with pytest.warns(UserWarning, match="device lost") as caught:
        epochs(monitor, 3)
    assert len(caught) == 1
    assert [r["step"] for r in monitor.history] == [0, 3]
    monitor.close()


def test_the_end_waits_and_measures_what_is_stale():
    model = net()
    opt = adamw(model)
    with watch(model, opt) as monitor:
        monitor.epoch_end()
        train(model, opt, 2)
        monitor._steps = 7  # as if these had been counted
    assert [r["step"] for r in monitor.history] == [0, 1, 7]
    assert of_layers(monitor.history[-1]) == expected(model)
    assert helpers() == []


def interrupted(monitor):
    with monitor:
        monitor.epoch_end()
        raise KeyboardInterrupt


def test_an_exception_keeps_what_is_measured_and_ends_the_thread(tmp_path, monkeypatch):
    log, done = tmp_path / "log.csv", threading.Event()
    begin = background.BackgroundSurvey._begin

    def and_wait(self, occasion):
        begin(self, occasion)
        self._lot.future.result(60)
        done.set()

    monkeypatch.setattr(background.BackgroundSurvey, "_begin", and_wait)
    monitor = watch(net(), log_to=str(log))
    with pytest.raises(KeyboardInterrupt):
        interrupted(monitor)
    assert done.is_set()
    assert [r["step"] for r in monitor.history] == [0, 1]
    assert log.read_text().count("ww/alpha_mean") == 2
    assert helpers() == []


def test_an_exception_does_not_wait_for_layers_that_are_not_begun(monkeypatch):
    go, seen = threading.Event(), []

    def slow(copies, *, layers, **options):
        seen.extend(layers)
        assert go.wait(60)
        return measure(copies, layers=layers, **options)

    monkeypatch.setattr(background, "measure", slow)
    monitor = watch(deep())
    shutdown = background.ThreadPoolExecutor.shutdown

    def and_go(pool, **options):
        if pool is monitor.survey._thread:  # measuring uses pools too
            go.set()
        return shutdown(pool, **options)

    monkeypatch.setattr(background.ThreadPoolExecutor, "shutdown", and_go)
    with pytest.raises(KeyboardInterrupt):
        interrupted(monitor)
    assert len(seen) <= 1
    assert helpers() == []


def test_a_checkpoint_waits():
    model = net()
    monitor = started(model)
    monitor.epoch_end()
    assert monitor.state_dict(wait=False)["history"] in (monitor.history[:1], monitor.history)
    state = monitor.state_dict()
    assert [r["step"] for r in state["history"]] == [0, 1]
    assert of_layers(state["history"][1]) == expected(model)
    epochs(monitor, 1)
    assert len(state["history"]) == 2  # it does not grow with the run
    other = watch(model)
    other.load_state_dict(state)
    assert other.history == state["history"]
    monitor.close()


def test_going_back_to_a_checkpoint_forgets_what_is_being_measured():
    model = net()
    monitor = started(model)
    state = monitor.state_dict()
    monitor.epoch_end()
    monitor.load_state_dict(state)
    monitor.settle()
    assert [r["step"] for r in monitor.history] == [0]
    monitor.close()


def test_a_new_training_forgets_what_the_last_one_left():
    model = net()
    monitor = started(model)
    monitor.epoch_end()
    monitor.begin(step=0)
    monitor.settle()
    assert [r["step"] for r in monitor.history] == [0]
    assert helpers() == []


def test_layers_that_are_gone_are_left_out_and_others_are_not_taken_for_them(monkeypatch):
    monkeypatch.setattr(background, "COPY_BYTES", 2 * 4 * 24 * 24)
    model = deep(4)
    monitor = started(model, layers=["1", "2", "3"])
    monitor.epoch_end()
    monitor.settle()
    del model[3]
    model.insert(0, nn.Linear(24, 24))
    monitor.step()
    monitor.settle()
    names = {tag for r in monitor.history for tag in of_layers(r) if tag.startswith("ww_alpha")}
    assert names == {"ww_alpha/1", "ww_alpha/2", "ww_alpha/3"}
    monitor.close()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_monitor_have_threads_of_their_own(copied):
    monitor = started(net(), clock=time.perf_counter)
    monitor.epoch_end()
    twin = copied(monitor)
    monitor.settle()
    assert (len(twin.history), len(monitor.history)) == (1, 2)
    epochs(twin, 1)
    assert len(twin.history) == 2
    for one in (monitor, twin):
        one.close()


@pytest.mark.parametrize("options", [{"randomize": -1}, {"replicates": -1}, {"seed": 2**70}])
def test_options_out_of_range_are_refused_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        watch(net(), **options)


def test_an_empty_model_is_told():
    monitor = watch(nn.Sequential(nn.ReLU()), at_end=False)
    with pytest.warns(UserWarning, match="no layer to watch"):
        monitor.epoch_end()
    monitor.close()


ONE_CORE = """
import torch
from torch import nn
from ww_train.callbacks import background
from ww_train.callbacks import copies as copies_room
from ww_train.callbacks.monitor import SpectralMonitor

cores, measure = [], background.measure

def spying(*arguments, **options):
    cores.append(torch.get_num_threads())
    return measure(*arguments, **options)

background.measure = spying
monitor = SpectralMonitor(nn.Linear(64, 64), background=True, budget=None)
monitor.start()
monitor.epoch_end()
monitor.settle()
print(cores, torch.get_num_threads())
"""


def test_the_thread_has_one_core_where_training_has_two():
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    done = subprocess.run(
        [sys.executable, "-c", ONE_CORE],
        env={**os.environ, **dict.fromkeys(variables, "2")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[1] 2", done.stderr


def test_a_projection_is_logged_at_once_and_what_it_left_is_not_decomposed_again(monkeypatch):
    model = net()
    opt = WWPGD(adamw(model), model=model)
    sizes = []
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: (sizes.append(len(a)), eigvalsh(a))[1])
    monitor = started(model, opt, randomize=False)
    sizes.clear()
    train(model, opt, 2)
    scalars = monitor.epoch_end()
    assert scalars["ww/strength"] > 0
    assert "ww/alpha_mean" not in scalars
    monitor.settle()
    assert sizes == []
    assert [("ww/strength" in r, "ww/alpha_mean" in r) for r in monitor.history] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    assert of_layers(monitor.history[2]) == pytest.approx(
        of_layers(measure(model).scalars()), rel=1e-3
    )
    monitor.close()


def steered(**options):
    """The history of a training with projections, and the monitor."""
    model = net()
    opt = WWPGD(adamw(model), model=model)
    monitor = watch(model, opt, **options)
    with monitor:
        for epoch in range(3):
            train(model, opt, 2, first=2 * epoch)
            monitor.epoch_end()
    return monitor.history, expected(model)


def test_with_projections_the_last_step_is_logged_once(tmp_path, spy):
    log = tmp_path / "log.csv"
    history, truth = steered(log_to=str(log))
    (last,) = [r for r in history if r["step"] == 3 and "ww/alpha_mean" in r]
    assert last["ww/num_measured"] == 2.0
    assert of_layers(last) == pytest.approx(truth, rel=1e-3)
    rows = [line for line in log.read_text().splitlines() if "ww/alpha_mean" in line]
    assert len(rows) == len({r["step"] for r in history if "ww/alpha_mean" in r})


def test_what_the_thread_had_of_the_last_step_and_the_rest_are_one_record(monkeypatch):
    monkeypatch.setattr(background, "COPY_BYTES", 2 * 4 * 24 * 24)
    told = []
    model = deep()
    monitor = watch(
        model,
        at_start=False,
        log_to=lambda scalars, step: told.append((step, dict(scalars))),
    )
    monitor.epoch_end()  # the first measurement is made here and now
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    monitor.epoch_end()
    scalars = monitor.finish(model, epoch=2, step=2)
    measured = [(step, x) for step, x in told if "ww/alpha_mean" in x]
    assert [step for step, _ in measured] == [1, 2]
    last = monitor.history[-1]
    assert {tag: last[tag] for tag in scalars} == scalars == measured[-1][1]
    assert last["ww/num_measured"] == 6.0
    assert of_layers(last) == expected(model)
    monitor.close()


class Reports:
    """A logger of alphas: those of the scalars and those of the report, at each step."""

    def __init__(self):
        self.told, self.reported = {}, {}

    def __call__(self, scalars, step):
        alphas = {k.partition("/")[2]: v for k, v in scalars.items() if k.startswith("ww_alpha/")}
        self.told.setdefault(step, {}).update(alphas)

    def log_report(self, report, history, epoch, step, **more):
        if not more["last"]:
            self.reported[step] = {layer.name: layer.alpha for layer in report}


def test_loggers_get_the_report_of_the_step():
    model, log = net(), Reports()
    opt = adamw(model)
    with watch(model, opt, log_to=log) as monitor:
        monitor.epoch_end()
        train(model, opt, 2)
        monitor._steps = 7  # as if these had been counted
    assert log.told.keys() == {0, 1, 7}
    assert log.reported == log.told


def test_a_projection_at_the_step_of_a_lot_is_measured_again(monkeypatch):
    model = net()
    opt = WWPGD(adamw(model), model=model)
    monitor = started(model, opt, at_end=True, every_n_steps=2)
    train(model, opt, 2)
    monitor.step()
    monitor.step()  # copies what is not projected yet
    before = expected(model)
    monitor.settle()
    monitor.epoch_end()
    monitor.close()
    parts = [of_layers(r) for r in monitor.history if r["step"] == 2 and "ww/alpha_mean" in r]
    assert parts[0] == before
    assert len(parts) == 2
    assert parts[1] == pytest.approx(expected(model), rel=1e-3)


def test_beyond_the_budget_nothing_is_copied(spy):
    now = [0.0]

    def clock():
        now[0] += 1.0  # each look at the clock takes a second
        return now[0]

    model = net()
    monitor = SpectralMonitor(
        model, background=True, budget=0.01, clock=clock, summary=False, at_end=False
    )
    epochs(monitor, 5)
    assert spy == []
    assert len(monitor.history) == 1
    monitor.close()


def test_a_layer_of_nan_is_told_and_the_others_are_measured():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    monitor = watch(model, at_start=False, at_end=False)
    with pytest.warns(UserWarning, match="layer 0 is not watched"):
        epochs(monitor, 1)
    assert [layer.name for layer in monitor.report] == ["2"]
    monitor.close()


def test_something_that_is_no_model_warns():
    monitor = watch(gaussian(24, 24))
    with pytest.warns(UserWarning, match="expected an nn.Module"):
        monitor.epoch_end()
    monitor.close()


# On a device, by one that is simulated


def grown(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.1)


def trained(monitor, number):
    """Epochs in which the weights change, each measured to the end."""
    for _ in range(number):
        grown(monitor.model)
        epochs(monitor, 1)


def test_there_is_one_stream_for_a_device(gpu, monkeypatch):
    made = []
    monkeypatch.setattr(
        torch.cuda, "Stream", lambda device: made.append(Stream(device)) or made[-1]
    )
    monitor = started(move(deep(2)))
    trained(monitor, 3)
    (stream,) = made
    assert len(stream.waited) == len(monitor.history) - 1 == 3
    assert copy.deepcopy(monitor).survey._streams == {}
    monitor.close()


@pytest.mark.parametrize("where", ["measure", "_beside"])
def test_what_fails_lets_go_of_the_copies_at_once(gpu, monkeypatch, where):
    monitor = started(move(deep(2)), randomize=False)

    def failing(*arguments, **options):
        raise RuntimeError("no luck") from ValueError(f"of {len(arguments)}")

    monkeypatch.setattr(background, where, failing)
    gc.collect()
    used = gpu.used
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="no luck"):
            trained(monitor, 2)
        assert gpu.used == used
    finally:
        gc.enable()
    monitor.close()


def test_layers_of_one_size_are_measured_together_and_stop_ends_it_between(gpu, monkeypatch):
    calls, go = [], threading.Event()

    def waiting(copies, *, layers, **options):
        calls.append(tuple(layers))
        assert go.wait(60)
        return measure(copies, layers=layers, **options)

    monkeypatch.setattr(background, "measure", waiting)
    sizes = [(24, 32), (32, 16), (16, 24), (24, 24)]
    monitor = started(move(nn.Sequential(*(nn.Linear(*size) for size in sizes))))
    go.set()
    trained(monitor, 1)
    assert calls == [(0, 3), (1, 2)]
    go.clear()
    monitor.epoch_end()
    monitor.survey._lot.stop.set()
    go.set()
    with pytest.warns(UserWarning, match="training ended before"):
        monitor.settle()
    assert calls[2:] in ([], [(0, 3)])  # the thread may not have begun
    monitor.close()


NEEDED = 5 * copies_room.BATCH_BYTES + 2 * 4 * 24 * 24


@pytest.mark.parametrize(
    ("free", "reserved", "peak", "kinds"),
    [
        (NEEDED, 0, 0, ["cuda", "cuda"]),
        (NEEDED - 1, 0, 0, ["cuda", "cpu"]),
        (0, NEEDED, 0, ["cuda", "cuda"]),
        (NEEDED, 10**10, 10**10, ["cuda", "cuda"]),
        (10**10, 10**10, 19 * 10**9, ["cpu", "cpu"]),
    ],
)
def test_copies_are_made_where_training_leaves_room(gpu, monkeypatch, free, reserved, peak, kinds):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**11))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    seen = {}

    def spying(copies, *, layers, **options):
        seen.update({copies[i].name: copies[i].device.type for i in layers})
        return measure(copies, layers=layers, **options)

    monkeypatch.setattr(background, "measure", spying)
    model = move(deep(2))
    monitor = started(model)
    trained(monitor, 1)
    assert [seen["0"], seen["1"]] == kinds
    assert of_layers(monitor.history[-1]) == pytest.approx(expected(model), rel=1e-9)
    monitor.close()


def test_a_copy_that_does_not_fit_in_the_end_is_made_on_the_host(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    model = move(deep(2))
    monitor = started(model, randomize=False)
    grown(model)
    truth = of_layers(measure(model).scalars())
    gpu.reset(free=0)
    epochs(monitor, 1)
    assert of_layers(monitor.history[-1]) == pytest.approx(truth, rel=1e-9)
    monitor.close()


# Products of thin factors


def adapted(rank, dtype=torch.float32):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 40)),
            peft.LoraConfig(r=rank, target_modules=["0", "2"], init_lora_weights=False),
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def told_of(model, **options):
    """Every number of the last report, and why layers have none."""
    monitor = started(model, **options)
    grown(model)
    epochs(monitor, 1)
    monitor.close()
    layers = {
        layer.name: {k: v for k, v in layer.to_dict().items() if isinstance(v, int | float)}
        for layer in monitor.report
    }
    assert [record["step"] for record in monitor.history] == [0, 1]
    return layers, {lost.name: lost.reason for lost in monitor.report.skipped}


LORA = {
    "skipped": (4, torch.float32, {}),
    "traps": (10, torch.float32, {}),
    "rounded": (10, torch.bfloat16, {}),
    "spectra": (10, torch.bfloat16, {"randomize": False}),
    "vectors": (10, torch.float32, {"randomize": False, "vectors": True}),
}


@pytest.mark.parametrize(("rank", "dtype", "options"), LORA.values(), ids=LORA)
@pytest.mark.parametrize("device", ["cpu", "cuda", "no room"])
def test_low_rank_updates_have_the_report_of_the_foreground(
    gpu, monkeypatch, device, rank, dtype, options
):
    models = [adapted(rank, dtype) for _ in range(2)]
    if device != "cpu":
        models = [move(model) for model in models]
    if device == "no room":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 40))
    layers, skipped = told_of(models[0], background=False, **options)
    other, lost = told_of(models[1], **options)
    assert skipped == lost
    assert ("0.lora" in skipped) == (rank < 8)
    assert layers.keys() == other.keys()
    for name, numbers in layers.items():
        assert other[name] == pytest.approx(numbers, rel=1e-6, nan_ok=True), name


@pytest.mark.parametrize("randomize", [False, True])
def test_the_product_is_kept_only_where_it_is_needed(monkeypatch, randomize):
    held = []

    def spying(copies, *, layers, **options):
        held.extend(copies_room.copy_bytes(copies[i], bool(randomize)) for i in layers)
        return measure(copies, layers=layers, **options)

    monkeypatch.setattr(background, "measure", spying)
    told_of(adapted(10), randomize=randomize)
    plain, product = 4 * 40 * 60, 8 * (100 + randomize * 40 * 60)
    assert held == [plain, product, plain, product]


# Several processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


def watched_by_two(shards, fails):
    """Histories of a monitor in the background, and the names of what this process decomposed."""
    from torch.distributed.fsdp import fully_shard

    model, seen, luck = deep(5), [], [fails]
    if shards:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    ranks = Ranks(dist.group.WORLD, replicated=not shards)
    alone = measure

    def spying(copies, *, layers, **options):
        seen.extend(layers)
        if luck.pop() if luck else False:
            raise KeyError("no luck")
        return alone(copies, layers=layers, **options)

    background.measure, limit = spying, background.COPY_BYTES
    background.COPY_BYTES = 4 * 24 * 24  # a layer for each process at a time
    try:
        monitor = watch(at_start=False)
        monitor.begin(step=0, ranks=ranks)
        for epoch in range(1, 30):
            monitor.boundary(model, epoch=epoch, step=epoch, due=epoch % 10 == 1)
            time.sleep(0.02)
        monitor.finish(model, epoch=30, step=30)
    finally:
        background.measure, background.COPY_BYTES = alone, limit
    records = [(r["step"], of_layers(r)) for r in monitor.history]
    return records, sorted(set(seen)), of_layers(measure(model, randomize=True).scalars())


def test_what_the_thread_took_is_told_apart():
    monitor = started(deep())
    assert monitor.budget.beside == 0.0
    epochs(monitor, 2)
    took = [record["ww/seconds"] for record in monitor.history[1:]]
    assert monitor.budget.beside == pytest.approx(sum(took))
    other = watch()
    other.load_state_dict(monitor.state_dict())
    assert other.budget.beside == monitor.budget.beside
    monitor.close()


@pytest.mark.parametrize("shards", [False, True], ids=["replicas", "shards"])
def test_each_process_measures_a_part_and_all_know_the_same(pair, shards):
    (zero, first, truth), (one, second, _) = pair(watched_by_two, shards, False)
    assert zero == one
    assert first != second
    assert set(first) | set(second) == set(range(5))
    assert len(zero) > 3
    for _, layers in zero[1:-1]:
        assert len(layers) in (len(TAGS), 2 * len(TAGS))
        assert layers.items() <= truth.items()
    assert zero[-1] == (30, truth)


def test_a_thread_that_fails_in_one_process_leaves_none_waiting(pair):
    (zero, *_), (one, *_) = pair(watched_by_two, False, True)
    assert zero == one
    assert zero[-1][0] == 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_copies_are_measured_on_a_stream_beside_training():
    models = [deep().cuda() for _ in range(2)]
    opts = [adamw(model) for model in models]
    truth = {}
    monitor = watch(models[1], opts[1], at_start=False)
    for epoch in range(1, 4):
        for model, opt in zip(models, opts, strict=True):
            for i in range(3):
                opt.zero_grad()
                batch = gaussian(8, 24, seed=3 * epoch + i).cuda()
                (model(batch) - batch.flip(1)).square().mean().backward()
                opt.step()
        monitor.epoch_end()
        truth[epoch] = expected(models[1])
        monitor.settle()
    monitor.close()
    assert same(*models)
    for record in monitor.history:
        assert of_layers(record) == pytest.approx(truth[record["step"]], rel=1e-9)


def watched_by_unlucky(shards, what):
    """The history and the warnings of a monitor on two processes, of which the second is unlucky."""
    from torch.distributed.fsdp import fully_shard

    model, copied = (
        deep(5 if what != "another model" or dist.get_rank() == 0 else 3),
        copies_room._copied,
    )
    if shards:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    ranks = Ranks(dist.group.WORLD, replicated=not shards)
    tries = []

    def failing(matrix, **options):
        tries.append(matrix.name)
        copy = copied(matrix, **options)
        if dist.get_rank() == 1 and len(tries) == 2 and what == "a copy fails":
            raise MemoryError("no room on rank 1")
        return copy

    copies_room._copied = failing
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monitor = watch(at_start=False)
            monitor.begin(step=0, ranks=ranks)
            for epoch in range(1, 6):
                if epoch == 2 and what == "another model":
                    monitor.timeline.report = monitor.timeline.report or measure(deep(5))
                monitor.boundary(model, epoch=epoch, step=epoch)
                time.sleep(0.2)
                dist.barrier()
            monitor.abort()
    finally:
        copies_room._copied = copied
    return [r["step"] for r in monitor.history], [str(w.message) for w in caught]


@pytest.mark.parametrize("shards", [False, True], ids=["replicas", "shards"])
def test_a_copy_that_fails_on_one_process_is_told_and_tried_again(pair, shards):
    (zero, messages), (one, _) = pair(watched_by_unlucky, shards, "a copy fails")
    assert zero == one
    assert len(zero) >= 3
    assert any("no room on rank 1" in message for message in messages)


def test_processes_with_different_models_do_not_wait_for_each_other(pair):
    (zero, messages), (one, _) = pair(watched_by_unlucky, False, "another model")
    assert zero == one == []
    (message,) = messages
    assert "rank 1: there is no layer 3: the model has 3 layers" in message


def own_loop():
    """A plain loop under DistributedDataParallel, which also counts steps and keeps its state."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(deep(3))
    opt = adamw(model)
    monitor = watch(model, opt)
    monitor.start()
    for i in range(12):
        opt.zero_grad()
        model(gaussian(8, 24, seed=i + 100 * dist.get_rank())).square().mean().backward()
        opt.step()
        monitor.step()
        if i % 3 == 2:
            monitor.epoch_end()
            if dist.get_rank() == 0:
                monitor.state_dict()
        time.sleep(0.05 * dist.get_rank())
    monitor.close()
    return [r["step"] for r in monitor.history]


def test_a_loop_of_ones_own_with_several_processes(pair):
    zero, one = pair(own_loop)
    assert zero == one
    assert zero[0] == 0
    assert zero[-1] == 12
