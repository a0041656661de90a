"""A CUDA device that is simulated on the CPU: what needs no kernels can be tested everywhere.

Tensors say that they are on `cuda:0`, refuse to meet those of the CPU as CUDA tensors do, fail when
the device's memory is used up, and are computed by the CPU. So the way of the data between the
devices, the waits of the host and the need of memory are those of a GPU; speed and rounding are not.
"""

import ctypes
import gc
import threading
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed.tensor  # before anything is replaced
from torch.utils._pytree import tree_map_only

from ww_train.calibration import cache_file, machine
from ww_train.costs import Costs, Curve
from ww_train.weights import slicing

GPU = torch.device("cuda", 0)
MEMORY = 1 << 50

FACTORIES = [
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
]

WAITS = ("_linalg_eigh", "_linalg_svd", "nonzero", "equal", "masked_select")
"""Operations for whose end the host waits, apart from copies to it."""

MIXED = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take tensors of the CPU and of the device."""


class SimulatedDevice:
    """What happened on the device.

    Attributes:
        memory: Bytes that it has.
        used: Bytes that are allocated.
        peak: Most bytes that were allocated at a time.
        waits: How often the host waited, by operation; "copy" are copies to it.
        lost: Whether every operation fails from now on.
    """

    def __init__(self):
        self.memory, self.used, self.peak = float("inf"), 0, 0
        self.waits = Counter()
        self.lost = False
        self._storages = weakref.WeakSet()
        self._lock = threading.RLock()

    def reset(self, free=float("inf")):
        """Forget what happened; `free` bytes beyond those in use are there from now on."""
        gc.collect()
        self.lost = False
        self.memory, self.peak = self.used + free, self.used
        self.waits.clear()

    @property
    def free(self):
        return int(min(self.memory, MEMORY)) - self.used

    def allocate(self, storage):
        with self._lock:
            if storage in self._storages:
                return
            size = storage.nbytes()
            if self.used + size > self.memory:
                raise torch.OutOfMemoryError(f"simulated: {size} bytes asked for")
            self._storages.add(storage)
            self.used += size
            self.peak = max(self.peak, self.used)
            weakref.finalize(storage, self._free, size)

    def _free(self, size):
        with self._lock:
            self.used -= size


DEVICE = SimulatedDevice()
"""There is one; the fixture `gpu` hands it out with nothing counted."""


class OnDevice(torch.Tensor):
    """A tensor of the simulated device."""

    @staticmethod
    def __new__(cls, elem, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=GPU,
            requires_grad=requires_grad,
        )

    def __init__(self, elem, requires_grad=False):
        DEVICE.allocate(elem.untyped_storage())
        self.elem = elem

    def data_ptr(self):
        return self.elem.data_ptr()

    def untyped_storage(self):
        return self.elem.untyped_storage()

    def record_stream(self, stream):
        assert isinstance(stream, Stream)

    def item(self):
        DEVICE.waits["item"] += 1
        return self.elem.item()

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        DEVICE.waits["copy"] += 1
        return self.elem.tolist()

    def __bool__(self):
        return bool(self.item())

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __format__(self, spec):
        return format(self.elem if self.ndim else self.item(), spec)

    def __repr__(self):
        return f"on the device: {self.elem!r}"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.ldexp:  # in PyTorch 2.6 it makes a tensor of the number 2
                return OnDevice(torch.ldexp(*(factor.elem for factor in args)))
            if function is torch.where:  # PyTorch itself would make a tensor of a number
                args = [a if isinstance(a, torch.Tensor) else _number(a) for a in args]
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, dict(kwargs or {})
        if DEVICE.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        _same_device(name, (args, kwargs))
        if name in WAITS:
            DEVICE.waits[name] += 1
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else GPU
        if target.type == "cuda":
            kwargs.pop("device", None)
        if name == "_to_copy" and target.type == "cpu":
            DEVICE.waits["copy"] += 1
        if name == "copy_" and not isinstance(args[0], OnDevice):
            DEVICE.waits["copy"] += 1
        own = tree_map_only(OnDevice, lambda tensor: tensor.elem, (args, kwargs))
        result = function(*own[0], **own[1])
        if target.type != "cuda":
            return result
        if name.endswith("_") and not name.endswith("__"):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        return tree_map_only(torch.Tensor, OnDevice, result)


def _number(value):
    return OnDevice(torch.scalar_tensor(value, dtype=torch.float64))


def _same_device(name, arguments):
    """What CUDA demands: no tensors of the CPU, except numbers, and as indices."""
    found = []
    tree_map_only(torch.Tensor, found.append, arguments)
    foreign = [t for t in found if t.ndim and t.device.type == "cpu" and type(t) is not OnDevice]
    if foreign and name not in MIXED:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu"
        )


def on_device(tensor):
    """A copy of a tensor on the simulated device; a parameter stays one."""
    copy = OnDevice(tensor.detach().clone())
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy


def move(model):
    """Put a module's parameters and buffers on the simulated device, in place."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({k: on_device(v) for k, v in own.items() if v is not None})
    return model


class Stream:
    """What background work needs of a stream."""

    def __init__(self, device=None):
        self.device = device
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


class Generator(torch.Generator):
    """One of the CPU in place of the device's."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if _cuda(device) else device)


def _cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def _factory(real):
    def make(*args, **kwargs):
        if not _cuda(kwargs.get("device")):
            return real(*args, **kwargs)
        made = real(*args, **{**kwargs, "device": None})
        return OnDevice(made)

    return make


def _to(real):
    def to(tensor, *args, **kwargs):
        places = [*args, kwargs.get("device"), kwargs.get("other")]
        place = next((p for p in places if isinstance(p, (str, torch.device, torch.Tensor))), None)
        device = place.device if isinstance(place, torch.Tensor) else place
        if not _cuda(device):
            return real(tensor, *args, **kwargs)
        dtype = place.dtype if isinstance(place, torch.Tensor) else kwargs.get("dtype")
        dtype = next((a for a in args if isinstance(a, torch.dtype)), dtype) or tensor.dtype
        if isinstance(tensor, OnDevice):
            return real(tensor, dtype, copy=kwargs.get("copy", False))
        return OnDevice(real(tensor, dtype, copy=True))

    return to


def prefer(route):
    """Have the costs that are kept of the device say that this way is the fastest."""
    slow, fast = Curve((64, 4096), (1.0, 1.0)), Curve((64, 4096), (1e-3, 1e-3))
    ways = {way: fast if way == route else slow for way in ("looped", "batched", "host")}
    costs = Costs(
        machine(GPU), **ways, eigh=fast, gram32=fast, gram16=fast, shuffle=fast, copy_rate=1e9
    )
    file = cache_file(costs.machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(costs.to_json())


@contextmanager
def _guard():
    """Give PyTorch's CPU build a device guard for CUDA: that of the meta device, which does nothing."""
    folder = Path(torch.__file__).parent / "lib"
    try:
        library = ctypes.CDLL(str(next(folder.glob("libc10.*"))))
        guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, StopIteration, ValueError):
        pytest.skip("this build of PyTorch hides its device guards")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    before, guards[cuda] = guards[cuda], guards[meta]
    yield
    guards[cuda] = before


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The simulated device as the CUDA device of this machine."""
    if torch.cuda.is_available():
        pytest.skip("there is a real CUDA device")
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, _factory(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "to", _to(torch.Tensor.to))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "simulated")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (DEVICE.free, MEMORY))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: DEVICE.used)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: DEVICE.peak)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(slicing, "_PLAIN", (*slicing._PLAIN, OnDevice))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prefer("batched")
    DEVICE.reset()
    with _guard():
        yield DEVICE
