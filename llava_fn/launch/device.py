"""The device of this process, and the record of what a run ran on.

The only module outside kernels/ that imports torch_npu.
"""

import importlib
import importlib.util
import os
import platform
import sys

import torch

from llava_fn.launch.ascend import check_environment, doubtful
from llava_fn.launch.versions import version

# What a broken or half-installed torch_npu raises at import or at first use: a missing CANN library, a driver error,
# another torch than it was built for.
NPU_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)
PACKAGES = (
    "llava_fn torch torch_npu tensordict torchdata numpy pillow einops safetensors sentencepiece tyro transformers"
).split()


def pick_device(name: str = "auto") -> torch.device:
    """The device named; for "auto" the NPU if torch_npu is installed, else CUDA if there is a card, else the CPU.

    name: auto, npu, cuda or cpu. The card is always the first visible one; ASCEND_RT_VISIBLE_DEVICES or
    CUDA_VISIBLE_DEVICES chooses among several. ValueError for another name, and for a named device that is not there;
    also for "auto" if torch_npu is installed and does not work: a run meant for an NPU must not crawl on the CPU.
    Before an NPU is given, the environment is checked, and the first process of a machine prints what is `doubtful`.

    torch itself imports an installed torch_npu. Where that is broken, `import torch` fails before this function runs,
    unless TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set.
    """
    if name not in ("auto", "npu", "cuda", "cpu"):
        raise ValueError(
            f"device {name!r}: must be auto, npu, cuda or cpu; "
            "ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES chooses among several cards"
        )
    if name == "npu" or (name == "auto" and importlib.util.find_spec("torch_npu")):
        check_environment(os.environ)
        _require_npu()
        for line in doubtful(os.environ) if os.environ.get("LOCAL_RANK", "0") == "0" else ():
            print(f"warning: {line}", file=sys.stderr)
        return torch.device("npu")
    if name == "cuda" and not torch.cuda.is_available():
        reason = "sees no card" if torch.version.cuda else "is built without CUDA"
        raise ValueError(f"device 'cuda': torch {torch.__version__} {reason}; repair that, or use device='cpu'")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def _require_npu() -> None:
    """Import torch_npu, which adds torch.npu. ValueError says what is missing, if it does not work or sees no card."""
    if importlib.util.find_spec("torch_npu") is None:
        raise ValueError(
            f"device 'npu': torch_npu is not installed; install the version that belongs to torch {torch.__version__}, "
            "or use device='cpu'"
        )
    try:
        importlib.import_module("torch_npu")
        available = torch.npu.is_available()  # pyright: ignore[reportAttributeAccessIssue]  # torch_npu adds it
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
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": {"type": device.type, "name": _device_name(device)},
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ascend": check_environment(os.environ),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.processor() or platform.machine()
    return torch.get_device_module(device).get_device_name(device)
