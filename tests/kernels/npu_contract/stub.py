"""Stand-ins for the libraries of CANN, so that the real torch_npu can be imported on a machine that has none.

torch_npu is linked against six libraries that only CANN brings. What it needs of them is read off its own binaries: the
names of the libraries with readelf, the functions with nm. From that one C file is written and compiled into one shared
object a library. Every function answers 100039, CANN's own code for "you are linked against a stub"; but for the few
that keep books (the current device, streams, events) or give memory of the host, so that the dispatcher, the autograd
formulas and the shape rules of torch_npu work. There is no memory of a device and no kernel behind it: a real NPU
tensor cannot be made, and nothing can pretend to compute. Needs gcc and binutils. Nothing of CANN is copied.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from pathlib import Path

import torch
from wheels import settle

SYSTEM = ("libc.", "libm.", "libstdc++", "libgcc_s", "libpthread", "libdl", "librt.", "ld-linux")
OURS = ("acl", "rt", "Msprof", "Hccl")  # what the names of CANN's functions begin with
BOOKKEEPING = r"""
#include <stdlib.h>
static int device, streams;
static char handles[4096];
int aclInit(void *path) { return 0; }
int aclFinalize(void) { return 0; }
int aclrtGetDeviceCount(unsigned *n) { *n = 8; return 0; }
int aclrtGetDevice(int *d) { *d = device; return 0; }
int aclrtSetDevice(int d) { device = d; return 0; }
int aclrtResetDevice(int d) { return 0; }
int aclrtSetDeviceSatMode(int mode) { return 0; }
int aclrtGetCurrentContext(void **c) { *c = handles; return 0; }
int aclrtSetCurrentContext(void *c) { return 0; }
int aclrtCreateStream(void **s) { *s = &handles[streams++ % 4096]; return 0; }
int aclrtCreateStreamWithConfig(void **s, unsigned priority, unsigned flag) { return aclrtCreateStream(s); }
int aclrtDestroyStream(void *s) { return 0; }
int aclrtDestroyStreamForce(void *s) { return 0; }
int aclrtSynchronizeStream(void *s) { return 0; }
int aclrtMallocHost(void **p, unsigned long size) { *p = malloc(size); return *p == 0; }
int aclrtFreeHost(void *p) { free(p); return 0; }
int aclrtCreateEventExWithFlag(void **e, unsigned flag) { *e = handles; return 0; }
int aclrtCreateEventWithFlag(void **e, unsigned flag) { *e = handles; return 0; }
int aclrtRecordEvent(void *e, void *stream) { return 0; }
int aclrtSynchronizeEvent(void *e) { return 0; }
int aclrtDestroyEvent(void *e) { return 0; }
int aclSetCompileopt(int option, const char *value) { return 0; }
int aclmdlInitDump(void) { return 0; }
int aclmdlFinalizeDump(void) { return 0; }
int aclrtSetOpExecuteTimeOut(unsigned seconds) { return 0; }
int aclrtGetSysParamOpt(int option, long *value) { *value = 0; return 0; }
int aclrtSetSysParamOpt(int option, long value) { return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
const char *aclGetRecentErrMsg(void) { return "a stub, not CANN"; }
void *aclCreateTensorDesc(void) { return 0; }
void *aclCreateDataBuffer(void) { return 0; }
void *aclopCreateAttr(void) { return 0; }
"""


def load(package: Path) -> None:
    """Build, once for each wheel, and load the stand-ins for torch_npu unpacked at `package`; before it is imported."""
    binaries = [p for p in (*package.glob("lib/*.so"), *package.glob("_C*.so")) if "atb" not in p.name]
    for library in sorted(_built(_missing(binaries), _source(binaries)).glob("*.so*")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # the loader then finds it under its name


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _missing(binaries: list[Path]) -> list[str]:
    """Libraries that these need and that neither they, nor torch, nor the system bring."""
    needed = {
        line.split("[")[1].rstrip("]")
        for p in binaries
        for line in _lines("readelf", "-d", str(p))
        if "(NEEDED)" in line
    }
    there = {p.name for p in binaries} | {p.name for p in (Path(torch.__file__).parent / "lib").glob("*.so*")}
    return sorted(name for name in needed - there if not name.startswith(SYSTEM))


def _source(binaries: list[Path]) -> str:
    undefined = {
        words[-1]
        for p in binaries
        for words in map(str.split, _lines("nm", "-D", "--undefined-only", str(p)))
        if words[-2] == "U" and "@" not in words[-1] and words[-1].startswith(OURS)
    }
    rest = sorted(name for name in undefined if f"{name}(" not in BOOKKEEPING)
    return BOOKKEEPING + "".join(f"int {name}(void) {{ return 100039; }}\n" for name in rest)


def _built(libraries: list[str], source: str) -> Path:
    """A folder that holds `source` compiled under each of these names."""
    digest = hashlib.sha256((source + "".join(libraries)).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"cann-stub-{digest}"
    if not folder.exists():
        new = Path(tempfile.mkdtemp(dir=folder.parent))
        (new / "stub.c").write_text(source)
        for name in libraries:
            _lines("gcc", "-w", "-shared", "-fPIC", str(new / "stub.c"), f"-Wl,-soname,{name}", "-o", str(new / name))
        settle(new, folder)
    return folder
