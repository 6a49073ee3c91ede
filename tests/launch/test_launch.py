"""Wrong environment variables are all named at once; a device is what was asked for, or an error that says why not."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_fn.errors import BadRecord
from llava_fn.launch import cli, versions
from llava_fn.launch.ascend import ASCEND_VARIABLES, check_environment, doubtful
from llava_fn.launch.device import environment, pick_device
from llava_fn.launch.processes import LONG_WAIT, WAIT, check_processes, collective_limit

LEGAL = {
    "ASCEND_RT_VISIBLE_DEVICES": ["0", "0,1,2,3", "11,10"],
    "ASCEND_SLOG_PRINT_TO_STDOUT": ["0", "1"],
    "ASCEND_GLOBAL_LOG_LEVEL": ["0", "1", "2", "3", "4"],
    "ASCEND_LAUNCH_BLOCKING": ["0", "1"],
    "TASK_QUEUE_ENABLE": ["0", "1", "2"],
    "COMBINED_ENABLE": ["0", "1"],
    "CPU_AFFINITY_CONF": [
        "0", "1", "2", "mode:2", "1,npu0:0-1,npu1:2-5,npu13:6-6", "2,npu_affine:1", "1,force:1,npu0:0-2,npu_affine:0",
        "1,lazy_bind:0,bind_irq:1,npu3:9",
    ],
    "PYTORCH_NPU_ALLOC_CONF": [
        "expandable_segments:True", "expandable_segments:False,max_split_size_mb:32", "max_split_size_mb:21",
        "max_split_size_mb:32,garbage_collection_threshold:0.6", "garbage_collection_threshold:.5", "page_size:1g",
        "expandable_segments:True, base_addr_aligned_kb:16", "base_addr_aligned_kb:0", "segment_size_mb:20",
        "segment_size_mb:512", "large_segment_size_mb:11", "roundup_power2_divisions:4",
        "roundup_power2_divisions:[256:1,512:2,1024:4,>:8],page_size:1g", "per_process_memory_fraction:1.0",
        "per_process_memory_fraction:0", "pinned_max_cached_size_mb:1", "throw_on_npumalloc_oom:True",
        "multi_stream_lazy_reclaim:True", "pinned_use_background_threads:True", "pin_memory_expandable_segments:True",
        "pinned_mem_register:False", "pinned_max_round_threshold_mb:128", "release_lock_on_npumalloc:True",
        "max_split_size_mb:50,max_non_split_rounding_mb:30",
    ],
    "MULTI_STREAM_MEMORY_REUSE": ["0", "1", "2", "3"],
    "ACLNN_CACHE_LIMIT": ["1", "100000", "10000000"],
    "INF_NAN_MODE_ENABLE": ["0", "1"],
    "TORCH_NPU_FALLBACK_CPU_DISABLE": ["0", "1"],
    "HCCL_CONNECT_TIMEOUT": ["120", "1200", "7200"],
    "HCCL_EXEC_TIMEOUT": ["0", "60", "0.05", "1800", "36000", "2147483647"],
    "HCCL_EVENT_TIMEOUT": ["0", "1868", "2147483647"],
    "HCCL_BUFFSIZE": ["1", "200", "4096"],
    "P2P_HCCL_BUFFSIZE": ["0", "20"],
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": ["0", "1", "2", "3"],
    "TORCH_HCCL_BLOCKING_WAIT": ["0", "1"],
    "NPUS_PER_NODE": ["1", "8", "16"],
}  # fmt: skip
ILLEGAL = {
    "ASCEND_RT_VISIBLE_DEVICES": ["0, 1", "0,,1", ",0", "0,", "npu0", "-1", "all"],
    "ASCEND_SLOG_PRINT_TO_STDOUT": ["2", "true", "01"],
    "ASCEND_GLOBAL_LOG_LEVEL": ["5", "ERROR", "-1", "3 "],
    "ASCEND_LAUNCH_BLOCKING": ["2", "on"],
    "TASK_QUEUE_ENABLE": ["3", "yes"],
    "COMBINED_ENABLE": ["2"],
    "CPU_AFFINITY_CONF": [
        "3", "12", "npu0:0-1", "1,npu0:5-2", "1;npu0:0-1", "1,force:2", "1,npu_affine:2", "1,", "1,numa:0",
        "1,bind_irq=0", "1,lazy_bind:2", "1,npu100:0-1",
    ],
    "PYTORCH_NPU_ALLOC_CONF": [
        "expandable_segments:true", "expandable_segments", "expandable_segments:True,", "max_split_size_mb:20",
        "max_split_size_mb:32.5", "garbage_collection_threshold:0", "garbage_collection_threshold:1.0",
        "garbage_collection_threshold:half", "base_addr_aligned_kb:17", "page_size:2g", "segment_size_mb:19",
        "segment_size_mb:513", "large_segment_size_mb:10", "roundup_power2_divisions:[256:1,512]",
        "per_process_memory_fraction:1.1", "pinned_max_cached_size_mb:0", "expandable_segmets:True",
        "expandable_segments=True", "expandable_segments:True,max_split_size_mb:32",
        "garbage_collection_threshold:0.8,expandable_segments:True",
    ],
    "MULTI_STREAM_MEMORY_REUSE": ["4", "-1"],
    "ACLNN_CACHE_LIMIT": ["0", "10000001", "1e5"],
    "INF_NAN_MODE_ENABLE": ["2"],
    "TORCH_NPU_FALLBACK_CPU_DISABLE": ["2"],
    "HCCL_CONNECT_TIMEOUT": ["119", "7201", "1200s", "12.5", "\u0661\u0662\u0663\u0664"],
    "HCCL_EXEC_TIMEOUT": ["-1", "2147483648", "60s", "0.005", "1e3"],
    "HCCL_EVENT_TIMEOUT": ["-1", "2147483648"],
    "HCCL_BUFFSIZE": ["0", "200MB"],
    "P2P_HCCL_BUFFSIZE": ["-1"],
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": ["4"],
    "TORCH_HCCL_BLOCKING_WAIT": ["2"],
    "NPUS_PER_NODE": ["0", "eight"],
}  # fmt: skip


def pairs(table):
    return [(name, value) for name, values in table.items() for value in values]


def complaint(environ):
    with pytest.raises(ValueError) as caught:
        check_environment(environ)
    assert not isinstance(caught.value, BadRecord)
    return str(caught.value)


# Environment variables


def test_the_table_has_each_variable_once_and_is_frozen():
    names = [row.name for row in ASCEND_VARIABLES]
    assert sorted(names) == sorted(LEGAL) == sorted(ILLEGAL)
    assert all(row.legal and row.meaning for row in ASCEND_VARIABLES)
    with pytest.raises(FrozenInstanceError):
        ASCEND_VARIABLES[0].name = "X"


def test_each_default_is_legal_itself():
    for row in ASCEND_VARIABLES:
        assert row.default in ("", "all cards") or row.check(row.default), row.name


@pytest.mark.parametrize(("name", "value"), pairs(LEGAL))
def test_legal_values_are_returned_unchanged(name, value):
    assert check_environment({name: value}) == {name: value}


@pytest.mark.parametrize(("name", "value"), [*pairs(ILLEGAL), *((name, "") for name in ILLEGAL)])
def test_illegal_values_are_named_with_what_is_legal(name, value):
    message = complaint({name: value})
    row = next(row for row in ASCEND_VARIABLES if row.name == name)
    assert f"{name}={value!r}" in message and row.legal in message and row.default in message and "unset" in message


def test_only_variables_of_the_table_come_back():
    environ = {"PATH": "/bin", "HCCL_BUFFSIZE": "300", "ASCEND_HOME_PATH": "/usr/local/Ascend", "SECRET": "x"}
    assert check_environment(environ) == {"HCCL_BUFFSIZE": "300"}
    assert check_environment({}) == {}


def test_all_problems_are_listed_at_once():
    message = complaint({
        "TASK_QUEUE_ENABLE": "7", "HCCL_BUFFSIZE": "x", "COMBINED_ENABLE": "1",
        "PYTORCH_NPU_ALLOC_CONF": "page_size:1g", "PYTORCH_ALLOC_CONF": "page_size:1g",
    })  # fmt: skip
    assert "3 wrong" in message and len(message.splitlines()) == 4
    assert "COMBINED_ENABLE" not in message
    for name in ("TASK_QUEUE_ENABLE='7'", "HCCL_BUFFSIZE='x'", "PYTORCH_NPU_ALLOC_CONF and"):
        assert name in message


def test_the_mapping_is_not_changed_and_the_process_environment_not_read(monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "9")
    environ = {"HCCL_BUFFSIZE": "300"}
    assert check_environment(environ) == environ == {"HCCL_BUFFSIZE": "300"}


def test_what_torch_npu_warns_of_or_overrules_is_a_warning_and_legal():
    doubts = {
        ("7200", "7200"): "HCCL_EVENT_TIMEOUT=7268", ("1800", "1799"): "HCCL_EVENT_TIMEOUT=1868",
        ("0", "99999"): "HCCL_EVENT_TIMEOUT=0",
    }  # fmt: skip
    for (execution, event), said in doubts.items():
        environ = {"HCCL_EXEC_TIMEOUT": execution, "HCCL_EVENT_TIMEOUT": event}
        (line,) = doubtful(check_environment(environ))
        assert f"HCCL_EVENT_TIMEOUT={event}" in line and f"HCCL_EXEC_TIMEOUT={execution}" in line and said in line
    assert "1836" in doubtful({"HCCL_EVENT_TIMEOUT": "1800"})[0]  # the default
    for queue in ("1", "2"):
        environ = {"ASCEND_LAUNCH_BLOCKING": "1", "TASK_QUEUE_ENABLE": queue}
        assert f"TASK_QUEUE_ENABLE={queue} has no effect" in doubtful(check_environment(environ))[0]
    (line,) = doubtful({"NPUS_PER_NODE": "8"})
    assert "NPUS_PER_NODE=8, but 1 process(es)" in line and "torchrun --nproc-per-node 8" in line
    for environ in (
        {}, {"HCCL_EXEC_TIMEOUT": "7200", "HCCL_EVENT_TIMEOUT": "7201"}, {"HCCL_EXEC_TIMEOUT": "7200"},
        {"HCCL_EXEC_TIMEOUT": "0", "HCCL_EVENT_TIMEOUT": "0"}, {"ASCEND_LAUNCH_BLOCKING": "1"},
        {"ASCEND_LAUNCH_BLOCKING": "1", "TASK_QUEUE_ENABLE": "0"}, {"TASK_QUEUE_ENABLE": "2"},
        {"NPUS_PER_NODE": "8", "LOCAL_WORLD_SIZE": "8"}, {"NPUS_PER_NODE": "1"},
    ):  # fmt: skip
        assert doubtful(environ) == []


def test_the_limit_of_a_group_of_npus_follows_hccls():
    npu = SimpleNamespace(type="npu")
    for environ, seconds in (({}, 1836 + 68), ({"HCCL_EXEC_TIMEOUT": "60"}, 128), ({"HCCL_EXEC_TIMEOUT": "0.5"}, 68.5)):
        assert collective_limit(npu, environ).total_seconds() == seconds
    assert collective_limit(npu, {"HCCL_EXEC_TIMEOUT": "0"}) == LONG_WAIT
    assert collective_limit(torch.device("cuda"), {"HCCL_EXEC_TIMEOUT": "60"}) == WAIT


def test_two_allocator_settings_exclude_each_other():
    both = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert "PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF" in complaint(both)
    assert check_environment({"PYTORCH_ALLOC_CONF": "x"}) == {}


def test_processes_are_counted_and_wrong_numbers_refused():
    started = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0")
    for environ, tp, world in (({}, 1, 1), ({"WORLD_SIZE": "1"}, 1, 1), ({"WORLD_SIZE": "8", **started}, 4, 8)):
        assert check_processes(tp, environ) == world
    for world in ("two", "", "0", "-1"):
        with pytest.raises(ValueError, match=f"WORLD_SIZE='{world}' is no number of processes"):
            check_processes(1, {"WORLD_SIZE": world})
    with pytest.raises(ValueError, match="tp=4 does not divide the 6 processes; tp can be one of 1, 2, 3, 6"):
        check_processes(4, {"WORLD_SIZE": "6"})
    with pytest.raises(ValueError, match="tp=4 would join processes of several machines, of 2 each; let tp divide 2"):
        check_processes(4, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", **started})
    with pytest.raises(ValueError, match="WORLD_SIZE=8 but RANK, MASTER_PORT is not set; torchrun sets them"):
        check_processes(1, {"WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "here"})


def test_restarts_need_the_setting_with_which_processes_find_each_other():
    environ = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0")
    environ |= {"WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(ValueError, match="--max-restarts 3: .*set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_processes(1, environ)
    assert check_processes(1, environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}) == 2


# The device

REGISTER = """
import types, torch
torch.utils.rename_privateuse1_backend("npu")
torch.npu = types.SimpleNamespace(is_available=lambda: {available}, get_device_name=lambda device: "Ascend910B2")
"""
PACKAGES = {
    "no_cann": "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')",
    "other_torch": "raise RuntimeError('built for torch 2.1')",
    "no_driver": "raise OSError('libascend_hal.so: cannot open')",
    "renamed": "import torch; torch.no_such_name",
    "init_fails": REGISTER.format(available="1 // 0").replace("1 // 0", "exec('raise RuntimeError(507899)')"),
    "half_removed": None,  # a folder without __init__.py: it imports, and does nothing
    "no_card": REGISTER.format(available="False"),
    "working": REGISTER.format(available="True"),
}
PROBE = """
import importlib, json, sys
import torch
from llava_fn.launch.device import environment, pick_device

def attempt(name):
    try:
        return str(pick_device(name))
    except ValueError as error:
        return "ValueError: " + str(error)

sys.path.remove(sys.argv[1])  # torch was imported beside a torch_npu without CANN
results = {}
for path in sys.argv[1:]:
    sys.path.insert(0, path)
    importlib.invalidate_caches()
    torch.cuda.is_available = lambda: True  # neither CUDA nor the CPU may stand in for the NPU
    results[path.rsplit("/")[-1]] = {name: attempt(name) for name in ("cpu", "cuda", "npu", "auto")}
    if path.endswith("working"):
        results["environment"] = environment(torch.device("npu"))
    sys.path.remove(path)
    sys.modules.pop("torch_npu", None)
    vars(torch).pop("npu", None)
print(json.dumps(results))
"""
ENTRY_POINT = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"


def install(folder, source):
    """A torch_npu as pip leaves it: the package, and the entry point through which torch imports it."""
    (folder / "torch_npu").mkdir(parents=True)
    if source is not None:
        (folder / "torch_npu" / "__init__.py").write_text(source)
    info = folder / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    return folder


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """What pick_device answers in a process where each of PACKAGES in turn is the installed torch_npu.

    One that lacks CANN is there from the start: torch can be imported because autoload is off, as the docstring says.
    """
    root = tmp_path_factory.mktemp("site")
    folders = [str(install(root / name, source)) for name, source in PACKAGES.items()]
    path = os.pathsep.join([folders[0], str(Path(__file__).parents[2])])
    clean = {key: value for key, value in os.environ.items() if key not in LEGAL}
    environ = clean | {"PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE, *folders], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_versions_that_do_not_go_together_are_named_before_torch_is_imported(monkeypatch):
    installed, cuda = {}, {}
    monkeypatch.setattr(versions, "version", installed.get)
    monkeypatch.setattr(versions, "cuda_of_torch", lambda: cuda.get("cuda"))
    for torch_version, npu, built, said in [
        (None, None, None, "torch is not installed"),
        ("2.1.0", "2.1.0.post10", None, r"torch 2.1.0: llava_fn runs on torch 2.7.1 to below 2.14.* CANN 8.3 to 9.1"),
        ("2.14.0a0", None, None, "torch 2.14.0a0: "),
        ("2.13.0+cpu", "2.12.0.post3", None, r"torch_npu 2.12.0.post3 beside torch 2.13.0\+cpu"),
        ("2.12.0", "2.12.0", "13.0", r"build for CUDA 13.0.*torch==2.12.0 --index-url https://download.pytorch.org/"),
    ]:
        installed |= {"torch": torch_version, "torch_npu": npu}
        cuda["cuda"] = built
        with pytest.raises(ValueError, match=said):
            versions.check_versions()
    with pytest.raises(SystemExit, match="error: torch 2.12.0 is a build for CUDA"):
        cli.run(pytest.fail, None)
    for torch_version, npu, built in [("2.7.1+cpu", "2.7.1.post11", None), ("2.13.1", None, "13.0")]:
        installed |= {"torch": torch_version, "torch_npu": npu}
        cuda["cuda"] = built
        versions.check_versions()


def test_a_torch_npu_without_cann_is_said_where_it_first_shows(monkeypatch):
    monkeypatch.setattr(cli, "check_versions", lambda: None)

    def fails(message):
        raise RuntimeError(message) from ImportError("libhccl.so: cannot open shared object file")

    with pytest.raises(SystemExit, match=r"does not load \(libhccl.so: .*set_env.sh` of CANN"):
        cli.run(fails, "Failed to load the backend extension: torch_npu. You can disable")
    with pytest.raises(RuntimeError, match="another"):
        cli.run(fails, "another")


def test_the_versions_that_are_admitted_are_those_of_the_package():
    assert f'"torch>={versions.OLDEST},<{versions.BELOW}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    lines = ["cuda: Optional[str] = '12.6'", "cuda = '13.0'", "cuda: Optional[str] = None"]
    assert [versions.cuda_of(f"x = 1\n{line}\nhip = None") for line in lines] == ["12.6", "13.0", None]
    assert versions.cuda_of_torch() == torch.version.cuda


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("no_cann", "ImportError: libhccl.so"),
        ("other_torch", "RuntimeError: built for torch 2.1"),
        ("no_driver", "OSError: libascend_hal.so"),
        ("renamed", "AttributeError"),
        ("init_fails", "RuntimeError: 507899"),
        ("half_removed", "AttributeError"),
    ],
)
def test_a_broken_torch_npu_is_an_error_and_never_a_silent_cpu(probed, package, reason):
    for name in ("npu", "auto"):
        answer = probed[package][name]
        assert answer.startswith("ValueError: torch_npu is installed but does not work (")
        assert reason in answer and "set_env.sh" in answer and "device='cpu'" in answer
    assert (probed[package]["cpu"], probed[package]["cuda"]) == ("cpu", "cuda")


def test_a_torch_npu_without_a_card_is_an_error(probed):
    for name in ("npu", "auto"):
        answer = probed["no_card"][name]
        assert answer.startswith("ValueError") and "sees no NPU" in answer
        assert "ASCEND_RT_VISIBLE_DEVICES" in answer and "device='cpu'" in answer
    assert probed["no_card"]["cpu"] == "cpu"


def test_a_working_npu_comes_before_cuda(probed):
    assert probed["working"] == {"cpu": "cpu", "cuda": "cuda", "npu": "npu", "auto": "npu"}


def test_environment_names_the_npu_and_its_package(probed):
    assert probed["environment"]["device"] == {"type": "npu", "name": "Ascend910B2"}
    assert probed["environment"]["packages"]["torch_npu"] == "2.13.0"


def test_without_torch_npu_auto_is_cuda_and_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="'npu': torch_npu is not installed.*device='cpu'"):
        pick_device("npu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, reason in [("12.8", "sees no card"), (None, "without CUDA")]:
        monkeypatch.setattr(torch.version, "cuda", built)
        with pytest.raises(ValueError, match=f"'cuda'.*{reason}.*device='cpu'"):
            pick_device("cuda")


def test_unknown_device_names_are_refused():
    for name in ("gpu", "cuda:1", "npu:0", "", "CPU", "mps"):
        with pytest.raises(ValueError, match="must be auto, npu, cuda or cpu"):
            pick_device(name)


# The record


def test_environment_is_json_and_tells_versions_device_and_settings(monkeypatch):
    for name in LEGAL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HCCL_BUFFSIZE", "300")
    record = environment(torch.device("cpu"))
    assert json.loads(json.dumps(record)) == record
    assert record["python"] == platform.python_version()
    assert record["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["packages"]["torch_npu"] is None and record["packages"]["pillow"]
    assert record["device"]["type"] == "cpu" and record["device"]["name"]
    assert record["threads"] == torch.get_num_threads() and record["cpu_count"] == os.cpu_count()
    assert record["ascend"] == {"HCCL_BUFFSIZE": "300"}
    monkeypatch.setenv("HCCL_BUFFSIZE", "0")
    with pytest.raises(ValueError, match="HCCL_BUFFSIZE='0'"):
        environment(torch.device("cpu"))
