import copy
import importlib
import inspect
import json
import math
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback  # noqa: E402

from ww_train import WWPGD, ManifoldProjection, Ramp, measure  # noqa: E402
from ww_train.callbacks.early_stopping import alpha_below  # noqa: E402
from ww_train.callbacks.huggingface import WeightWatcherCallback, WWPGDFactory  # noqa: E402
from ww_train.callbacks.monitor import find_wwpgd  # noqa: E402

from .processes import run_ranks  # noqa: E402
from .watching import SUMMARIES, helpers, of_layers, without_seconds  # noqa: E402

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
BATCH, STEPS = 2, 3  # steps in an epoch
COST = {"ww/overhead"}  # known as soon as there was a step
BLOCK = "model.layers.0"
LINEAR = {
    *(f"{BLOCK}.self_attn.{name}_proj" for name in "qkvo"),
    *(f"{BLOCK}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "lm_head",
}
WATCHED = LINEAR | {"model.embed_tokens"}
LAYERS = {f"ww_{m}/{n}" for m in ("alpha", "erg_gap", "trace_log", "traps") for n in WATCHED}
PROJECTION = {"ww/distance_mean", "ww/strength"} | {f"ww_distance/{name}" for name in LINEAR}

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected",
        "`torch.cpu.amp.autocast",
        "`is_gradient_checkpointing` is deprecated",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        ".*lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)",
        "the trainer reports to nothing",
    )
]


@pytest.fixture(autouse=True)
def _old_checkpoints(monkeypatch):
    """Up to Transformers 4.46 a Trainer cannot read its own random state with torch 2.6 or later."""
    if VERSION < (4, 47):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def llama(**settings):
    """A block of Llama with dropout in its attention; always the same weights."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.2,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def data(size=BATCH * STEPS):
    tokens = torch.randint(0, 40, (size, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def distances(model):
    """Distance of every linear layer to the manifold: below 1e-6 after a projection."""
    return [
        ManifoldProjection().project_(module.weight.detach().clone()).distance
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]


def projected(model):
    return max(distances(model)) < 1e-6


def free(model):
    return min(distances(model)) > 1e-4


def make_trainer(
    folder, *callbacks, strength=1.0, model=None, optimizer=None, train=None, **settings
):
    """A Trainer with a `WWPGD`; `strength=None` is without: `optimizer`, or the Trainer's own."""
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
    }
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{**defaults, **settings},
    )
    model = model or llama()
    if strength is not None:
        trained = [p for p in model.parameters() if p.requires_grad]
        base = torch.optim.AdamW(trained, lr=args.learning_rate)
        optimizer = WWPGD(base, model=model, strength=strength)
    return Trainer(
        model,
        args,
        train_dataset=data() if train is None else train,
        eval_dataset=data(BATCH),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def train(folder, *callbacks, resume=None, **settings):
    trainer = make_trainer(folder, *callbacks, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def clock(trainer):
    return find_wwpgd(trainer.optimizer).state_dict()["ww_pgd"]


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


def column(watcher, key):
    return [record.get(key) for record in watcher.history]


def losses(trainer):
    return [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]


def rows(trainer):
    """Our rows of the trainer's log."""
    return [row for row in trainer.state.log_history if "ww/alpha_mean" in row]


class Probe(TrainerCallback):
    """Runs a function at one event and keeps what it returns."""

    def __init__(self, event, function):
        self.seen = []

        def run(args, state, control, **kwargs):
            self.seen.append(function(state=state, control=control, **kwargs))

        setattr(self, event, run)


def evaluations():
    """Whether evaluation sees projected weights, each time."""
    return Probe("on_prediction_step", lambda model, **_: projected(model))


# Reporters and the log


def watching(**options):
    """The callback without a budget: on a loaded machine even tiny measurements may not fit in."""
    return WeightWatcherCallback(**{"budget": None, **options})


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Settings by which the trainer writes to TensorBoard in a folder, and the folder."""
    folder = tmp_path / "board"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    settings = {"report_to": "tensorboard"}
    if "logging_dir" in inspect.signature(TrainingArguments).parameters:  # Transformers 4
        settings["logging_dir"] = str(folder)
    return settings, folder


@pytest.mark.parametrize("attached", [False, True])
def test_tensorboard_has_every_tag_at_the_step_of_the_evaluation(tmp_path, board, attached):
    settings, folder = board
    watcher = watching()
    trainer = make_trainer(tmp_path, watcher, eval_strategy="epoch", **settings)
    if attached:
        assert watcher.attach(trainer) is watcher
    trainer.train()
    scalars = events(folder)
    assert {tag for tag in scalars if "ww" in tag} == SUMMARIES | LAYERS | PROJECTION | COST
    evaluated = [event.step for event in scalars["eval/loss"]]
    assert evaluated == [3, 6]
    for tag in SUMMARIES | LAYERS:
        assert [event.step for event in scalars[tag]] == [0, *evaluated]
        written = [event.value for event in scalars[tag]]
        assert written == pytest.approx(column(watcher, tag), rel=1e-6)
    for tag in PROJECTION | COST:
        assert [event.step for event in scalars[tag]] == evaluated
    assert [event.step for event in scalars["train/loss"]] == evaluated
    assert len(list(folder.rglob("events.out.tfevents.*"))) == 1


def test_a_tensorboard_added_after_the_callback_has_the_same_tags(tmp_path, board):
    settings, folder = board
    trainer = make_trainer(tmp_path, watching(), **{**settings, "report_to": "none"})
    trainer.add_callback(TensorBoardCallback())
    trainer.train()
    scalars = events(folder)
    assert {tag for tag in scalars if "ww" in tag} == SUMMARIES | LAYERS | PROJECTION | COST
    assert [event.step for event in scalars["ww/alpha_mean"]] == [0, 3, 6]


def test_a_framework_that_calls_callbacks_itself_needs_attach(tmp_path):
    """Without a calling handler in sight only an attached callback knows the reporters."""
    for attached in (False, True):
        watcher, reporter = watching(), Probe("on_log", lambda logs, **_: logs)
        trainer = make_trainer(tmp_path, watcher, reporter)
        if attached:
            watcher.attach(trainer)
        event = trainer.args, trainer.state, trainer.control
        watcher.on_train_begin(*event, model=trainer.model)
        watcher.on_epoch_begin(*event, model=trainer.model)
        assert len(watcher.history) == len(rows(trainer)) == 1
        assert len(reporter.seen) == attached


def test_without_a_wwpgd_there_is_nothing_about_projections(tmp_path, board):
    settings, folder = board
    train(tmp_path, watching(), strength=None, **settings)
    assert {tag for tag in events(folder) if "ww" in tag} == SUMMARIES | LAYERS | COST


def test_every_other_reporter_gets_the_same_numbers(tmp_path):
    first, last = (Probe("on_log", lambda logs, **_: dict(logs)) for _ in range(2))
    watcher = watching(randomize=False)
    train(tmp_path, first, watcher, last)
    for reporter in (first, last):
        ours = [logs for logs in reporter.seen if "ww/alpha_mean" in logs]
        assert ours == [
            {k: v for k, v in record.items() if k not in ("epoch", "step")}
            for record in watcher.history
        ]
        assert not [tag for tag in ours[0] if "traps" in tag]
        assert len([logs for logs in reporter.seen if "loss" in logs]) == 2


def test_the_console_does_not_get_a_line_for_every_layer(tmp_path, capsys):
    train(tmp_path, watching())
    printed = capsys.readouterr().out
    assert "loss" in printed
    assert "ww" not in printed


def test_the_log_holds_plain_summaries_and_no_row_of_the_loss_is_lost(tmp_path):
    for settings, steps in (
        ({"logging_strategy": "epoch"}, [3, 6]),
        ({"logging_strategy": "steps", "logging_steps": 1}, [1, 2, 3, 4, 5, 6]),
        ({"logging_strategy": "steps", "logging_steps": 2}, [2, 4, 6]),
    ):
        watcher = watching()
        bare = train(tmp_path, strength=0.0, **settings)
        watched = train(tmp_path, watcher, strength=0.0, **settings)
        assert losses(watched) == losses(bare)
        assert [step for step, _ in losses(watched)] == steps
        assert [(row["epoch"], row["step"]) for row in rows(watched)] == [(0, 0), (1, 3), (2, 6)]
        assert rows(watched)[0].keys() == SUMMARIES | {"epoch", "step"}
        for row, record in zip(rows(watched), watcher.history, strict=True):
            assert row.items() <= record.items()
            assert all(type(value) in (int, float) for value in row.values())


def test_the_state_is_plain_json(tmp_path):
    watcher = watching()
    trainer = train(tmp_path, watcher, save_strategy="epoch")
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["WeightWatcherCallback"]
    assert kept["args"] == watcher.monitor.settings
    assert kept["args"]["randomize"] is True
    assert kept["attributes"]["last_step"] == 6
    assert kept["attributes"]["watched"]["history"] == watcher.history
    assert [row for row in state["log_history"] if "ww/alpha_mean" in row] == rows(trainer)
    trainer.state.save_to_json(str(tmp_path / "state.json"))


def test_the_history(tmp_path):
    watcher, model = watching(), llama()
    start = measure(llama(), randomize=True).scalars()
    train(tmp_path, watcher, model=model)
    assert start.items() <= watcher.history[0].items()
    assert column(watcher, "epoch") == [0.0, 1.0, 2.0]
    assert column(watcher, "step") == [0.0, 3.0, 6.0]
    assert watcher.history[0].keys() == SUMMARIES | LAYERS | {"epoch", "step"}
    assert watcher.history[1].keys() == SUMMARIES | LAYERS | PROJECTION | COST | {
        "epoch",
        "step",
    }
    last = measure(model, randomize=True).scalars()
    recorded = {tag: watcher.history[-1][tag] for tag in last}
    assert recorded == pytest.approx(last, rel=1e-5, abs=1e-5)
    assert watcher.report["lm_head"].alpha == watcher.history[-1]["ww_alpha/lm_head"]


@pytest.mark.parametrize("event", ["on_epoch_begin", "on_step_end", "on_epoch_end"])
@pytest.mark.parametrize("flag", [False, True])
def test_the_flags_of_the_trainer_are_left_alone(tmp_path, event, flag):
    def meddle(control, **_):
        for name in vars(control):
            setattr(control, name, not flag)

    watcher, meddler = watching(), Probe("on_log", meddle)
    trainer = make_trainer(tmp_path)
    trainer.callback_handler.callbacks = [watcher, meddler]
    trainer.state.epoch, trainer.state.global_step = 1.0, 0 if event == "on_epoch_begin" else 3
    control = copy.copy(trainer.control)
    for name in vars(control):
        setattr(control, name, flag)
    before = dict(vars(control))
    for name in ("on_train_begin", event):
        trainer.callback_handler.call_event(name, trainer.args, trainer.state, control)
    assert len(meddler.seen) == 1
    assert vars(control) == before


# When: evaluation and checkpoints see the projection

STRATEGIES = {
    "epoch": {},
    "steps": {f"{what}_steps": STEPS for what in ("save", "eval", "logging")},
}


def saving(kind):
    """Saving, evaluating and logging once an epoch: at its end, or at its last step."""
    strategies = {f"{what}_strategy": kind for what in ("save", "eval", "logging")}
    return {**strategies, **STRATEGIES[kind]}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_evaluations_and_checkpoints_see_projected_weights(tmp_path, kind):
    evaluation = evaluations()
    watcher = watching()
    trainer = train(tmp_path, watcher, evaluation, **saving(kind))
    assert evaluation.seen == [True, True]
    for epochs in (1, 2):
        folder = tmp_path / f"checkpoint-{STEPS * epochs}"
        assert projected(LlamaForCausalLM.from_pretrained(folder))
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        numbers = {"steps": 3 * epochs, "epochs": epochs, "boundary": 3 * epochs}
        assert state["ww_pgd"] == numbers
    assert clock(trainer) == {"steps": 6, "epochs": 2, "boundary": 6}


def test_an_evaluation_within_an_epoch_sees_weights_that_are_not_due_yet(tmp_path):
    evaluation = evaluations()
    options = {"num_train_epochs": 1, "eval_strategy": "steps", "eval_steps": 1}
    train(tmp_path, watching(), evaluation, **options)
    assert evaluation.seen == [False, False, True]


@pytest.mark.parametrize("kind", STRATEGIES)
def test_resuming_is_bitwise(tmp_path, kind):
    options = {"strength": Ramp(4), "num_train_epochs": 4, **saving(kind)}
    first, second = watching(), watching()
    one = train(tmp_path, first, **options)
    two = train(tmp_path, second, resume=str(tmp_path / "checkpoint-6"), **options)
    assert same(one.model, two.model)
    assert clock(one) == clock(two) == {"steps": 12, "epochs": 4, "boundary": 12}
    assert without_seconds(first.history) == without_seconds(second.history)
    assert column(second, "epoch") == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert losses(one) == losses(two)
    assert without_seconds(rows(one)) == without_seconds(rows(two))


@pytest.mark.skipif(VERSION < (5,), reason="Transformers 4.57 does not with a bare AdamW either")
def test_resuming_in_the_middle_of_an_epoch_is_bitwise(tmp_path):
    options = {"strength": Ramp(2), "save_strategy": "steps", "save_steps": 4}
    first, second = watching(), watching()
    one = train(tmp_path, first, **options)
    two = train(tmp_path, second, resume=str(tmp_path / "checkpoint-4"), **options)
    assert same(one.model, two.model)
    assert clock(one) == clock(two) == {"steps": 6, "epochs": 2, "boundary": 6}
    assert without_seconds(first.history) == without_seconds(second.history)


def test_resuming_with_a_callback_that_the_checkpoint_does_not_know(tmp_path):
    train(tmp_path, save_strategy="epoch")
    watcher = watching()
    folder = str(tmp_path / "checkpoint-3")
    with pytest.warns(UserWarning, match="watched from step 3 on") as caught:
        trainer = train(tmp_path, watcher, resume=folder, save_strategy="epoch")
    assert len([w for w in caught if "watched from" in str(w.message)]) == 1
    assert column(watcher, "epoch") == [1.0, 2.0]
    assert projected(trainer.model)


def test_resuming_at_the_end_does_nothing(tmp_path):
    train(tmp_path, watching(), save_strategy="epoch")
    watcher = watching()
    trainer = train(tmp_path, watcher, resume=str(tmp_path / "checkpoint-6"))
    assert column(watcher, "epoch") == [0.0, 1.0, 2.0]
    assert clock(trainer) == {"steps": 6, "epochs": 2, "boundary": 6}


def test_the_trainer_may_replace_the_callback_by_a_restored_one(tmp_path):
    options = {"save_strategy": "epoch", "num_train_epochs": 3}
    first, second = watching(seed=3), watching()
    train(tmp_path, first, **options)
    trainer = train(
        tmp_path,
        second,
        resume=str(tmp_path / "checkpoint-6"),
        restore_callback_states_from_checkpoint=True,
        **options,
    )
    (used,) = [c for c in trainer.callback_handler.callbacks if type(c) is type(second)]
    assert used is not second
    assert used.monitor.survey.seed == 3
    assert without_seconds(used.history) == without_seconds(first.history)
    assert without_seconds(rows(trainer))[-1].items() <= used.history[-1].items()


# Metrics of an evaluation


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("every", [1, 2])
def test_the_best_checkpoint_is_chosen_by_the_value_of_its_own_weights(tmp_path, kind, every):
    watcher = watching(every_n_epochs=every)
    trainer = train(
        tmp_path,
        watcher,
        strength=Ramp(4),
        num_train_epochs=4,
        metric_for_best_model="ww_alpha_mean",
        greater_is_better=False,
        load_best_model_at_end=True,
        **saving(kind),
    )
    alphas = [alpha for alpha in column(watcher, "ww/alpha_mean")[1:] if alpha is not None]
    assert len(alphas) == 4 // every
    assert trainer.state.best_metric == min(alphas)
    if every == 1:
        best = STEPS * (1 + alphas.index(min(alphas)))
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
        assert measure(trainer.model).scalars()["ww/alpha_mean"] == pytest.approx(min(alphas))


def test_early_stopping_sees_the_value_of_its_epoch(tmp_path):
    watcher = watching()
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = train(
        tmp_path,
        watcher,
        stop,
        num_train_epochs=6,
        metric_for_best_model="ww_alpha_mean",
        greater_is_better=True,  # full projections only lower it
        load_best_model_at_end=True,
        **saving("epoch"),
    )
    alphas = column(watcher, "ww/alpha_mean")[1:]
    assert trainer.state.global_step < 6 * STEPS
    assert alphas[-1] <= max(alphas[:-1])


def test_an_evaluation_after_the_training_says_nothing_of_weights_it_did_not_measure(tmp_path):
    watcher = watching()
    metrics = Probe("on_evaluate", lambda metrics, **_: dict(metrics))
    trainer = train(tmp_path, watcher, metrics, eval_strategy="epoch")
    expected = column(watcher, "ww/alpha_mean")[1:]
    assert [seen["eval_ww_alpha_mean"] for seen in metrics.seen] == expected
    assert not [key for key in trainer.evaluate() if "ww" in key]


# Epochs that end early, or have no length


def assert_second_epoch_was_cut_short(watcher, trainer, step):
    assert column(watcher, "epoch") == [0.0, 1.0, 2.0]
    assert column(watcher, "step") == [0.0, 3.0, float(step)]
    assert "ww/distance_mean" in watcher.history[1]
    assert "ww/distance_mean" not in watcher.history[2]
    assert clock(trainer) == {"steps": step, "epochs": 1, "boundary": 3}
    assert free(trainer.model)


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"max_steps": 4}, 4),
        ({"max_steps": 5}, 5),
        ({"num_train_epochs": 1.3}, 4),
        ({"num_train_epochs": 1.5}, 5),
    ],
)
def test_an_epoch_that_ends_early_is_measured_but_not_projected(tmp_path, settings, step):
    watcher = watching()
    trainer = train(tmp_path, watcher, **settings)
    assert_second_epoch_was_cut_short(watcher, trainer, step)


@pytest.mark.parametrize("flag", ["should_training_stop", "should_epoch_stop"])
def test_a_callback_that_ends_the_epoch(tmp_path, flag):
    def stop(state, control, **_):
        if state.global_step == 4:
            setattr(control, flag, True)

    watcher = watching()
    trainer = train(tmp_path, watcher, Probe("on_step_end", stop))
    assert_second_epoch_was_cut_short(watcher, trainer, 4)


def test_max_steps_at_the_end_of_an_epoch_projects_once(tmp_path):
    watcher = watching()
    trainer = train(tmp_path, watcher, max_steps=6)
    assert len(watcher.history) == 3
    assert projected(trainer.model)
    assert clock(trainer)["epochs"] == 2


@pytest.mark.parametrize("every", [2, 3])
def test_every_n_epochs_measures_less_often_but_projects_in_each(tmp_path, every):
    watcher, evaluation = watching(every_n_epochs=every), evaluations()
    trainer = train(tmp_path, watcher, evaluation, num_train_epochs=4, eval_strategy="epoch")
    measured = [r["epoch"] for r in watcher.history if "ww/alpha_mean" in r]
    assert measured == [float(epoch) for epoch in sorted({*range(0, 5, every), 4})]
    assert clock(trainer)["epochs"] == 4
    assert evaluation.seen == [True] * 4


class Stream(IterableDataset):
    """Examples without a length."""

    def __iter__(self):
        yield from data()


def test_an_iterable_without_a_length(tmp_path):
    """Its last epoch ends by `max_steps`: nobody knows whether it was a whole one."""
    watcher, evaluation = watching(), evaluations()
    trainer = train(
        tmp_path, watcher, evaluation, train=Stream(), max_steps=9, eval_strategy="epoch"
    )
    assert column(watcher, "epoch") == [0.0, 1.0, 2.0, 3.0]
    assert column(watcher, "step") == [0.0, 3.0, 6.0, 9.0]
    assert ["ww/strength" in record for record in watcher.history] == [False, True, True, False]
    assert evaluation.seen == [True, True, False]
    assert clock(trainer) == {"steps": 9, "epochs": 2, "boundary": 6}


def test_a_stream_longer_than_the_training_is_one_epoch_for_the_trainer_and_for_us(tmp_path):
    watcher = watching()
    trainer = train(tmp_path, watcher, train=Stream(), max_steps=2)
    assert trainer.state.epoch == 1.0
    assert column(watcher, "step") == [0.0, 2.0]
    assert clock(trainer) == {"steps": 2, "epochs": 1, "boundary": 2}


@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_accumulated_gradients_count_as_one_step(tmp_path, accumulate):
    watcher, evaluation = watching(), evaluations()
    trainer = train(
        tmp_path,
        watcher,
        evaluation,
        gradient_accumulation_steps=accumulate,
        eval_strategy="epoch",
    )
    steps = 2 * math.ceil(STEPS / accumulate)
    if trainer.state.max_steps != steps:
        pytest.skip("this Trainer carries what an epoch leaves over into the next one")
    assert clock(trainer) == {"steps": steps, "epochs": 2, "boundary": steps}
    assert watcher.history[-1]["step"] == steps == trainer.state.global_step
    assert evaluation.seen == [True, True]


# Several trainings, several callbacks, other optimizers


def test_training_twice_projects_in_every_epoch(tmp_path):
    watcher, evaluation = watching(), evaluations()
    trainer = make_trainer(tmp_path, watcher, evaluation, **saving("epoch"))
    trainer.train()
    trainer.train()
    assert column(watcher, "epoch") == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]
    assert clock(trainer) == {"steps": 12, "epochs": 4, "boundary": 12}
    assert evaluation.seen == [True] * 4


def test_a_training_that_failed_before_its_first_step_leaves_nothing_behind(tmp_path):
    def fail(**_):
        raise RuntimeError("no data")

    watcher = watching()
    with pytest.raises(RuntimeError, match="no data"):
        train(tmp_path, watcher, Probe("on_step_begin", fail))
    train(tmp_path, watcher)
    assert column(watcher, "epoch") == [0.0, 0.0, 1.0, 2.0]


def test_a_callback_may_be_added_after_the_first_training(tmp_path):
    watcher = watching()
    trainer = train(tmp_path, save_strategy="epoch")
    assert free(trainer.model)
    trainer.add_callback(watcher)
    trainer.train()
    assert column(watcher, "epoch") == [0.0, 1.0, 2.0]
    assert projected(trainer.model)
    assert clock(trainer) == {"steps": 12, "epochs": 2, "boundary": 12}


def test_of_two_callbacks_the_second_does_nothing(tmp_path):
    first, second = watching(), watching(every_n_epochs=2)
    with pytest.warns(UserWarning, match="two callbacks of type WeightWatcherCallback") as caught:
        trainer = train(tmp_path, first, second, save_strategy="epoch")
    assert len([w for w in caught if "two callbacks" in str(w.message)]) == 1
    assert clock(trainer) == {"steps": 6, "epochs": 2, "boundary": 6}
    assert column(first, "epoch") == [0.0, 1.0, 2.0]
    assert second.history == []
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["log_history"].count(rows(trainer)[-1]) == 1
    with pytest.warns(UserWarning, match="two callbacks"):
        again = train(tmp_path, first, second, resume=str(tmp_path / "checkpoint-3"))
    assert clock(again) == {"steps": 6, "epochs": 2, "boundary": 6}


def test_a_loop_that_ends_its_epoch_itself_is_not_projected_twice(tmp_path):
    def end(optimizer, state, **_):
        if state.epoch == int(state.epoch):
            optimizer.optimizer.end_epoch()

    trainer = train(tmp_path, Probe("on_step_end", end), watching(), strength=0.5)
    assert clock(trainer) == {"steps": 6, "epochs": 2, "boundary": 6}


@pytest.mark.skipif(VERSION < (5,), reason="Transformers 4 gives a factory no model")
def test_the_factory_gives_the_trainer_a_wwpgd(tmp_path):
    factory = (WWPGDFactory, {"lr": 1e-2, "weight_decay": 0.1, "wwpgd": {"strength": 1.0}})
    args = make_trainer(tmp_path).args
    watcher, model = watching(), llama(attention_bias=True)
    options = {"train_dataset": data(), "callbacks": [watcher]}
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=factory, **options)
    trainer.train()
    assert projected(model)
    assert clock(trainer) == {"steps": 6, "epochs": 2, "boundary": 6}
    assert watcher.history[-1].keys() >= PROJECTION
    decay, plain = find_wwpgd(trainer.optimizer).param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decay["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}


def test_the_factory_by_itself():
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24, bias=False))
    model[0].requires_grad_(False)
    opt = WWPGDFactory()(model, base=torch.optim.SGD, lr=0.1, momentum=0.9, wwpgd={"strict": True})
    assert isinstance(opt, WWPGD)
    assert isinstance(opt.base, torch.optim.SGD)
    assert opt.strict
    assert opt.model is model
    (group,) = opt.param_groups
    assert group["param_names"] == ["1.weight"]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.0)


def test_a_wwpgd_without_a_model_gets_the_trainer_s(tmp_path):
    model = llama()
    opt = WWPGD(torch.optim.AdamW(model.parameters(), lr=1e-2), strength=1.0)
    train(tmp_path, watching(), strength=None, optimizer=opt, model=model)
    assert opt.model is model
    assert projected(model)
    table = model.model.embed_tokens.weight.detach().clone()
    assert ManifoldProjection().project_(table).distance > 1e-4


# What must not change


@pytest.mark.parametrize("settings", [{}, {"randomize": False}, {"every_n_epochs": 2}])
def test_watching_changes_no_bit_of_the_training(tmp_path, settings):
    options = {"strength": None, "num_train_epochs": 3, "eval_strategy": "epoch"}
    bare = train(tmp_path, **options)
    watched = train(tmp_path, watching(**settings), **options)
    assert same(bare.model, watched.model)
    assert not same(bare.model, llama())
    assert losses(bare) == losses(watched)
    assert vars(bare.control) == vars(watched.control)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 3}, {"bf16": True, "max_grad_norm": 0.1}],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_a_projection_of_strength_zero_trains_like_the_base(tmp_path, settings):
    model = llama()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    bare = train(tmp_path, strength=None, model=model, optimizer=opt, **settings)
    trainer = train(tmp_path, watching(), strength=0.0, **settings)
    assert same(bare.model, trainer.model)
    assert losses(bare) == losses(trainer)
    assert clock(trainer)["epochs"] == 2


def test_a_layer_of_nan_warns_once_and_training_goes_on(tmp_path):
    model, watcher = llama(), watching()
    model.unused = nn.Linear(30, 30)
    with torch.no_grad():
        model.unused.weight[0, 0] = math.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(tmp_path, watcher, model=model, num_train_epochs=3)
    messages = [str(w.message) for w in caught if "unused" in str(w.message)]
    assert len(messages) == 1
    assert "layer unused is not watched: NaN" in messages[0]
    assert column(watcher, "epoch") == [0.0, 1.0, 2.0, 3.0]
    assert clock(trainer)["epochs"] == 3
    model.unused = nn.Identity()
    assert projected(model)


def test_lora_has_nothing_to_project_and_says_why(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model, watcher = peft.get_peft_model(llama(), config), watching()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(tmp_path, watcher, model=model, num_train_epochs=3)
    messages = [str(w.message) for w in caught if "projects no layer" in str(w.message)]
    assert len(messages) == 1
    assert "frozen" in messages[0]
    assert "LoRA" in messages[0]
    assert column(watcher, "epoch") == [0.0, 1.0, 2.0, 3.0]
    assert watcher.history[-1]["ww/num_layers"] > 0
    assert clock(trainer) == {"steps": 9, "epochs": 3, "boundary": 9}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad


# Loggers that are missing or fail


def test_without_a_reporter_one_warning_says_where_the_numbers_are(tmp_path):
    with pytest.warns(UserWarning, match=r"reports to nothing: .*\.history") as caught:
        train(tmp_path, watching())
    assert len([w for w in caught if "reports to nothing" in str(w.message)]) == 1


def test_a_reporter_or_a_logger_of_its_own_is_enough(tmp_path):
    for callbacks in (
        [watching(log_to=tmp_path / "log.csv")],
        [watching(), Probe("on_log", lambda **_: None)],
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(tmp_path, *callbacks)
        assert not [w for w in caught if "reports to nothing" in str(w.message)]
    assert (tmp_path / "log.csv").read_text().count("ww/alpha_mean") == 3


def test_a_reporter_that_fails_warns_once_and_the_others_go_on(tmp_path):
    def full(logs, **_):
        if "ww/alpha_mean" in logs:
            raise OSError(28, "No space left on device")

    watcher, other = watching(), Probe("on_log", lambda logs, **_: logs)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        trainer = train(tmp_path, Probe("on_log", full), watcher, other, num_train_epochs=3)
    assert len([w for w in caught if "No space" in str(w.message)]) == 1
    assert len([logs for logs in other.seen if "ww/alpha_mean" in logs]) == 4
    assert len(rows(trainer)) == 4


# Stopping, steps, summary


def test_a_rule_stops_the_training_after_a_whole_epoch(tmp_path):
    watcher, evaluation = watching(early_stop=alpha_below(2.3)), evaluations()
    options = {"strength": Ramp(3), "num_train_epochs": 8, **saving("epoch")}
    trainer = train(tmp_path, watcher, evaluation, **options)
    means = column(watcher, "ww/alpha_mean")
    assert means[-1] < 2.3 <= min(means[1:-1], default=9.0)
    assert trainer.state.global_step == STEPS * (len(means) - 1) < 8 * STEPS
    assert len(evaluation.seen) == len(means) - 1
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}").exists()


def test_steps_are_measured_too(tmp_path, board):
    settings, folder = board
    watcher = watching(every_n_steps=2)
    trainer = train(tmp_path, watcher, **settings)
    assert column(watcher, "step") == [0.0, 2.0, 3.0, 4.0, 6.0]
    assert column(watcher, "epoch") == [0.0, 0.0, 1.0, 1.0, 2.0]
    assert [event.step for event in events(folder)["ww/alpha_mean"]] == [0, 2, 3, 4, 6]
    assert clock(trainer)["epochs"] == 2


def test_the_last_step_is_measured_while_reporters_listen(tmp_path, board):
    settings, folder = board
    watcher = watching(every_n_epochs=5)
    train(tmp_path, watcher, num_train_epochs=3, **settings)
    assert [event.step for event in events(folder)["ww/alpha_mean"]] == [0, 9]
    assert len(list(folder.rglob("events.out.tfevents.*"))) == 1


def test_the_summary_is_printed_at_the_end(tmp_path, capsys):
    train(tmp_path, watching())
    printed = capsys.readouterr().out
    assert printed.count("the model: mostly critical (8 of 9 layers)") == 1
    assert "% of training time" in printed
    train(tmp_path, watching(summary=False))
    assert "the model" not in capsys.readouterr().out


# Two processes

DDP = """
import pathlib, torch
from tests.test_huggingface import BATCH, data, llama, watching
from transformers import Trainer, TrainingArguments
from ww_train import Ramp, WWPGD
from ww_train.callbacks.early_stopping import alpha_below

torch.set_num_threads(RANK + 1)  # by itself enough to tear replicas apart that project on their own
model = llama()
watcher = watching(early_stop=alpha_below(2.3), log_to=f"{FOLDER}/log.csv")
args = TrainingArguments(
    f"{FOLDER}/out", use_cpu=True, num_train_epochs=8, per_device_train_batch_size=BATCH,
    report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    ddp_backend="gloo",
)
opt = WWPGD(torch.optim.AdamW(model.parameters(), lr=1e-2), model=model, strength=Ramp(3))
trainer = Trainer(
    model, args, train_dataset=data(12), callbacks=[watcher], optimizers=(opt, None)
)
trainer.train()
strip = ("ww/seconds", "ww/overhead")
RESULT = {
    "sums": [float(p.double().sum()) for p in model.parameters()],
    "head": model.lm_head.weight.flatten().tolist(),
    "history": [{k: v for k, v in r.items() if k not in strip} for r in watcher.history],
    "step": trainer.state.global_step,
    "replicas": opt.replicas is not None,
    "world": args.world_size,
}
"""


def test_replicas_stay_equal_and_stop_together(tmp_path):
    zero, one = run_ranks(DDP, tmp_path)
    assert zero == one
    assert zero["world"] == 2
    assert zero["replicas"]
    means = [record["ww/alpha_mean"] for record in zero["history"]]
    assert means[-1] < 2.3
    assert zero["step"] == 3 * (len(means) - 1) < 24
    assert (tmp_path / "log.csv").read_text().count(",ww/alpha_mean,") == len(means)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "ww_train.callbacks.huggingface")
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ww-train\[huggingface\]'"):
        importlib.import_module("ww_train.callbacks.huggingface")


# In the background


@pytest.mark.parametrize("strength", [None, 0.3], ids=["watched", "steered"])
def test_in_the_background_every_record_is_that_of_its_step(tmp_path, board, strength):
    every, beside = watching(every_n_steps=1), watching(background=True)
    settings, folder = board
    bare = train(tmp_path / "a", every, strength=strength)
    trainer = train(tmp_path / "b", beside, strength=strength, **settings)
    assert same(bare.model, trainer.model)
    truth, records = of_layers(every.history), of_layers(beside.history)
    assert {0, 2 * STEPS} <= records.keys()
    for step, record in records.items():
        assert record.items() <= truth[step].items()
    logged = {event.step for event in events(folder)["ww/alpha_mean"]}
    assert logged == {step for step in records if any("alpha" in tag for tag in records[step])}
    assert {row["step"] for row in rows(trainer)} == logged
    assert helpers() == []


def test_a_checkpoint_holds_what_was_being_measured(tmp_path):
    beside = watching(background=True, at_start=False)
    train(tmp_path, beside, strength=None, save_strategy="epoch")
    for epoch in (1, 2):
        state = json.loads(
            (tmp_path / f"checkpoint-{epoch * STEPS}/trainer_state.json").read_text()
        )
        saved = state["stateful_callbacks"]["WeightWatcherCallback"]
        saved = saved[-1] if isinstance(saved, list) else saved
        assert saved["attributes"]["watched"]["history"][-1]["step"] == epoch * STEPS


class Steps(TrainerCallback):
    """Another reporter, which goes by the state of the trainer."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "ww/alpha_mean" in (logs or {}):
            self.seen.append((state.global_step, state.epoch, logs["ww/alpha_mean"]))


def test_every_reporter_gets_the_step_of_the_copies(tmp_path):
    beside, steps = watching(background=True), Steps()
    trainer = train(tmp_path, beside, steps, strength=None, num_train_epochs=4)
    truth = {r["step"]: r["ww/alpha_mean"] for r in beside.history}
    assert steps.seen == [(step, step / STEPS, truth[step]) for step in truth]
    assert [(row["step"], row["epoch"]) for row in rows(trainer)] == [
        (step, step / STEPS) for step in truth
    ]


def chosen_by(folder, metric, beside):
    return train(
        folder,
        beside,
        strength=None,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model=metric,
    )


@pytest.mark.parametrize("metric", ["eval_ww_alpha_mean", "ww_alpha_mean"])
def test_the_best_checkpoint_can_be_chosen_in_the_background_with_a_warning(tmp_path, metric):
    beside = watching(background=True, at_start=False)
    with pytest.warns(UserWarning, match="are of earlier weights") as caught:
        trainer = chosen_by(tmp_path, metric, beside)
    (message,) = [str(w.message) for w in caught if "background" in str(w.message)]
    assert message.startswith(f"metric_for_best_model='{metric}': ")
    assert trainer.state.best_metric is not None


@pytest.mark.parametrize(
    ("background", "metric"), [(False, "eval_ww_alpha_mean"), (True, "eval_loss")]
)
def test_other_choices_are_not_warned_of(tmp_path, background, metric):
    beside = watching(background=background)
    chosen_by(tmp_path, metric, beside)
    assert "decides" not in beside.monitor._warn.given
