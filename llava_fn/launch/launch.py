"""Where a run happens: the environment variables, the device, the processes that share it, and the record of it.

The only module of the package that reads environment variables, but for the one switch of kernels/dispatch.py, and the
only one outside kernels/ that imports torch_npu. ASCEND_VARIABLES lists what Ascend's libraries read, with the values
that are legal: the libraries themselves stop at some wrong values, read others as a number up to the first bad
character, and ignore the rest.
Recipes import this module, models never do.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from llava_fn.parallel.collectives import total
from llava_fn.parallel.mesh import Axis, Mesh, check_world, gloo, make_mesh

# What a broken or half-installed torch_npu raises at import or at first use: a missing CANN library, a driver error,
# another torch than it was built for.
NPU_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)
T = TypeVar("T")
BACKENDS = {"npu": "hccl", "cuda": "nccl"}  # the CPU has mesh.gloo
WAIT = timedelta(minutes=10)  # that a collective waits for the other ranks, some of which may still read weights
LONG_WAIT = timedelta(days=7)  # for ranks whose work is not alike; if one dies, torchrun ends the others
PACKAGES = (
    "llava_fn torch torch_npu tensordict torchdata numpy pillow einops safetensors sentencepiece tyro transformers"
).split()


@dataclass(frozen=True)
class Variable:
    """One environment variable. legal: in words, what check(value) accepts; default: what holds when it is unset."""

    name: str
    legal: str
    check: Callable[[str], bool]
    default: str
    meaning: str


def _choice(name: str, values: str, default: str, meaning: str) -> Variable:
    legal = values.split()
    return Variable(name, "one of " + ", ".join(legal), lambda value: value in legal, default, meaning)


def _integer(name: str, low: int, high: int | None, default: str, meaning: str) -> Variable:
    legal = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    return Variable(name, legal, lambda value: _is_integer(value, low, high), default, meaning)


def _is_integer(value: str, low: int, high: int | None = None) -> bool:
    return bool(re.fullmatch("[0-9]{1,18}", value)) and low <= int(value) and (high is None or int(value) <= high)


def _is_fraction(value: str, ends: bool) -> bool:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", value):
        return False
    return 0 <= float(value) <= 1 if ends else 0 < float(value) < 1


def _is_affinity(value: str) -> bool:
    """mode, then any of force:0|1, npu<card>:<first core>-<last core>, npu_affine:0|1, separated by commas."""
    mode, *options = value.split(",")
    ranges = [re.fullmatch("npu[0-9]+:([0-9]+)-([0-9]+)", option) for option in options]
    return bool(re.fullmatch("(mode:)?[012]", mode)) and all(
        int(found[1]) <= int(found[2]) if found else bool(re.fullmatch("(force|npu_affine):[01]", option))
        for option, found in zip(options, ranges, strict=True)
    )


_DIVISION = "([0-9]+|>):[0-9]+"  # MB:divisions; > stands for the sizes above
# key of PYTORCH_NPU_ALLOC_CONF -> what its value must be
ALLOCATOR_KEYS: dict[str, Callable[[str], bool]] = {
    "expandable_segments": lambda value: value in ("True", "False"),
    "max_split_size_mb": lambda value: _is_integer(value, 21),
    "garbage_collection_threshold": lambda value: _is_fraction(value, ends=False),
    "base_addr_aligned_kb": lambda value: _is_integer(value, 0, 16),
    "page_size": lambda value: value == "1g",
    "segment_size_mb": lambda value: _is_integer(value, 20, 512),
    "large_segment_size_mb": lambda value: _is_integer(value, 11),
    "roundup_power2_divisions": lambda value: bool(re.fullmatch(f"[0-9]+|\\[{_DIVISION}(,{_DIVISION})*\\]", value)),
    "per_process_memory_fraction": lambda value: _is_fraction(value, ends=True),
    "multi_stream_lazy_reclaim": lambda value: value in ("True", "False"),
    "throw_on_npumalloc_oom": lambda value: value in ("True", "False"),
    "pinned_use_background_threads": lambda value: value in ("True", "False"),
    "pin_memory_expandable_segments": lambda value: value in ("True", "False"),
    "pinned_mem_register": lambda value: value in ("True", "False"),
    "pinned_max_round_threshold_mb": lambda value: _is_integer(value, 1),
    "pinned_max_cached_size_mb": lambda value: _is_integer(value, 1),
}


def _allocator_settings(value: str) -> list[tuple[str, str]]:
    """(key, value) of each setting. Commas inside [...] do not separate; blanks do not count, as in torch_npu."""
    parts = re.split(r",(?![^\[]*\])", value.replace(" ", ""))
    return [(key, setting) for key, _, setting in (part.partition(":") for part in parts)]


def _is_allocator(value: str) -> bool:
    """Known keys, each with a legal value; and expandable segments exclude a split limit and garbage collection."""
    settings = _allocator_settings(value)
    if not all(key in ALLOCATOR_KEYS and ALLOCATOR_KEYS[key](setting) for key, setting in settings):
        return False
    excluded = {"max_split_size_mb", "garbage_collection_threshold"}
    return ("expandable_segments", "True") not in settings or excluded.isdisjoint(key for key, _ in settings)


ASCEND_VARIABLES: tuple[Variable, ...] = (
    Variable(
        "ASCEND_RT_VISIBLE_DEVICES", "card numbers and commas without blanks, like 0,1",
        lambda value: bool(re.fullmatch("[0-9]+(,[0-9]+)*", value)), "all cards", "NPUs that this process may see",
    ),
    _choice("ASCEND_SLOG_PRINT_TO_STDOUT", "0 1", "0", "1 prints the log of CANN on the screen"),
    _choice("ASCEND_GLOBAL_LOG_LEVEL", "0 1 2 3 4", "3", "0 debug, 1 info, 2 warning, 3 error, 4 nothing"),
    _choice("ASCEND_LAUNCH_BLOCKING", "0 1", "0", "1 runs every operator synchronously, to find the one that fails"),
    _choice("TASK_QUEUE_ENABLE", "0 1 2", "1", "operator queue; 2 also moves preparation off the main thread"),
    _choice("COMBINED_ENABLE", "0 1", "0", "1 fuses chains of views into one copy"),
    Variable(
        "CPU_AFFINITY_CONF", "mode 0, 1 or 2[,force:0|1][,npu<card>:<first core>-<last core>]...[,npu_affine:0|1]",
        _is_affinity, "0", "CPU binding: 0 none, 1 a range of cores for each card, 2 also a core for each busy thread",
    ),
    Variable(
        "PYTORCH_NPU_ALLOC_CONF",
        "key:value,... with keys " + ", ".join(ALLOCATOR_KEYS) + "; max_split_size_mb over 20; "
        "garbage_collection_threshold between 0 and 1; neither of them together with expandable_segments:True",
        _is_allocator, "expandable_segments:False", "memory allocator; expandable_segments:True fragments less",
    ),
    _choice("MULTI_STREAM_MEMORY_REUSE", "0 1 2 3", "1", "how memory of one stream is reused by another"),
    _integer("ACLNN_CACHE_LIMIT", 1, 10_000_000, "10000", "entries of the operator cache on the host"),
    _choice("INF_NAN_MODE_ENABLE", "0 1", "1", "0 turns Inf and NaN into the largest number, which hides divergence"),
    _choice("TORCH_NPU_FALLBACK_CPU_DISABLE", "0 1", "0", "1 makes an operator without an NPU kernel an error"),
    _integer("HCCL_CONNECT_TIMEOUT", 120, 7200, "120", "seconds to wait for the other ranks to connect"),
    _integer("HCCL_EXEC_TIMEOUT", 68, 17_340, "1800", "seconds that a collective waits for the other ranks"),
    _integer("HCCL_EVENT_TIMEOUT", 0, 2_147_483_647, "1868", "seconds to wait for an event; 0 waits for ever"),
    _integer("HCCL_BUFFSIZE", 1, None, "200", "MB of one buffer; every communicator takes two"),
    _integer("P2P_HCCL_BUFFSIZE", 0, None, "20", "the same for send and receive; 0: no communicator of their own"),
    _choice("TORCH_HCCL_ASYNC_ERROR_HANDLING", "0 1 2 3", "1", "what the watchdog does with a failed collective"),
    _choice("TORCH_HCCL_BLOCKING_WAIT", "0 1", "0", "1 lets wait() block the host"),
    _integer("NPUS_PER_NODE", 1, None, "", "cards on a machine; read by launch scripts only, by no library"),
)  # fmt: skip


def check_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """environ: like os.environ -> those of ASCEND_VARIABLES that are set in it, unchanged.

    Raises one ValueError that lists every illegal value and every pair that excludes each other, and what to do.
    Nothing is set or corrected. Values are held to what is documented: the libraries read "08x" as 8, and so a typing
    error as a setting. Source: MindSpeed-MM args_readme.md; torch_npu OptionsManager.cpp and its documentation.
    """
    found = {row.name: environ[row.name] for row in ASCEND_VARIABLES if row.name in environ}
    problems = [
        f"{row.name}={found[row.name]!r} ({row.meaning}): must be {row.legal}; correct it, or unset it"
        + (f" for the default, {row.default}" if row.default else "")
        for row in ASCEND_VARIABLES
        if row.name in found and not row.check(found[row.name])
    ]
    problems += _conflicts(environ)
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} wrong setting(s) of environment variables:", *problems]))
    return found


def _conflicts(environ: Mapping[str, str]) -> list[str]:
    problems = []
    execution, event = environ.get("HCCL_EXEC_TIMEOUT", ""), environ.get("HCCL_EVENT_TIMEOUT", "")
    if _is_integer(execution, 0) and _is_integer(event, 1) and int(event) <= int(execution):  # an event of 0 never ends
        problems.append(
            f"HCCL_EVENT_TIMEOUT={event} must be greater than HCCL_EXEC_TIMEOUT={execution}, or the wait ends before "
            f"the collective does; set HCCL_EVENT_TIMEOUT={int(execution) + 68}"
        )
    if "PYTORCH_NPU_ALLOC_CONF" in environ and "PYTORCH_ALLOC_CONF" in environ:
        problems.append("PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF: torch_npu exits if both are set; unset one")
    queue = environ.get("TASK_QUEUE_ENABLE")
    if environ.get("ASCEND_LAUNCH_BLOCKING") == "1" and queue in ("1", "2"):
        problems.append(
            f"TASK_QUEUE_ENABLE={queue} has no effect with ASCEND_LAUNCH_BLOCKING=1, which forces it to 0; "
            "unset ASCEND_LAUNCH_BLOCKING, or unset TASK_QUEUE_ENABLE while you debug"
        )
    return problems


@dataclass(frozen=True)
class Joined:
    """This process among those that torchrun started. store: None for a process alone."""

    mesh: Mesh = Mesh()
    store: dist.Store | None = None
    attempt: str = ""  # a word that all processes of this start share, and those of no other start

    @property
    def first(self) -> bool:
        """Whether it is the one that writes what stands once in a run, and shows it."""
        return self.mesh.all.rank == 0

    def in_turn(self, make: Callable[[], T], device: torch.device) -> T:
        """make() by the first process, and then by the others, which may count on what it left on the disk."""
        made = make() if self.first else None
        total(torch.zeros(1, device=device), self.mesh.all)
        return made if self.first else make()


def rank_of_several() -> str:
    """" (rank 3)" for one of several processes, for messages; nothing for one alone."""
    return f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""


def check_processes(tp: int, environ: Mapping[str, str], alone: bool = False) -> int:
    """How many processes there are. alone: whether exactly `tp` are wanted, not a multiple.

    ValueError before any collective, and so on every process, if tp does not divide them, if it reaches across
    machines, and if torchrun may start them again in a way in which they cannot find each other.
    """
    wrong = [name for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if not _is_integer(environ.get(name, "1"), 1)]
    if wrong:
        raise ValueError(f"{wrong[0]}={environ[wrong[0]]!r} is no number of processes; torchrun sets it, or nobody")
    world, local = (int(environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if alone and world != tp:
        several = f"torchrun --nproc-per-node {tp} RECIPE ... --tp {tp}"
        how = several if tp > 1 else f"without torchrun, or with --tp {world}"
        raise ValueError(f"tp={tp} but WORLD_SIZE={world}: one process for each part of the model; start it {how}")
    check_world(world, tp, local if "LOCAL_WORLD_SIZE" in environ else world)
    lost = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if world > 1 and lost:
        raise ValueError(f"WORLD_SIZE={world} but {', '.join(lost)} is not set; torchrun sets them, start it with that")
    restarts = environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise ValueError(
            f"torchrun --max-restarts {restarts}: processes that it starts again would look for each other at the old "
            "addresses; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, with --rdzv-backend c10d"
        )
    return world


@contextlib.contextmanager
def processes(tp: int, device: torch.device, logs: Path | None = None, alone: bool = False) -> Iterator[Joined]:
    """The processes that torchrun started as a mesh of dp x `tp`, each with a device of its own; or one without it.

    device: as `pick_device` gives it; afterwards it means this process's card. What processes above 0 print goes to
    logs/rank-00001.log, or nowhere if there is no such folder, except an error that ends them. alone and ValueError: as
    of `check_processes`; also where a machine has fewer cards than processes. After an error the group is not ended:
    another rank may wait in a collective, and it is the launcher that ends it.
    """
    if check_processes(tp, os.environ, alone) == 1:
        yield Joined()
        return
    with _joined(device, BACKENDS.get(device.type) or gloo(), WAIT, logs) as store:
        mesh = make_mesh(tp)
        for axis in (mesh.dp, mesh.tp, mesh.all):  # connect now, and not all at once in the middle of a step
            total(torch.zeros(1, device=device), axis)
        attempt = "-".join(os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
        yield Joined(mesh, store, attempt)


@contextlib.contextmanager
def replicas(device: torch.device) -> Iterator[Axis]:
    """The processes that torchrun started, on any number of machines, each with a model and a device of its own.

    One process without it. They meet where `meet` is called and nowhere else, so the group is of the hosts' and its
    wait is long. Ranks above 0 print nothing, except an error that ends them. ValueError as of `processes`.
    """
    if check_processes(1, os.environ) == 1:
        yield Axis("dp")
        return
    with _joined(device, gloo(), LONG_WAIT, None):
        yield Axis("dp", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


@contextlib.contextmanager
def _joined(device: torch.device, backend: str, wait: timedelta, logs: Path | None) -> Iterator[dist.Store]:
    """This process in the group of all, with its card, and silent above rank 0. Gives a store that all share."""
    if device.type != "cpu":
        _take_card(device, int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(dist.rendezvous("env://", timeout=WAIT))
    own = dist.PrefixStore("llava_fn", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    with contextlib.ExitStack() as stack:
        if rank:
            out = stack.enter_context(open(_log(logs, rank), "a", buffering=1))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(out))
        yield own
    dist.destroy_process_group()


def _log(logs: Path | None, rank: int) -> Path:
    if logs is None:
        return Path(os.devnull)
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"rank-{rank:05d}.log"


def meet(axis: Axis) -> None:
    """Wait until every rank is here."""
    if axis.size > 1:
        dist.barrier(axis.group)


def _take_card(device: torch.device, local: int) -> None:
    cards = torch.get_device_module(device).device_count()
    if local >= cards:
        raise ValueError(f"process {local} of this machine finds {cards} {device.type} card(s); start one for each")
    torch.get_device_module(device).set_device(local)


def pick_device(name: str = "auto") -> torch.device:
    """The device named; for "auto" the NPU if torch_npu is installed, else CUDA if there is a card, else the CPU.

    name: auto, npu, cuda or cpu. Always the first visible card; ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES
    chooses among several. Raises ValueError for another name, and for a named device that is not there. An installed
    torch_npu that does not work raises for "auto" too: a run meant for an NPU must not crawl along on the CPU.

    torch itself imports an installed torch_npu. Where that is broken, `import torch` fails before this function runs,
    unless TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set.
    """
    if name not in ("auto", "npu", "cuda", "cpu"):
        raise ValueError(
            f"device {name!r}: must be auto, npu, cuda or cpu; "
            "ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES chooses among several cards"
        )
    if name == "npu" or (name == "auto" and importlib.util.find_spec("torch_npu")):
        _require_npu()
        return torch.device("npu")
    if name == "cuda" and not torch.cuda.is_available():
        reason = "sees no card" if torch.version.cuda else "is built without CUDA"
        raise ValueError(f"device 'cuda': torch {torch.__version__} {reason}; repair that, or use device='cpu'")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def _require_npu() -> None:
    """Import torch_npu, which adds torch.npu, and make sure that a card is visible; ValueError says what is missing."""
    if importlib.util.find_spec("torch_npu") is None:
        raise ValueError(
            f"device 'npu': torch_npu is not installed; install the version that belongs to torch {torch.__version__}, "
            "or use device='cpu'"
        )
    try:
        importlib.import_module("torch_npu")
        available = torch.npu.is_available()
    except NPU_ERRORS as error:
        raise ValueError(
            f"torch_npu is installed but does not work ({type(error).__name__}: {error}); run `source set_env.sh` of "
            f"the CANN toolkit in this shell, see that torch_npu belongs to torch {torch.__version__}, "
            "or go on without an NPU with device='cpu'"
        ) from error
    if not available:
        raise ValueError(
            "torch_npu is installed but sees no NPU; see what `npu-smi info` says and what ASCEND_RT_VISIBLE_DEVICES "
            "leaves visible, or go on without an NPU with device='cpu'"
        )


def environment(device: torch.device) -> dict:
    """What a run ran on, ready for JSON.

    packages: version of each, None if it is not installed; device: type, and the name of the card; cpu_count: cores of
    the machine; threads: those that torch uses in one operator; ascend: check_environment of this process, which
    raises ValueError for an illegal value.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": {"type": device.type, "name": _device_name(device)},
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ascend": check_environment(os.environ),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.processor() or platform.machine()
    return torch.get_device_module(device).get_device_name(device)
