"""`jaxext doctor`: the facts of the machine, and advice exactly where something costs speed."""

import json
import os
import subprocess
import sys

import pytest

from jaxext.cli import doctor


def run_doctor(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAXEXT_", "GLIBC_"))}
    return subprocess.run(
        [sys.executable, "-m", "jaxext", "doctor", *arguments],
        env=kept | {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def by_name(sections):
    return {finding["name"]: finding for findings in sections.values() for finding in findings}


def test_table_names_every_section_and_gives_each_advice_one_line():
    done = run_doctor()
    assert done.returncode == 0, done.stderr
    sections = json.loads(run_doctor("--json").stdout)
    lines = done.stdout.splitlines()
    assert [line.strip() for line in lines if line.strip() in sections] == list(sections)
    for finding in by_name(sections).values():
        if finding["advice"] and finding["name"] != "load":  # the load changes between the two runs
            assert f"- {finding['name']}: {finding['advice']}" in lines


def test_settings_that_cost_speed_get_advice():
    done = run_doctor(
        "--json",
        JAXEXT_ISA="v3",
        JAXEXT_KERNELS="-attention",
        JAXEXT_PRECISION="fp8",
        JAX_DISABLE_JIT="1",
        JAX_ENABLE_X64="1",
        JAX_COMPILATION_CACHE_DIR="cache",
        XLA_FLAGS="--xla_cpu_multi_thread_eigen=false",
    )
    findings = by_name(json.loads(done.stdout))
    advice = {name: finding["advice"] for name, finding in findings.items()}
    assert advice["JAXEXT_ISA"] == "JAXEXT_ISA forces it; unset it to use the best that this CPU has."
    assert advice["JAXEXT_KERNELS"] == "attention run on stock JAX; unset it."
    assert advice["JAXEXT_PRECISION"].endswith("8.9 or later; this program is for cpu; unset it.")
    assert advice["JAX_DISABLE_JIT"] == "nothing is compiled; unset it."
    assert advice["JAX_ENABLE_X64"].startswith("arrays become float64, for which there are no kernels")
    assert advice["threads"] == "XLA_FLAGS=--xla_cpu_multi_thread_eigen=false limits XLA to one thread; unset it."
    assert "JAX_COMPILATION_CACHE_DIR" not in advice
    assert "chosen v3" in findings["instruction sets"]["value"]
    assert advice["huge pages"] == "" or findings["huge pages"]["value"].startswith("off")


@pytest.mark.parametrize(
    ("environment", "name", "advice"),
    [
        ({"JAXEXT_ISA": "v9"}, "kernels", "JAXEXT_ISA=v9 is unknown: expected v2, v3, v4 or v4bf16."),
        (
            {"JAXEXT_KERNELS": "-attentoin"},
            "environment",
            "JAXEXT_KERNELS: unknown kernel 'attentoin'. The kernels are attention, layer_norm, rms_norm, group_norm, "
            "linear_recurrence, softmax_cross_entropy, linear_cross_entropy, matmul, top_k, sort, argmax, cumsum, "
            "gather, scatter, random_bits, convolution, max_pool, recurrence, elementwise.",
        ),
    ],
)
def test_what_does_not_work_is_named_and_the_exit_code_is_1(environment, name, advice):
    done = run_doctor("--json", **environment)
    finding = by_name(json.loads(done.stdout))[name]
    assert (done.returncode, finding["broken"], finding["advice"]) == (1, True, advice)


def test_switched_off_is_advice_not_a_defect(monkeypatch):
    monkeypatch.setenv("JAXEXT_DISABLE", "1")
    (finding, *_) = doctor._settings()
    assert (finding.name, finding.advice, finding.broken) == (
        "JAXEXT_DISABLE",
        "jaxext is switched off; unset it.",
        False,
    )


def test_hooks_are_tried_and_taken_out_again():
    import jax

    before = [cell.cell_contents for cell in jax.vjp.__closure__ or ()]
    assert [(finding.name, finding.value) for finding in doctor._hooks()] == [
        ("gradients", "seen"),
        ("functions under jit", "seen"),
    ]
    assert [cell.cell_contents for cell in jax.vjp.__closure__ or ()] == before


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [
        ("always", "on (always)", ""),
        ("madvise", "on request (madvise): memory reuse asks for them", ""),
        (
            "never",
            "off (never)",
            "an administrator can write madvise to /sys/kernel/mm/transparent_hugepage/enabled.",
        ),
        ("", "none in this kernel", ""),
    ],
)
def test_huge_pages(setting, value, advice):
    finding = doctor._huge_pages(setting)
    assert (finding.value, finding.advice) == (value, advice)


FILES = {
    "/sys/fs/cgroup/cpu.max": "150000 100000",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
    "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast CPU\n",
}


def test_quota_governor_and_load(monkeypatch):
    monkeypatch.setattr(doctor, "_read", lambda path: FILES.get(path, ""))
    monkeypatch.setattr(doctor, "_usable_cpus", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (6.0, 0.0, 0.0))
    findings = {finding.name: finding for finding in doctor._machine()}
    assert findings["CPU"].value.startswith("Fast CPU")
    assert findings["threads"].advice == "this process may use 4 of 8 CPUs (taskset, cpuset); widen its affinity."
    assert findings["CPU quota"].advice == (
        "the container may use 1.5 CPUs but JAX starts a thread for each of 4; raise the quota or start with "
        "`taskset -c 0-0`."
    )
    assert findings["CPU governor"].advice.startswith("it keeps the clock low")
    assert findings["load"].advice == "other programs use these CPUs now; wait for them before measuring."


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"/sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        (
            {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_control_groups_of_both_versions(monkeypatch, files, quota):
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    assert doctor._cpu_quota() == quota


def test_a_gpu_that_jax_cannot_use_is_noticed(monkeypatch):
    files = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module  580.1\nGCC version"}
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    findings = {finding.name: finding for finding in doctor._devices()}
    assert findings["NVIDIA driver"].value == "NVIDIA UNIX Open Kernel Module  580.1"
    assert findings["NVIDIA driver"].advice == (
        "an NVIDIA GPU is here that JAX cannot use; install jax with its cuda extra, or unset JAX_PLATFORMS."
    )


def test_an_older_ffi_than_the_kernels_were_built_for_is_a_defect(monkeypatch):
    monkeypatch.setattr(doctor, "_native_fact", lambda name: "0.9")
    monkeypatch.setattr(doctor, "_runtime_ffi_version", lambda: "0.10")
    findings = {finding.name: finding for finding in doctor._versions()}
    assert not findings["XLA FFI"].broken
    monkeypatch.setattr(doctor, "_runtime_ffi_version", lambda: "0.3")
    findings = {finding.name: finding for finding in doctor._versions()}
    assert findings["XLA FFI"].broken
    assert findings["XLA FFI"].advice == (
        "jaxlib's FFI is older than 0.9, for which the kernels were built; upgrade jaxlib."
    )


class Device:
    """What the doctor asks of a device; a GPU is not needed to test what it says of one."""

    platform, device_kind, compute_capability = "gpu", "NVIDIA H100", "9.0"

    def memory_stats(self):
        return {"peak_bytes_in_use": 3 * 2**29, "bytes_limit": 60 * 2**30, "num_allocs": 7}


def accelerator_findings(monkeypatch, device):
    import jax

    monkeypatch.setattr(jax, "device_put", lambda x, device: x)  # the measurements run here
    found = doctor._accelerator(device, 0.01, side=64, bytes_copied=1 << 16)
    return {finding.name: finding for finding in found}


def test_a_gpu_is_described_and_measured(monkeypatch):
    from jaxext.kernels import _attention_cudnn

    monkeypatch.setattr(
        _attention_cudnn, "cudnn_problem", lambda: "JAX's cuDNN attention refuses: cuDNN is not detected."
    )
    found = accelerator_findings(monkeypatch, Device())
    assert list(found) == ["compute capability", "attention", "CUDA kernels", "measured peak", "device memory"]
    assert found["compute capability"].value == "9.0"
    assert (found["attention"].value, found["attention"].advice) == (
        "XLA",
        "JAX's cuDNN attention refuses: cuDNN is not detected. Attention stays with XLA; install jax with its cuda "
        "extra, which brings cuDNN.",
    )
    assert found["measured peak"].value.startswith("bf16 ")
    assert found["device memory"].value == "1.5 GiB peak, 60.0 GiB limit"


def test_a_device_that_is_no_gpu_has_no_kernels(monkeypatch):
    device = type("Tpu", (), {"platform": "tpu", "memory_stats": lambda self: None})()
    found = accelerator_findings(monkeypatch, device)
    assert list(found) == ["kernels here", "measured peak"]
    assert found["kernels here"].value == "none for tpu: XLA's own code stays"


def test_peaks_count_operations_and_bytes(monkeypatch):
    from jaxext.abtest import accelerator

    monkeypatch.setattr(accelerator, "_best", lambda fn, operands, seconds: 0.5)
    assert accelerator.peaks(0.0, side=8, bytes_copied=64) == {"f32": 2048.0, "bf16": 2048.0, "copy": 256.0}
