"""`jaxext doctor`: what this machine and this installation offer, and one line of advice for what costs speed."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxext import _memory


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact. `advice`: what to do about it, "" where it is as it should be. `broken`: jaxext cannot do its work."""

    name: str
    value: str
    advice: str = ""
    broken: bool = False


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="show what this machine offers and what costs speed",
        description="Shows what this machine and this installation offer, with advice for what costs speed. "
        "The exit code is 1 where kernels or hooks do not work.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    sections = {title: list(examine()) for title, examine in _SECTIONS.items()}
    if args.json:
        print(json.dumps(_as_json(sections), indent=2))
    else:
        _print_tables(sections)
    return int(any(finding.broken for findings in sections.values() for finding in findings))


def _as_json(sections: dict[str, list[Finding]]) -> dict[str, Any]:
    return {title: [dataclasses.asdict(finding) for finding in findings] for title, findings in sections.items()}


def _print_tables(sections: dict[str, list[Finding]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for title, findings in sections.items():
        table.add_row(Text(title, style="bold"), "")
        for finding in findings:
            style = "red" if finding.broken else "yellow" if finding.advice else ""
            table.add_row(f"  {finding.name}", Text(finding.value, style=style))
    console.print(table)
    advice = [finding for findings in sections.values() for finding in findings if finding.advice]
    console.print()
    if not advice:
        console.print(Text("Nothing here costs speed.", style="green"))
        return
    console.print(Text("Advice", style="bold"))
    for finding in advice:
        console.print(Text(f"- {finding.name}: {finding.advice}"), soft_wrap=True)


# ---------------------------------------------------------------- the machine


def _machine() -> Iterator[Finding]:
    yield Finding("CPU", f"{_cpu_name()} ({platform.machine()})")
    yield _threads()
    quota = _cpu_quota()
    if quota is not None and quota < _usable_cpus():
        yield Finding(
            "CPU quota",
            f"{quota:g} CPUs",
            f"the container may use {quota:g} CPUs but JAX starts a thread for each of "
            f"{_usable_cpus()}; raise the quota or start with `taskset -c 0-{max(0, int(quota) - 1)}`.",
        )
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        slow = governor == "powersave" and not _read("/sys/devices/system/cpu/intel_pstate/status")
        advice = "it keeps the clock low; set it to performance (`cpupower frequency-set -g performance`)."
        yield Finding("CPU governor", governor, advice if slow else "")
    yield _load()


def _cpu_name() -> str:
    match = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    return match.group(1) if match else platform.processor() or "unknown"


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _threads() -> Finding:
    usable, present = _usable_cpus(), os.cpu_count() or 1
    value = f"{usable} (one for each usable CPU)"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen=false" in flags or "intra_op_parallelism_threads=1" in flags:
        return Finding("threads", "1 (XLA_FLAGS)", f"XLA_FLAGS={flags} limits XLA to one thread; unset it.")
    if usable < present:
        advice = f"this process may use {usable} of {present} CPUs (taskset, cpuset); widen its affinity."
        return Finding("threads", value, advice)
    return Finding("threads", value)


def _cpu_quota() -> float | None:
    """CPUs that the control group allows, version 2 or 1; None where it sets no limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _load() -> Finding:
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    advice = "other programs use these CPUs now; wait for them before measuring." if load > 0.5 * cpus else ""
    return Finding("load", f"{load:.1f} on {cpus} CPUs", advice)


# ---------------------------------------------------------------- memory


def _memory_section() -> Iterator[Finding]:
    problem = _memory.impossible()
    if problem:
        yield Finding("memory reuse", "not possible", problem)
    else:
        yield Finding("memory reuse", "possible: on under `jaxext run` and after jaxext.install()")
    yield _huge_pages(_memory.state().huge_pages)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"))
    free = f", {int(available.group(1)) / 2**20:.1f} GiB available" if available else ""
    yield Finding("main memory", f"{total / 2**30:.1f} GiB{free}")


def _huge_pages(setting: str) -> Finding:
    name = "huge pages"
    if setting == "madvise":
        return Finding(name, "on request (madvise): memory reuse asks for them")
    if setting == "never":
        advice = "an administrator can write madvise to /sys/kernel/mm/transparent_hugepage/enabled."
        return Finding(name, "off (never)", advice)
    return Finding(name, "on (always)" if setting else "none in this kernel")


# ---------------------------------------------------------------- jaxext and JAX


def _versions() -> Iterator[Finding]:
    import jax

    import jaxext

    yield Finding("jaxext", jaxext.__version__)
    yield Finding("Python", platform.python_version())
    yield Finding("JAX, jaxlib", f"{jax.__version__}, {importlib.metadata.version('jaxlib')}")
    built, running = _native_fact("ffi_version"), _runtime_ffi_version()
    if built:
        older = _numbers(running) < _numbers(built)
        advice = f"jaxlib's FFI is older than {built}, for which the kernels were built; upgrade jaxlib."
        yield Finding("XLA FFI", f"built for {built}, running {running}", advice if older else "", broken=older)
    for name in ("flax", "optax"):
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed")


def _runtime_ffi_version() -> str:
    """The FFI version of the installed jaxlib, as its own header states it."""
    import jax

    header = _read(os.path.join(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h"))
    parts = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    return ".".join(part.group(1) for part in parts if part) or "unknown"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _native_fact(name: str) -> Any:
    from jaxext.kernels import _native_module

    module = _native_module.load()
    return getattr(module, name)() if module is not None else ""


def _kernels() -> Iterator[Finding]:
    from jaxext.kernels import _native_module

    problem = _native_module.status()
    compiled = _native_fact("compiled_isas")
    chosen = _native_fact("active_isa")
    yield Finding(
        "instruction sets", f"compiled {', '.join(compiled)}; chosen {chosen or 'none'}" if compiled else "none"
    )
    if os.environ.get("JAXEXT_ISA") and chosen:
        advice = "JAXEXT_ISA forces it; unset it to use the best that this CPU has."
        yield Finding("JAXEXT_ISA", os.environ["JAXEXT_ISA"], advice)
    features = _native_fact("cpu_features")
    if features:
        yield Finding("CPU features", ", ".join(features))
    if problem:
        yield Finding("kernels", "every operation runs its reference in plain JAX", f"{problem}.", broken=True)
    else:
        yield Finding("kernels", f"{len(_native_fact('targets'))} native targets registered")


def _hooks() -> Iterator[Finding]:
    from jaxext.rewrite import hooks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # says what is found below
        status = hooks.activate()
    hooks.deactivate_unless_used()
    working = {"gradients": status.differentiation, "functions under jit": status.jit}
    for name, works in working.items():
        advice = "" if works else f"{status.reason}; upgrade jaxext, or install a JAX that it supports."
        yield Finding(name, "seen" if works else "not seen: they run on stock JAX", advice, broken=not works)


def _settings() -> Iterator[Finding]:
    from jaxext import _settings
    from jaxext.kernels import _platform
    from jaxext.kernels._fp8 import fp8_device_refusal

    try:
        settings = _settings.from_environment()
    except ValueError as error:
        yield Finding("environment", "unreadable", str(error), broken=True)
        return
    if settings is None:
        yield Finding("JAXEXT_DISABLE", "1", "jaxext is switched off; unset it.")
    elif settings.exclude:
        names = ", ".join(sorted(settings.exclude))
        yield Finding("JAXEXT_KERNELS", os.environ["JAXEXT_KERNELS"], f"{names} run on stock JAX; unset it.")
    if settings is not None and settings.precision:
        reason = fp8_device_refusal(_platform.foreseen(), _platform.compute_capability())
        yield Finding("JAXEXT_PRECISION", settings.precision, f"{reason}; unset it." if reason else "")
    yield from _jax_settings()


def _jax_settings() -> Iterator[Finding]:
    import jax

    for option, advice in _COSTLY_OPTIONS.items():
        if getattr(jax.config, option):
            yield Finding(option.upper(), str(getattr(jax.config, option)), advice)
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        advice = "set it to a folder, and programs that were compiled before start at once."
        yield Finding("JAX_COMPILATION_CACHE_DIR", "not set", advice)


_COSTLY_OPTIONS = {
    "jax_disable_jit": "nothing is compiled; unset it.",
    "jax_enable_x64": "arrays become float64, for which there are no kernels; unset it where float32 is enough.",
    "jax_debug_nans": "every result is checked on the host; unset it when the NaN is found.",
    "jax_debug_infs": "every result is checked on the host; unset it when the infinity is found.",
    "jax_enable_checks": "JAX checks itself at every step; unset it.",
}


def _devices() -> Iterator[Finding]:
    import jax

    devices = jax.devices()
    kinds = sorted({f"{device.platform}: {device.device_kind}" for device in devices})
    yield Finding("JAX devices", f"{len(devices)} ({', '.join(kinds)})")
    if devices[0].platform != "cpu":
        yield from _accelerator(devices[0], 0.2)
    driver = _read("/proc/driver/nvidia/version")
    if driver and "gpu" not in {device.platform for device in devices}:
        first_line = driver.splitlines()[0].removeprefix("NVRM version: ")
        advice = "an NVIDIA GPU is here that JAX cannot use; install jax with its cuda extra, or unset JAX_PLATFORMS."
        yield Finding("NVIDIA driver", first_line, advice)


def _accelerator(device: Any, seconds: float, **sizes: int) -> Iterator[Finding]:
    """What bears on the speed of the device that programs run on, which is no CPU. `sizes`: of what is measured."""
    from jaxext.abtest import accelerator
    from jaxext.kernels import _native_module
    from jaxext.kernels._attention_cudnn import cudnn_problem

    capability = getattr(device, "compute_capability", "")
    if capability:
        yield Finding("compute capability", str(capability))
        problem = cudnn_problem()
        advice = f"{problem} Attention stays with XLA; install jax with its cuda extra, which brings cuDNN."
        yield Finding("attention", "cuDNN" if problem is None else "XLA", advice if problem else "")
        module, problem = _native_module.load_cuda()
        built = f"{len(module.targets())} native targets registered" if module is not None else problem
        yield Finding("CUDA kernels", built)
    else:
        yield Finding("kernels here", f"none for {device.platform}: XLA's own code stays")
    rates = accelerator.peaks(seconds, device, **sizes)
    products = (f"{kind} {rates[kind] / 1e12:.3g} TFLOP/s" for kind in ("bf16", "f32"))
    yield Finding("measured peak", ", ".join((*products, f"copy {rates['copy'] / 1e9:.4g} GB/s")))
    memory = accelerator.memory(device)
    if memory:
        parts = [f"{count / 2**30:.1f} GiB {name}" for name, count in memory.items()]
        yield Finding("device memory", ", ".join(parts))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # not there, or not for this user: nothing is known
        return ""


_SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Machine": _machine,
    "Memory": _memory_section,
    "Versions": _versions,
    "Devices": _devices,
    "Kernels": _kernels,
    "Hooks (self-test)": _hooks,
    "Settings": _settings,
}
