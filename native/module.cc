// The Python face of the native kernels: FFI targets as capsules, and facts about the machine. No kernel body here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "machine.h"
#include "memory/hook.h"
#include "peak.h"
#include "xla/ffi/api/c_api.h"

#define JAXEXT_TARGET(source, target) extern "C" XLA_FFI_Error* jaxext_##target(XLA_FFI_CallFrame* call_frame);
#if JAXEXT_COMPILED_V2
#include "kernels.inc"
#endif
#undef JAXEXT_TARGET

namespace nb = nanobind;

namespace jaxext {
namespace {

nb::dict targets() {
  nb::dict found;
#define JAXEXT_TARGET(source, target) \
  found["jaxext_" #target] = nb::capsule(reinterpret_cast<void*>(jaxext_##target), "xla._CUSTOM_CALL_TARGET");
#if JAXEXT_COMPILED_V2
#include "kernels.inc"
#endif
#undef JAXEXT_TARGET
  return found;
}

double measure_peak_of(const std::string& kind, int threads, double seconds) {
  nb::gil_scoped_release released;
  if (kind == "f32") return measure_peak(PeakKind::f32, threads, seconds);
  if (kind == "bf16") return measure_peak(PeakKind::bf16, threads, seconds);
  if (kind == "copy") return measure_peak(PeakKind::copy, threads, seconds);
  throw std::invalid_argument("argument 'kind' must be 'f32', 'bf16' or 'copy', not '" + kind + "'");
}

nb::object pool_counts() {
  if (pool() == nullptr) return nb::none();
  const BlockPool::Counts counts = pool()->counts();
  nb::dict found;
  found["live"] = counts.live;
  found["kept"] = counts.kept;
  found["reused"] = counts.reused;
  found["fresh"] = counts.fresh;
  return found;
}

}  // namespace
}  // namespace jaxext

NB_MODULE(_native, m) {
  using namespace jaxext;
  m.doc() = "Native kernels of jaxext.";
  m.def("targets", &targets, "FFI target name -> capsule.");
  m.def("compiled_isas", &compiled_isas, "Instruction sets in this build, oldest first.");
  m.def("active_isa", [] { return isa_choice().active; }, "The instruction set chosen at load, '' if none.");
  m.def("isa_problem", [] { return isa_choice().problem; }, "Why no instruction set was chosen, else ''.");
  m.def("cpu_features", &cpu_features, "The CPU's features that matter here.");
  m.def("ffi_version", [] { return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR); },
        "The XLA FFI version this module was built against.");
  m.def("measure_peak", &measure_peak_of, nb::arg("kind"), nb::arg("threads"), nb::arg("seconds"),
        "Measured FLOP/s ('f32', 'bf16') or bytes per second read and written ('copy').");
  m.def("start_pool", &start_pool, "Leads jaxlib's large requests to the block pool; '' or why it cannot.");
  m.def("stop_pool", &stop_pool, "jaxlib asks the system again; blocks in use stay valid.");
  m.def("release_pool", &release_pool, "Gives the pages of the pool's free blocks back.");
  m.def("pool_counts", &pool_counts,
        "Bytes live and kept, requests answered by a kept block and by new pages; None before the first start.");
}
