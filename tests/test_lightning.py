import csv
import importlib
import json
import math
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import (  # noqa: E402
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

from ww_train import WWPGD, ManifoldProjection, Ramp, measure  # noqa: E402
from ww_train.callbacks.early_stopping import alpha_below  # noqa: E402
from ww_train.callbacks.lightning import WeightWatcherCallback  # noqa: E402

from .oracles import gaussian  # noqa: E402
from .processes import run_ranks  # noqa: E402
from .watching import SUMMARIES, helpers, of_layers, without_seconds  # noqa: E402

SIZE, BATCHES = 24, 3
LAYERS = {f"ww_{m}/{n}" for m in ("alpha", "erg_gap", "trace_log", "traps") for n in ("fc1", "fc2")}
PROJECTION = {"ww/distance_mean", "ww/strength", "ww_distance/fc1", "ww_distance/fc2"}


def distances(module):
    """Distance to the manifold of both layers: below 1e-6 after a projection."""
    return [
        ManifoldProjection().project_(layer.weight.detach().clone()).distance
        for layer in (module.fc1, module.fc2)
    ]


def projected(module):
    return max(distances(module)) < 1e-6


def free(module):
    return min(distances(module)) > 1e-4


class Net(pl.LightningModule):
    """Two layers; keeps what validation saw. `strength=None` is the bare optimizer."""

    def __init__(self, strength=1.0, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc1 = nn.Linear(SIZE, 32)
            self.fc2 = nn.Linear(32, SIZE)
        self.dropout = nn.Dropout(dropout)
        self.strength = strength
        self.validated = []

    def loss(self, batch):
        x = batch[0]
        return (self.fc2(self.dropout(self.fc1(x).tanh())) - x.flip(1)).square().mean()

    def training_step(self, batch, _index):
        return self.loss(batch)

    def validation_step(self, batch, _index):
        self.log("val_loss", self.loss(batch))
        self.validated.append(distances(self))

    def configure_optimizers(self):
        opt = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.strength is not None:
            opt = WWPGD(opt, model=self, strength=self.strength)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8)
        return {"optimizer": opt, "lr_scheduler": schedule}


def data(batches=BATCHES, **options):
    return DataLoader(TensorDataset(gaussian(4 * batches, SIZE)), batch_size=4, **options)


def clock(trainer):
    (opt,) = trainer.optimizers
    return opt.state_dict()["ww_pgd"]


def make_trainer(*callbacks, **settings):
    defaults = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), **{**defaults, **settings}
    )


def fit(model, *callbacks, loader=None, validate=True, ckpt_path=None, **settings):
    trainer = make_trainer(*callbacks, **settings)
    loader = data() if loader is None else loader
    trainer.fit(model, loader, data(1) if validate else None, ckpt_path=ckpt_path)
    return trainer


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


class Probe(pl.Callback):
    """Runs a function at one hook and keeps what it returns."""

    def __init__(self, hook, function):
        self.seen = []
        setattr(self, hook, lambda trainer, module, *_: self.seen.append(function(trainer, module)))


pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        "You defined a `validation_step` but have no `val_dataloader`",
        ".*Checkpoint directory .* exists and is not empty",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "the trainer has no logger",
    )
]


# Loggers


def watching(**options):
    """The callback without a budget: on a loaded machine even tiny measurements may not fit in."""
    return WeightWatcherCallback(**{"budget": None, **options})


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_has_every_tag_at_the_step_of_the_validation_loss(tmp_path):
    watcher = watching()
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(Net(), watcher, logger=logger, max_epochs=3)
    scalars = events(tmp_path / "run")
    tags = {tag for tag in scalars if tag.startswith("ww")}
    assert tags == SUMMARIES | LAYERS | PROJECTION | {"ww/overhead"}
    validated = [event.step for event in scalars["val_loss"]]
    assert len(validated) == 3
    for tag in SUMMARIES | LAYERS:
        assert [event.step for event in scalars[tag]] == [0, *validated]
    for tag in PROJECTION | {"ww/overhead"}:
        assert [event.step for event in scalars[tag]] == validated
    for tag in LAYERS | SUMMARIES:
        written = [event.value for event in scalars[tag]]
        assert written == pytest.approx([record[tag] for record in watcher.history], rel=1e-6)
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len(files) == 1


def test_without_a_wwpgd_there_is_nothing_about_projections(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(Net(strength=None), watching(), logger=logger)
    tags = {tag for tag in events(tmp_path / "run") if tag.startswith("ww")}
    assert tags == SUMMARIES | LAYERS | {"ww/overhead"}


def test_every_logger_gets_the_numbers(tmp_path):
    loggers = [CSVLogger(tmp_path, name="", version=str(i)) for i in range(2)]
    watcher = watching(randomize=False)
    fit(Net(), watcher, logger=loggers)
    for i in range(2):
        with open(tmp_path / str(i) / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["ww_alpha/fc1"]]
        alphas = [float(row["ww_alpha/fc1"]) for row in rows]
        assert alphas == [record["ww_alpha/fc1"] for record in watcher.history]
        assert not [tag for tag in rows[0] if "traps" in tag]


def test_without_a_logger_there_is_still_a_history():
    watcher, model = watching(), Net()
    fit(model, watcher, logger=False)
    assert [record["epoch"] for record in watcher.history] == [0.0, 1.0, 2.0]
    assert [record["step"] for record in watcher.history] == [0.0, 3.0, 6.0]
    assert "ww/strength" not in watcher.history[0]
    last = measure(model, randomize=True).scalars()
    recorded = {tag: watcher.history[-1][tag] for tag in last}
    assert recorded == pytest.approx(last, rel=1e-6, abs=1e-6)
    assert watcher.report["fc1"].alpha == watcher.history[-1]["ww_alpha/fc1"]


def test_the_first_record_is_of_the_untrained_model():
    watcher, start = watching(), measure(Net(), randomize=True).scalars()
    fit(Net(), watcher, max_epochs=1)
    assert start.items() <= watcher.history[0].items()


@pytest.mark.parametrize("every", [2, 3])
def test_every_n_epochs_measures_less_often_but_projects_in_each(every):
    watcher, model = watching(every_n_epochs=every), Net()
    trainer = fit(model, watcher, max_epochs=4)
    measured = [r["epoch"] for r in watcher.history if "ww/alpha_mean" in r]
    assert measured == [float(epoch) for epoch in sorted({*range(0, 5, every), 4})]
    assert clock(trainer)["epochs"] == 4
    assert all(max(d) < 1e-6 for d in model.validated)


# When: validation and checkpoints see the projection


def test_validation_sees_the_projected_weights():
    model = Net()
    trainer = fit(model, watching(), max_epochs=3)
    assert len(model.validated) == 3
    assert all(max(d) < 1e-6 for d in model.validated)
    assert clock(trainer) == {"steps": 9, "epochs": 3, "boundary": 9}


def test_validation_within_an_epoch_sees_weights_that_are_not_due_yet():
    model = Net()
    fit(model, watching(), max_epochs=1, val_check_interval=1)
    assert [max(d) < 1e-6 for d in model.validated] == [False, False, True]


def test_the_ramp_goes_by_epochs():
    watcher = watching()
    fit(Net(strength=Ramp(4)), watcher, max_epochs=5)
    assert [r.get("ww/strength") for r in watcher.history] == [None, 0.25, 0.5, 0.75, 1.0, 1.0]


CHECKPOINTS = {
    "train epoch end": {"save_on_train_epoch_end": True},
    "validation end": {"save_on_train_epoch_end": False},
    "last step": {"every_n_train_steps": BATCHES},
}


def checkpoints(folder, kind):
    return ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **CHECKPOINTS[kind])


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_checkpoint_holds_projected_weights_and_their_clock(tmp_path, kind):
    fit(Net(), watching(), checkpoints(tmp_path, kind))
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 2
    for epochs, path in enumerate(paths, 1):
        state = torch.load(path, weights_only=True)
        model = Net()
        model.load_state_dict(state["state_dict"])
        assert projected(model)
        number = {"steps": 3 * epochs, "epochs": epochs, "boundary": 3 * epochs}
        assert state["optimizer_states"][0]["ww_pgd"] == number


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_resuming_is_bitwise(tmp_path, kind):
    whole, resumed = Net(strength=Ramp(4)), Net(strength=Ramp(4))
    first, second = watching(), watching()
    one = fit(whole, first, checkpoints(tmp_path, kind), max_epochs=4)
    path = tmp_path / "epoch=1-step=6.ckpt"
    two = fit(resumed, second, checkpoints(tmp_path, kind), max_epochs=4, ckpt_path=path)
    assert same(whole, resumed)
    assert clock(one) == clock(two) == {"steps": 12, "epochs": 4, "boundary": 12}
    assert without_seconds(first.history) == without_seconds(second.history)
    assert [record["epoch"] for record in second.history] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_checkpoint_can_be_read_with_weights_only(tmp_path):
    watcher = watching()
    fit(Net(), watcher, checkpoints(tmp_path, "train epoch end"), max_epochs=1)
    (path,) = tmp_path.glob("*.ckpt")
    state = torch.load(path, weights_only=True)["callbacks"][watcher.state_key]
    assert state["last_step"] == 3
    assert state["monitor"]["history"] == watcher.history
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_early_stopping_sees_the_value_of_its_epoch(at_epoch_end):
    stop = EarlyStopping(
        "ww/alpha_max",
        stopping_threshold=2.001,
        patience=100,
        check_on_train_epoch_end=at_epoch_end,
    )
    watcher = watching()
    trainer = fit(Net(strength=Ramp(3)), watcher, stop, max_epochs=8)
    assert watcher.history[-1]["ww/alpha_max"] < 2.001 < watcher.history[-2]["ww/alpha_max"]
    assert trainer.current_epoch == 3


@pytest.mark.parametrize("kind", ["train epoch end", "validation end"])
def test_a_checkpoint_is_chosen_by_the_value_of_its_own_weights(tmp_path, kind):
    best = ModelCheckpoint(
        tmp_path, monitor="ww/alpha_mean", mode="max", filename="{epoch}", **CHECKPOINTS[kind]
    )
    watcher = watching()
    fit(Net(strength=Ramp(4)), watcher, best, max_epochs=4)
    alphas = [record["ww/alpha_mean"] for record in watcher.history[1:]]
    assert float(best.best_model_score) == pytest.approx(max(alphas), rel=1e-6)
    model = Net()
    model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert measure(model).scalars()["ww/alpha_mean"] == pytest.approx(max(alphas), rel=1e-6)


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_callback_metrics_are_fresh(hook):
    watcher = watching()
    probe = Probe(hook, lambda trainer, _: float(trainer.callback_metrics["ww/alpha_mean"]))
    fit(Net(strength=Ramp(4)), watcher, probe, max_epochs=4)
    expected = [record["ww/alpha_mean"] for record in watcher.history[1:]]
    assert probe.seen == pytest.approx(expected, rel=1e-6)
    assert len(set(probe.seen)) == 4


def test_a_scheduler_can_watch_alpha():
    class Plateau(Net):
        def configure_optimizers(self):
            opt = WWPGD(torch.optim.AdamW(self.parameters(), lr=1e-2), model=self)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, mode="max", patience=0)
            return {
                "optimizer": opt,
                "lr_scheduler": {"scheduler": schedule, "monitor": "ww/alpha_mean"},
            }

    watcher = watching()
    trainer = fit(Plateau(), watcher, max_epochs=3)
    best = trainer.lr_scheduler_configs[0].scheduler.best
    assert best == pytest.approx(max(r["ww/alpha_mean"] for r in watcher.history[1:]), rel=1e-6)


# Epochs that end early


def assert_second_epoch_was_cut_short(watcher, model, trainer, step):
    assert [record["epoch"] for record in watcher.history] == [0.0, 1.0, 2.0]
    assert [record["step"] for record in watcher.history] == [0.0, 3.0, float(step)]
    assert "ww/distance_mean" in watcher.history[1]
    assert "ww/distance_mean" not in watcher.history[2]
    assert clock(trainer) == {"steps": step, "epochs": 1, "boundary": 3}
    assert free(model)
    alpha = float(trainer.callback_metrics["ww/alpha_mean"])
    assert alpha == pytest.approx(watcher.history[2]["ww/alpha_mean"], rel=1e-6)


@pytest.mark.parametrize("validate", [False, True])
def test_max_steps_in_the_middle_of_an_epoch_measures_but_does_not_project(validate):
    watcher, model = watching(), Net()
    trainer = fit(model, watcher, max_steps=5, max_epochs=-1, validate=validate)
    assert_second_epoch_was_cut_short(watcher, model, trainer, 5)


def test_max_steps_at_the_end_of_an_epoch_projects_once():
    watcher, model = watching(), Net()
    trainer = fit(model, watcher, max_steps=6, max_epochs=-1)
    assert len(watcher.history) == 3
    assert projected(model)
    assert clock(trainer)["epochs"] == 2


def test_should_stop_in_the_middle_of_an_epoch_measures_but_does_not_project():
    def stop(trainer, _module):
        trainer.should_stop = trainer.global_step == 4

    watcher, model = watching(), Net()
    trainer = fit(model, watcher, Probe("on_train_batch_end", stop), max_epochs=5, min_epochs=1)
    assert_second_epoch_was_cut_short(watcher, model, trainer, 4)


def test_a_batch_that_ends_its_epoch_measures_but_does_not_project():
    class Skips(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 1 and batch_idx == 1 else None

    watcher, model = watching(), Skips()
    trainer = fit(model, watcher, max_epochs=2)
    assert_second_epoch_was_cut_short(watcher, model, trainer, 4)


def test_an_epoch_that_was_cut_short_leaves_the_next_one_alone():
    def limit(trainer, _module):
        trainer.should_stop = trainer.global_step == 4

    model, watcher = Net(), watching()
    trainer = fit(model, watcher, Probe("on_train_batch_end", limit), max_epochs=5, min_epochs=1)
    trainer.should_stop = False
    trainer.fit_loop.max_epochs = trainer.current_epoch + 1
    trainer.fit(model, data(), data(1))
    assert projected(model)
    assert [record["epoch"] for record in watcher.history] == [0.0, 1.0, 2.0, 3.0]


# Loaders, accumulation, several optimizers, other modes


class Stream(IterableDataset):
    """Batches without a length."""

    def __iter__(self):
        for i in range(BATCHES):
            yield (gaussian(4, SIZE, seed=i),)


def test_an_iterable_without_a_length():
    watcher, model = watching(), Net()
    trainer = fit(model, watcher, loader=DataLoader(Stream(), batch_size=None), max_epochs=3)
    assert [record["step"] for record in watcher.history] == [0.0, 3.0, 6.0, 9.0]
    assert all("ww/distance_mean" in record for record in watcher.history[1:])
    assert all(max(d) < 1e-6 for d in model.validated)
    assert clock(trainer) == {"steps": 9, "epochs": 3, "boundary": 9}


@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_accumulated_gradients_count_as_one_step(accumulate):
    watcher, model = watching(), Net()
    trainer = fit(model, watcher, accumulate_grad_batches=accumulate)
    steps = 2 * math.ceil(BATCHES / accumulate)
    assert clock(trainer) == {"steps": steps, "epochs": 2, "boundary": steps}
    assert watcher.history[-1]["step"] == steps
    assert all(max(d) < 1e-6 for d in model.validated)


class Manual(Net):
    """Manual optimisation: one WWPGD for each layer, the second steps every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for opt in self.optimizers()[: 1 + index % 2]:
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            opt.step()

    def configure_optimizers(self):
        return [
            WWPGD(torch.optim.AdamW(layer.parameters(), lr=1e-2), model=self, strength=1.0)
            for layer in (self.fc1, self.fc2)
        ]


def test_manual_optimisation_with_two_optimizers():
    watcher, model = watching(), Manual()
    trainer = fit(model, watcher)
    clocks = [opt.state_dict()["ww_pgd"] for opt in trainer.optimizers]
    assert clocks == [
        {"steps": 6, "epochs": 2, "boundary": 6},
        {"steps": 2, "epochs": 2, "boundary": 2},
    ]
    assert all(max(d) < 1e-6 for d in model.validated)
    assert [record["step"] for record in watcher.history] == [0.0, 4.0, 8.0]
    assert watcher.history[-1].keys() >= PROJECTION


def test_a_loop_that_ends_its_epoch_itself_is_not_projected_twice():
    class Own(Net):
        def on_train_batch_end(self, *_):
            if self.trainer.is_last_batch:
                self.optimizers().end_epoch()

    model = Own(strength=0.5)
    trainer = fit(model, watching())
    assert clock(trainer) == {"steps": 6, "epochs": 2, "boundary": 6}


class Normalised(Net):
    """With a batch norm, for which StochasticWeightAveraging appends an epoch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(SIZE)

    def loss(self, batch):
        return super().loss([self.norm(batch[0])])


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_phantom_epoch_of_weight_averaging_is_ignored(ours_first):
    watcher, model = watching(), Normalised()
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    phantom = Probe("on_train_epoch_end", lambda trainer, _: trainer.fit_loop._skip_backward)
    callbacks = [watcher, averaging] if ours_first else [averaging, watcher]
    trainer = fit(model, phantom, *callbacks, max_epochs=3, validate=False)
    assert phantom.seen == [False, False, False, True]
    *during, average = watcher.history
    assert [record["epoch"] for record in during] == [0.0, 1.0, 2.0, 3.0]
    assert [record["step"] for record in during] == [0.0, 3.0, 6.0, 9.0]
    assert clock(trainer)["epochs"] == 3
    assert average["ww/alpha_mean"] == measure(model).scalars()["ww/alpha_mean"]


@pytest.mark.parametrize("ours_first", [True, False])
def test_an_average_is_of_projected_weights_if_ours_comes_first(ours_first):
    model = Net()
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no exponential moving average")
    averaging = pl.callbacks.EMAWeightAveraging(
        decay=0.0
    )  # the average is the last weights that it was shown
    callbacks = [watching(), averaging]
    fit(model, *(callbacks if ours_first else callbacks[::-1]), max_epochs=2)
    assert all((max(d) < 1e-6) == ours_first for d in model.validated)
    assert len(model.validated) == 2


def test_fast_dev_run():
    watcher, model = watching(), Net()
    trainer = fit(model, watcher, fast_dev_run=True)
    assert [record["epoch"] for record in watcher.history] == [0.0, 1.0]
    assert projected(model)
    assert clock(trainer) == {"steps": 1, "epochs": 1, "boundary": 1}


def test_the_sanity_check_does_not_project():
    model = Net()
    trainer = fit(model, watching(), max_epochs=1, num_sanity_val_steps=1)
    sanity, after = model.validated
    assert min(sanity) > 0.01
    assert max(after) < 1e-6
    assert clock(trainer)["epochs"] == 1


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_nothing_happens_outside_of_training(run):
    class Everything(Net):
        test_step = Net.validation_step

        def predict_step(self, batch, _index):
            return self.loss(batch)

    watcher, model = watching(), Everything()
    trainer = make_trainer(watcher)
    options = {} if run == "predict" else {"verbose": False}
    getattr(trainer, run)(model, data(1), **options)
    assert watcher.history == []
    assert free(model)


def test_fitting_twice_goes_on():
    watcher, model = watching(), Net()
    trainer = fit(model, watcher)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, data(), data(1))
    assert [record["epoch"] for record in watcher.history] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(model.validated) == 4
    assert all(max(d) < 1e-6 for d in model.validated)


def test_a_compiled_module():
    model = Net()
    watcher = watching()
    trainer = make_trainer(watcher, max_epochs=1)
    trainer.fit(torch.compile(model, backend="eager"), data())
    assert watcher.history[-1].keys() >= SUMMARIES | LAYERS | PROJECTION
    assert projected(model)


# What must not change


@pytest.mark.parametrize("settings", [{}, {"randomize": False}, {"every_n_epochs": 2}])
def test_watching_a_bare_optimizer_changes_no_bit_of_the_training(settings):
    models = []
    for callbacks in ([], [watching(**settings)]):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = Net(strength=None, dropout=0.5)
            fit(model, *callbacks, loader=data(shuffle=True), max_epochs=3)
        models.append(model)
    assert same(*models)
    assert models[0].validated == models[1].validated


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_a_projection_of_strength_zero_trains_like_the_base(settings):
    bare, wrapped = Net(strength=None), Net(strength=0.0)
    fit(bare, max_epochs=3, **settings)
    trainer = fit(wrapped, watching(), max_epochs=3, **settings)
    assert same(bare, wrapped)
    assert clock(trainer)["epochs"] == 3


def test_a_layer_of_nan_warns_once_and_training_goes_on():
    class Broken(Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(30, 30)
            with torch.no_grad():
                self.unused.weight[0, 0] = math.nan

    watcher, model = watching(), Broken()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, watcher, max_epochs=3)
    messages = [str(w.message) for w in caught if "unused" in str(w.message)]
    assert len(messages) == 1
    assert "layer unused is not watched: NaN" in messages[0]
    assert [record["epoch"] for record in watcher.history] == [0.0, 1.0, 2.0, 3.0]
    assert projected(model)


# Several callbacks, and none of Lightning


def test_two_callbacks_with_different_settings_keep_their_own_state(tmp_path):
    often, seldom = watching(), watching(every_n_epochs=2)
    assert often.state_key != seldom.state_key
    checkpoint = checkpoints(tmp_path, "train epoch end")
    trainer = fit(Net(strength=0.5), often, seldom, checkpoint)
    assert clock(trainer)["epochs"] == 2  # projected once an epoch, not once a callback
    state = torch.load(tmp_path / "epoch=1-step=6.ckpt", weights_only=True)["callbacks"]
    kept = {key: state[key]["monitor"]["history"] for key in (often.state_key, seldom.state_key)}
    assert [r["epoch"] for r in kept[often.state_key]] == [0.0, 1.0, 2.0]
    assert [r["epoch"] for r in kept[seldom.state_key]] == [0.0, 2.0]


@pytest.mark.parametrize("setting", [{"randomize": False}, {"seed": 1}, {"every_n_epochs": 2}])
def test_every_setting_is_in_the_state_key(setting):
    assert watching().state_key == watching().state_key
    assert watching(**setting).state_key != watching().state_key


def test_of_two_callbacks_with_the_same_settings_the_second_does_nothing(tmp_path):
    first, second = watching(), watching()
    with pytest.warns(UserWarning, match="two WeightWatcherCallbacks") as caught:
        trainer = fit(Net(), first, second, checkpoints(tmp_path, "train epoch end"))
    assert len([w for w in caught if "two" in str(w.message)]) == 1
    assert [record["epoch"] for record in first.history] == [0.0, 1.0, 2.0]
    assert second.history == []
    assert clock(trainer)["epochs"] == 2
    state = torch.load(tmp_path / "epoch=1-step=6.ckpt", weights_only=True)["callbacks"]
    assert state[first.state_key]["monitor"]["history"] == first.history


def test_a_callback_that_comes_late_says_so_and_goes_on():
    trainer, watcher, model = make_trainer(), watching(), Net()
    trainer.fit(model, data(), data(1))
    trainer.callbacks.append(watcher)
    trainer.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match="watched from step 6 on") as caught:
        trainer.fit(model, data(), data(1))
    assert len([w for w in caught if "watched from" in str(w.message)]) == 1
    assert [record["epoch"] for record in watcher.history] == [2.0, 3.0, 4.0]
    assert clock(trainer)["epochs"] == 2


def test_without_a_logger_one_warning_says_where_the_numbers_are():
    with pytest.warns(UserWarning, match=r"no logger: .*\.history") as caught:
        fit(Net(), watching())
    assert len([w for w in caught if "no logger" in str(w.message)]) == 1


def test_with_a_logger_of_its_own_there_is_no_such_warning(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Net(), watching(log_to=tmp_path / "log.csv"))
    assert not [w for w in caught if "no logger" in str(w.message)]
    assert (tmp_path / "log.csv").read_text().count("ww/alpha_mean") == 3


def test_a_logger_that_fails_warns_once_and_training_completes(tmp_path):
    class Full(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(tag.startswith("ww") for tag in metrics):
                raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="No space left on device") as caught:
        trainer = fit(Net(), watching(), logger=Full(tmp_path), max_epochs=3)
    assert len([w for w in caught if "No space" in str(w.message)]) == 1
    assert trainer.current_epoch == 3


# Stopping, steps, budget


@pytest.mark.parametrize("validate", [False, True])
def test_a_rule_stops_the_training_after_a_whole_epoch(validate):
    watcher, model = watching(early_stop=alpha_below(2.1)), Net(strength=Ramp(3))
    trainer = fit(model, watcher, max_epochs=8, validate=validate)
    assert trainer.current_epoch == 3
    assert [record["epoch"] for record in watcher.history] == [0.0, 1.0, 2.0, 3.0]
    assert watcher.history[-1]["ww/alpha_mean"] < 2.1 < watcher.history[-2]["ww/alpha_mean"]
    assert len(model.validated) == 3 * validate


def test_a_rule_that_says_no_changes_nothing():
    trainer = fit(Net(), watching(early_stop=alpha_below(0.5)), max_epochs=3)
    assert trainer.current_epoch == 3


def test_steps_are_measured_too(tmp_path):
    watcher = watching(every_n_steps=2)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = fit(Net(), watcher, logger=logger, max_epochs=2)
    assert [record["step"] for record in watcher.history] == [0.0, 2.0, 3.0, 4.0, 6.0]
    assert ["ww/strength" in record for record in watcher.history] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert [event.step for event in events(tmp_path / "run")["ww/alpha_mean"]] == [0, 1, 2, 3, 5]
    assert clock(trainer)["epochs"] == 2


def test_early_stopping_does_not_fail_at_epochs_that_are_not_measured():
    """Whether by `every_n_epochs` or by the budget: the latest value stands in."""
    stop = EarlyStopping("ww/alpha_mean", patience=100, mode="min")
    watcher = watching(every_n_epochs=3, at_start=True)
    trainer = fit(Net(), watcher, stop, max_epochs=4)
    assert trainer.current_epoch == 4


def test_the_summary_is_printed_at_the_end(capsys):
    fit(Net(), watching())
    printed = capsys.readouterr().out
    assert printed.count("the model: critical (2 layers)") == 1
    assert "% of training time" in printed
    fit(Net(), watching(summary=False))
    assert "the model" not in capsys.readouterr().out


class Stateful(DataLoader):
    """A loader that a checkpoint can put where it was: the next batch of an unshuffled set."""

    def __init__(self):
        super().__init__(TensorDataset(gaussian(4 * 6, SIZE)), batch_size=4)
        self.given = 0

    def __iter__(self):
        batches = list(super().__iter__())
        for batch in batches[self.given :]:
            self.given += 1
            yield batch
        self.given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


@pytest.mark.parametrize("strength", [None, Ramp(4)], ids=["bare", "steered"])
def test_resuming_in_the_middle_of_an_epoch_is_as_exact_as_lightning_is(tmp_path, strength):
    runs = []
    saving = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 4}
    for watched in (True, False):
        if not watched and strength is not None:
            continue
        folder = tmp_path / str(watched)
        results = []
        for path in (None, folder / "step=4.ckpt"):
            model = Net(strength=strength)
            callbacks = [ModelCheckpoint(folder, **saving)]
            callbacks += [watching()] if watched else []
            fit(
                model, *callbacks, loader=Stateful(), max_epochs=3, validate=False, ckpt_path=path,
            )  # fmt: skip
            results.append(model)
        runs.append(results)
    exact = [same(*results) for results in runs]
    assert exact[0]
    if strength is None:
        assert exact == [True, True]
        assert same(runs[0][0], runs[1][0])


# Two processes

DDP = """
import torch
import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from tests.test_lightning import SIZE, Net, watching
from tests.oracles import gaussian
from torch.utils.data import DataLoader, TensorDataset
from ww_train.callbacks.early_stopping import alpha_below
from ww_train import Ramp

torch.set_num_threads(RANK + 1)  # by itself enough to tear replicas apart that project on their own
watcher = watching(early_stop=alpha_below(2.001), log_to=f"{FOLDER}/log.csv")
model = Net(strength=Ramp(3))
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=6, callbacks=[watcher],
    logger=CSVLogger(FOLDER, name="", version="v"), enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    log_every_n_steps=1,
)
loader = DataLoader(TensorDataset(gaussian(24, SIZE)), batch_size=4)
trainer.fit(model, loader, DataLoader(TensorDataset(gaussian(8, SIZE)), batch_size=4))
strip = ("ww/seconds", "ww/overhead")
RESULT = {
    "weights": [p.flatten().tolist() for p in model.parameters()],
    "history": [{k: v for k, v in r.items() if k not in strip} for r in watcher.history],
    "epochs": trainer.current_epoch,
    "metric": float(trainer.callback_metrics["ww/alpha_mean"]),
    "replicas": trainer.optimizers[0].replicas is not None,
}
"""


def test_replicas_stay_equal_and_stop_together(tmp_path):
    zero, one = run_ranks(DDP, tmp_path)
    assert zero == one
    assert zero["replicas"]
    assert zero["epochs"] == 3
    assert [record["epoch"] for record in zero["history"]] == [0.0, 1.0, 2.0, 3.0]
    assert zero["metric"] == pytest.approx(zero["history"][-1]["ww/alpha_mean"], rel=1e-6)
    assert (tmp_path / "log.csv").read_text().count(",ww/alpha_mean,") == 4
    with open(tmp_path / "v" / "metrics.csv", newline="") as file:
        assert len([row for row in csv.DictReader(file) if row["ww_alpha/fc1"]]) == 4


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "ww_train.callbacks.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ww-train\[lightning\]'"):
        importlib.import_module("ww_train.callbacks.lightning")


# In the background


@pytest.mark.parametrize("strength", [None, 0.3], ids=["watched", "steered"])
def test_in_the_background_every_record_is_that_of_its_step(tmp_path, strength):
    every, beside, module = watching(every_n_steps=1), watching(background=True), Net(strength)
    bare = Net(strength)
    fit(bare, every, max_epochs=4)
    trainer = fit(module, beside, max_epochs=4, logger=TensorBoardLogger(tmp_path))
    assert same(bare, module)
    truth, records = of_layers(every.history), of_layers(beside.history)
    assert {0, 4 * BATCHES} <= records.keys()
    for step, record in records.items():
        assert record.items() <= truth[step].items()
    logged = [event.step for event in events(trainer.logger.log_dir)["ww_alpha/fc1"]]
    *early, last = [step for step in records if "ww_alpha/fc1" in records[step]]
    assert logged == [*(max(0, step - 1) for step in early), last]
    assert helpers() == []


def test_a_checkpoint_holds_what_was_being_measured(tmp_path):
    beside = watching(background=True, at_start=False)
    saved = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    fit(Net(None), beside, saved, max_epochs=3)
    steps = {}
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        history = checkpoint["callbacks"][beside.state_key]["monitor"]["history"]
        steps[checkpoint["global_step"] // BATCHES] = [r["step"] // BATCHES for r in history]
    # the copy of an epoch is made behind its checkpoint
    assert steps == {1: [1], 2: [1], 3: [1, 2]}


def test_what_stops_and_chooses_has_numbers_in_the_background(tmp_path):
    beside = watching(background=True, at_start=False)
    callbacks = (
        EarlyStopping("ww/alpha_mean", patience=0, mode="max", min_delta=100.0),
        ModelCheckpoint(tmp_path, monitor="ww/alpha_mean"),
    )
    with pytest.warns(UserWarning, match="are of earlier weights") as caught:
        trainer = fit(Net(None), beside, *callbacks, max_epochs=5)
    (message,) = [str(w.message) for w in caught if "background" in str(w.message)]
    assert message.startswith(
        "EarlyStopping(monitor='ww/alpha_mean') and ModelCheckpoint(monitor='ww/alpha_mean'): "
    )
    assert trainer.current_epoch < 5
    assert list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("background", "watched"), [(False, "ww/alpha_mean"), (True, "val_loss"), (True, None)]
)
def test_other_decisions_are_not_warned_of(tmp_path, background, watched):
    chooses = ModelCheckpoint(tmp_path, monitor=watched)
    beside = watching(background=background)
    fit(Net(None), beside, chooses, max_epochs=1)
    assert "decides" not in beside.monitor._warn.given


def test_its_own_rule_stops_in_the_background():
    beside = watching(background=True, early_stop=lambda report: len(beside.history) == 2)
    trainer = fit(Net(None), beside, max_epochs=20)
    assert trainer.current_epoch < 20


def test_a_failing_training_ends_the_thread(tmp_path):
    def fails(trainer, module):
        if trainer.current_epoch == 1:
            raise KeyError("in the second epoch")

    beside = watching(background=True, at_start=False)
    with pytest.raises(KeyError, match="second epoch"):
        fit(Net(None), beside, Probe("on_train_epoch_start", fails))
    assert [record["step"] for record in beside.history] == [BATCHES]
    assert helpers() == []
