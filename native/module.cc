// The Python face of the native kernels: FFI targets as capsules, and facts about the machine. No kernel body here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "machine.h"
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
}
