"""The environment variables of Ascend's libraries: ASCEND_VARIABLES lists them with their legal values.

The libraries stop at some illegal values, parse others up to the first bad character, and ignore the rest. Here every
illegal value is an error before anything starts. What they only warn of, or overrule, is a warning here too.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

HCCL_MARGIN = 68  # seconds that what waits for a collective waits longer, as the default of HCCL_EVENT_TIMEOUT does
HCCL_SECONDS = 1836  # default of HCCL_EXEC_TIMEOUT on Atlas A2, A3 and Ascend 950
AFFINITY_SWITCHES = ("force", "npu_affine", "lazy_bind", "bind_irq")  # of CPU_AFFINITY_CONF; each is 0 or 1


@dataclass(frozen=True)
class Variable:
    """One environment variable. legal: the values that check(value) accepts, in words; default: the value if unset."""

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
    return Variable(name, legal, lambda value: is_integer(value, low, high), default, meaning)


def is_integer(value: str, low: int, high: int | None = None) -> bool:
    """Whether the text is a whole number from `low` to `high`, without a sign."""
    return bool(re.fullmatch("[0-9]{1,18}", value)) and low <= int(value) and (high is None or int(value) <= high)


def _is_fraction(value: str, ends: bool) -> bool:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", value):
        return False
    return 0 <= float(value) <= 1 if ends else 0 < float(value) < 1


def _is_seconds(value: str) -> bool:
    """From 0 to 2147483647, in steps of 0.01."""
    return bool(re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,2})?", value)) and float(value) <= 2_147_483_647


def _is_affinity(value: str) -> bool:
    """mode, then any of npu<card>:<core>[-<last core>] and of the switches, separated by commas."""
    mode, *options = value.split(",")
    switch = f"({'|'.join(AFFINITY_SWITCHES)}):[01]"
    ranges = [re.fullmatch("npu[0-9]{1,2}:([0-9]+)(?:-([0-9]+))?", option) for option in options]
    return bool(re.fullmatch("(mode:)?[012]", mode)) and all(
        int(found[1]) <= int(found[2] or found[1]) if found else bool(re.fullmatch(switch, option))
        for option, found in zip(options, ranges, strict=True)
    )


_DIVISION = "([0-9]+|>):[0-9]+"  # MB:divisions; > stands for the sizes above
# key of PYTORCH_NPU_ALLOC_CONF -> what its value must be
ALLOCATOR_KEYS: dict[str, Callable[[str], bool]] = {
    "expandable_segments": lambda value: value in ("True", "False"),
    "max_split_size_mb": lambda value: is_integer(value, 21),
    "garbage_collection_threshold": lambda value: _is_fraction(value, ends=False),
    "base_addr_aligned_kb": lambda value: is_integer(value, 0, 16),
    "page_size": lambda value: value == "1g",
    "segment_size_mb": lambda value: is_integer(value, 20, 512),
    "large_segment_size_mb": lambda value: is_integer(value, 11),
    "roundup_power2_divisions": lambda value: bool(re.fullmatch(f"[0-9]+|\\[{_DIVISION}(,{_DIVISION})*\\]", value)),
    "per_process_memory_fraction": lambda value: _is_fraction(value, ends=True),
    "multi_stream_lazy_reclaim": lambda value: value in ("True", "False"),
    "throw_on_npumalloc_oom": lambda value: value in ("True", "False"),
    "pinned_use_background_threads": lambda value: value in ("True", "False"),
    "pin_memory_expandable_segments": lambda value: value in ("True", "False"),
    "pinned_mem_register": lambda value: value in ("True", "False"),
    "pinned_max_round_threshold_mb": lambda value: is_integer(value, 1),
    "pinned_max_cached_size_mb": lambda value: is_integer(value, 1),
    "max_non_split_rounding_mb": lambda value: is_integer(value, 1),
    "release_lock_on_npumalloc": lambda value: value in ("True", "False"),
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
        "CPU_AFFINITY_CONF",
        "mode 0, 1 or 2, then any of ,npu<card>:<core>[-<last core>] and of "
        + ", ".join(f",{name}:0|1" for name in AFFINITY_SWITCHES),
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
    Variable(
        "HCCL_EXEC_TIMEOUT", "seconds from 0, which waits for ever, to 2147483647, with at most two decimals",
        _is_seconds, str(HCCL_SECONDS), "seconds that a collective waits for the other ranks",
    ),
    _integer("HCCL_EVENT_TIMEOUT", 0, 2_147_483_647, "1868", "seconds to wait for an event; 0 waits for ever"),
    _integer("HCCL_BUFFSIZE", 1, None, "200", "MB of one buffer; every communicator takes two"),
    _integer("P2P_HCCL_BUFFSIZE", 0, None, "20", "the same for send and receive; 0: no communicator of their own"),
    _choice("TORCH_HCCL_ASYNC_ERROR_HANDLING", "0 1 2 3", "1", "what the watchdog does with a failed collective"),
    _choice("TORCH_HCCL_BLOCKING_WAIT", "0 1", "0", "1 lets wait() block the host"),
    _integer("NPUS_PER_NODE", 1, None, "", "cards on a machine; read by launch scripts only, by no library"),
)  # fmt: skip


def check_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The ASCEND_VARIABLES that are set in `environ`, a mapping like os.environ, with their values.

    ValueError lists every illegal value and every pair of settings that exclude each other, and says what to do.
    Nothing is set or corrected. Legal is what is documented for Atlas A2, A3 and Ascend 950 or parsed by torch_npu. The
    libraries would read the typing error "08x" as 8.
    Source: https://github.com/Ascend/pytorch/tree/master/docs/zh/api/environment_variable and, for variables of CANN,
    https://www.hiascend.com/document/detail/zh/canncommercial/900/maintenref/envvar/envref_07_0078.html and its like.
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
    if "PYTORCH_NPU_ALLOC_CONF" in environ and "PYTORCH_ALLOC_CONF" in environ:
        return ["PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF: torch_npu exits if both are set; unset one"]
    return []


def doubtful(environ: Mapping[str, str]) -> list[str]:
    """A warning for each combination of legal values that torch_npu overrules or warns of, or that nobody reads."""
    found = []
    wait, event = hccl_seconds(environ), environ.get("HCCL_EVENT_TIMEOUT", "0")
    if int(event) and (wait == 0 or int(event) <= wait):  # an event of 0 never ends
        longest = f"HCCL_EVENT_TIMEOUT={int(wait) + HCCL_MARGIN}" if wait else "HCCL_EVENT_TIMEOUT=0"
        found.append(
            f"HCCL_EVENT_TIMEOUT={event} is not greater than HCCL_EXEC_TIMEOUT={wait:g}{'' if wait else ' (for ever)'}"
            f": the wait for a collective may end before the collective does; set {longest}"
        )
    queue = environ.get("TASK_QUEUE_ENABLE")
    if environ.get("ASCEND_LAUNCH_BLOCKING") == "1" and queue in ("1", "2"):
        found.append(
            f"TASK_QUEUE_ENABLE={queue} has no effect with ASCEND_LAUNCH_BLOCKING=1, which forces it to 0; "
            "unset ASCEND_LAUNCH_BLOCKING when you have found the operator that fails"
        )
    cards, local = environ.get("NPUS_PER_NODE"), environ.get("LOCAL_WORLD_SIZE", "1")
    if cards is not None and cards != local:
        found.append(
            f"NPUS_PER_NODE={cards}, but {local} process(es) run on this machine: nothing here reads NPUS_PER_NODE; "
            f"for one process a card start the recipe with `torchrun --nproc-per-node {cards} RECIPE ...`"
        )
    return found


def hccl_buffer(environ: Mapping[str, str] = os.environ) -> int:
    """HCCL_BUFFSIZE: MB of each of the two buffers of a communicator."""
    return int(environ.get("HCCL_BUFFSIZE", "200"))


def hccl_seconds(environ: Mapping[str, str]) -> float:
    """The time limit of a collective on NPUs, HCCL_EXEC_TIMEOUT in seconds; 0: none."""
    return float(environ.get("HCCL_EXEC_TIMEOUT", HCCL_SECONDS))
