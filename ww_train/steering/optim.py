"""`WWPGD`: wrap any optimizer and project its weights at epoch boundaries."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ww_train.ranks import on_device, together
from ww_train.steering.boundary import Need, needed, project_boundary_
from ww_train.steering.clock import Clock, check_clock
from ww_train.steering.manifold_projection import ManifoldProjection
from ww_train.steering.momentum import FIRST_MOMENTS, Momentum, keep
from ww_train.steering.projection import Projected, SpectralProjection
from ww_train.steering.schedules import Ramp, Strength, check_strength
from ww_train.steering.targets import Choice, chosen, projection_targets, refuse_flattened
from ww_train.steering.tasks import Failed, Outcome, Projections, Task, assign
from ww_train.weights.matrices import Skipped, reasons
from ww_train.weights.weight_matrix import sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LONG_EPOCH = 10_000
"""Steps after which a loop that has not ended an epoch has more likely forgotten to."""

NO_EPOCH = (
    f"WWPGD has taken {LONG_EPOCH:,} steps and projected nothing, because no epoch was ended: call "
    "optimizer.end_epoch() after each, give the optimizer to the monitor "
    "(SpectralMonitor(model, optimizer)), or, for epochs as long as that, every_n_steps="
)


class WWPGD(Optimizer):
    """An optimizer that behaves like the one it wraps, and projects the weights each epoch.

    Between projections every step, state and hook is the base optimizer's, bit for bit. Give the
    wrapper, not the base, to schedulers, scalers and trainers.

        opt = WWPGD(AdamW(model.parameters()), model=model)
        for epoch in range(epochs):
            for batch in loader:
                ...
                opt.step()
            opt.end_epoch()  # a callback of ww_train does this for you

    Args:
        base: Any `torch.optim.Optimizer` with its parameters.
        model: The model that owns the parameters. Tells embeddings, tied heads and convolutions from
            linear layers; without it every 2-D parameter that is not named like an embedding counts.
        strength: How far each projection goes: a number in 0..1, or a callable of the index of the
            boundary (the first is 0). By default `Ramp(6)`: linearly to 1 over six epochs.
        projection: What to do to a layer; `ManifoldProjection(alpha=2.0)` by default. Or a dict from
            patterns of layer names to projections, of which the first that matches is used.
        include: Only these layers: names, globs, regular expressions or positions as in `measure`,
            or a predicate on the `WeightMatrix`.
        exclude: Not these layers.
        when: Only layers that need it: a predicate on the layer's `LayerReport`, traps included, such
            as `lambda layer: layer.alpha < 2 or layer.num_traps`. It costs another measurement.
        every_n_epochs: Project at every n-th boundary only.
        every_n_steps: Project after every so many executed steps instead of at the ends of epochs.
        steps_per_epoch: If given, `end_epoch` is called after every so many executed steps.
        momentum: What becomes of the base optimizer's momentum: `keep`, `project` or `reset` of
            `ww_train.steering.momentum`.
        replicas: The process group over which the model is replicated (DistributedDataParallel,
            ZeroRedundancyOptimizer): each layer is projected by one rank and sent to the others.
            ww_train's callbacks set it.
        strict: Raise if a projection fails, instead of warning once a layer and going on.

    Raises:
        TypeError: If `base` is not an Optimizer.
        ValueError: If `base` has no parameters, a constant strength is outside 0..1, a pattern
            matches no layer of `model`, or options contradict.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        model: nn.Module | None = None,
        strength: Strength | None = None,
        projection: Projections | None = None,
        include: Choice = None,
        exclude: Choice = None,
        when: Need | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        steps_per_epoch: int | None = None,
        momentum: Momentum = keep,
        replicas: ProcessGroup | None = None,
        strict: bool = False,
    ) -> None:
        # no super().__init__: it would make a second, soon stale, copy of groups and state
        if not isinstance(base, Optimizer):
            raise TypeError(
                f"WWPGD wraps a torch.optim.Optimizer, got {type(base).__name__}; "
                "for example WWPGD(torch.optim.AdamW(model.parameters()), model=model)"
            )
        if isinstance(base, WWPGD):
            raise TypeError("the optimizer is already a WWPGD; wrap its .base instead")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not any(group["params"] for group in base.param_groups):
            raise ValueError("the optimizer has no parameters")
        if not callable(momentum):
            raise TypeError(
                f"momentum is a function of ww_train.steering.momentum, got {momentum!r}"
            )
        check_clock(every_n_epochs, every_n_steps, steps_per_epoch)
        self.base = base
        self.model = model
        self.strength: Strength = Ramp() if strength is None else strength
        if not callable(self.strength):
            check_strength(self.strength)
        self.projection: Projections = ManifoldProjection() if projection is None else projection
        self.include = include
        self.exclude = exclude
        self.when = when
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.steps_per_epoch = steps_per_epoch
        self.momentum = momentum
        self.replicas = replicas
        self.strict = strict
        self._clock = Clock()
        self._make_hooks()
        if model is not None:
            self.targets()  # a pattern that matches nothing is found now, not after an epoch

    @property
    def projected(self) -> tuple[Outcome, ...]:
        """What was done to each layer at the last boundary at which a projection was due."""
        return self._clock.projected

    def _make_hooks(self) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()

    def _mirror(self) -> None:
        """Write the clock into the parameter groups, the only place that all checkpoints keep.

        Only when a checkpoint is made or loaded: numbers that change in each step would make
        torch.compile compile it anew.
        """
        for group in self.base.param_groups:
            group.update({f"ww_pgd_{name}": n for name, n in self._clock.numbers().items()})

    # What torch keeps in attributes lives in the base, also after it rebinds them on a load.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    # With False, GradScaler unscales and skips by itself: a skipped step is then never counted, and
    # Lightning allows gradient clipping with fused optimizers.
    _step_supports_amp_scaling = False

    def __getattr__(self, name: str) -> Any:
        # only what is not found otherwise: train(), eval(), consolidate_state_dict() of some bases
        if name.startswith("__") or "base" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def __repr__(self) -> str:
        return f"WWPGD({self.base!r}, projection={self.projection!r}, strength={self.strength!r})"

    def __getstate__(self) -> dict[str, Any]:
        hooks = {name for name in self.__dict__ if name.startswith("_optimizer_")}
        # a scheduler hides the class's step behind an instance attribute of its own
        return {k: v for k, v in self.__dict__.items() if k not in hooks and k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_hooks()

    def __deepcopy__(self, memo: dict[int, Any]) -> WWPGD:
        memo[id(self.replicas)] = self.replicas  # a process group cannot be copied, but shared
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, and the projection if one is due by the number of steps."""
        probe = self._is_probe(closure)
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)  # as torch does
        kwargs: dict[str, Any] = {}
        for pre_hook in self._optimizer_step_pre_hooks.values():
            changed = pre_hook(self, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        result = self.base.step(*args[1:], **kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        if probe:
            self._mirror()
        else:
            self._clock.steps += 1
            due = self.every_n_steps or self.steps_per_epoch
            if due and self._clock.steps % due == 0:
                self._boundary()
            elif not due and self._clock.steps == LONG_EPOCH and not self._clock.epochs:
                self._warn_once("epoch", NO_EPOCH)
        return result

    # torch would wrap the step in its profiler range and global hooks, which base.step has already
    step.hooked = True  # type: ignore[attr-defined]

    def _is_probe(self, closure: object) -> bool:
        """Whether this is the empty step by which distributed checkpoints create the state."""
        if closure is not None or self.base.state:
            return False
        if any(float(group.get("lr", 1.0)) != 0.0 for group in self.param_groups):
            return False
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return all(p.grad is not None and not p.grad.any() for p in trained)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with the clock as plain integers.

        The clock stands under the key `ww_pgd` and once more in every group, because distributed
        checkpoints keep only `state` and `param_groups`. The bare optimizer loads it as it is.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._mirror()
        state = {**self.base.state_dict(), "ww_pgd": self._clock.numbers()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the bare base optimizer (the clock then restarts)."""
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = state if changed is None else changed
        numbers = state.pop("ww_pgd", None) or {
            key.removeprefix("ww_pgd_"): value
            for group in state["param_groups"]
            for key, value in group.items()
            if key.startswith("ww_pgd_")
        }
        self.base.load_state_dict(state)
        for name, fresh in Clock().numbers().items():
            setattr(self._clock, name, int(numbers.get(name, fresh)))
        self._clock.projected = ()
        self._mirror()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def targets(self) -> list[Task | Skipped]:
        """What would be projected now and how, and why the other matrices would not be.

        Raises:
            ValueError: If a pattern matches no layer.
        """
        found = projection_targets(self.param_groups, self.model)
        return assign(chosen(found, self.include, self.exclude), self.projection)

    def end_epoch(self) -> tuple[Outcome, ...]:
        """Project every target layer, once an epoch.

        A second call without a step in between does nothing, so that a trainer's callback, a loop
        and `steps_per_epoch` may all call it. With `every_n_steps` it projects nothing by itself.

        Returns:
            What was done to each layer, or why it was skipped; empty if nothing was due.

        Raises:
            RuntimeError: If the parameters are flattened or taken over by a framework (FSDP1,
                DeepSpeed); says what to do.

        Cost: see the projection.
        """
        if self.every_n_steps is None:
            return self._boundary()
        return self.projected if self._clock.boundary == self._clock.steps else ()

    @torch.no_grad()
    def _boundary(self) -> tuple[Outcome, ...]:
        clock = self._clock
        if clock.boundary == clock.steps:
            return ()
        due = (clock.epochs + 1) % self.every_n_epochs == 0
        if due:
            refuse_flattened(self.param_groups)
        clock.boundary = clock.steps
        index = clock.epochs
        clock.epochs += 1
        if not due:
            return ()
        clock.projected = ()
        try:
            with _at_trained_point(self.base), on_device(self._devices()):
                targets, strength = together(lambda: self._plan(index), self.replicas)
                clock.projected = self._project(targets, strength)
        except Exception as error:
            if self.strict:
                raise
            self._warn_once("boundary", f"no projection at boundary {index}: {error}")
            return ()
        return clock.projected

    def _devices(self) -> Iterator[torch.device]:
        return (p.device for group in self.param_groups for p in group["params"])

    def _plan(self, index: int) -> tuple[list[Task | Skipped], float]:
        strength = self.strength(index) if callable(self.strength) else self.strength
        check_strength(strength)
        return self.targets(), strength

    def _project(self, targets: list[Task | Skipped], strength: float) -> tuple[Outcome, ...]:
        if self.when is not None:
            targets = needed(targets, self.when, self.replicas)
        tasks = [target for target in targets if isinstance(target, Task)]
        done = iter(
            project_boundary_(
                tasks,
                strength,
                momentum=self.momentum,
                state=self.base.state,
                replicas=self.replicas,
            )
        )
        results = tuple(next(done) if isinstance(t, Task) else t for t in targets)
        self._warn_of_momentum(tasks)
        for failed in results:
            if isinstance(failed, Failed):
                if self.strict:
                    raise failed.error
                self._warn_once(
                    failed.name, f"layer {failed.name} is left as it is, {failed.reason}"
                )
        if self.when is None and not any(isinstance(result, Projected) for result in results):
            why = reasons([result for result in results if isinstance(result, Skipped)])
            self._warn_once("none", f"WWPGD projects no layer ({why})")
        return results

    def _warn_of_momentum(self, tasks: Sequence[Task]) -> None:
        if self.momentum is keep or not self._clock.steps or not tasks:
            return
        kept = {name for state in self.base.state.values() for name in state}
        spectral = [t for t in tasks if isinstance(t.projection, SpectralProjection)]
        if not spectral or kept.isdisjoint(FIRST_MOMENTS) or all(sharded(t.matrix) for t in tasks):
            self._warn_once(
                "momentum",
                f"momentum= changes nothing: the optimizer keeps none under "
                f"{' or '.join(FIRST_MOMENTS)}, the projection is no SpectralProjection, or the "
                "weights are sharded",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._clock.warned:
            self._clock.warned.add(key)
            warnings.warn(message, stacklevel=3)


@contextmanager
def _at_trained_point(base: Optimizer) -> Iterator[None]:
    """Schedule-free optimizers train at an interpolated point: project the weights in use instead."""
    groups = base.param_groups
    switched = bool(groups[0].get("train_mode")) and hasattr(base, "eval")
    if switched:
        base.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if switched:
            base.train()  # type: ignore[attr-defined]
