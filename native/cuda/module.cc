// The Python face of the CUDA kernels: FFI targets as capsules. The runtime is linked in and looks for a driver only
// when a kernel starts, so the module loads on any machine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cuda_runtime.h>

#include "xla/ffi/api/c_api.h"

#define JAXEXT_TARGET(source, target) extern "C" XLA_FFI_Error* jaxext_cuda_##target(XLA_FFI_CallFrame* call_frame);
#include "cuda/kernels.inc"
#undef JAXEXT_TARGET

namespace nb = nanobind;

namespace {

nb::dict targets() {
  nb::dict found;
#define JAXEXT_TARGET(source, target) \
  found["jaxext_" #target] = nb::capsule(reinterpret_cast<void*>(jaxext_cuda_##target), "xla._CUSTOM_CALL_TARGET");
#include "cuda/kernels.inc"
#undef JAXEXT_TARGET
  return found;
}

}  // namespace

NB_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of jaxext.";
  m.def("targets", &targets, "FFI target name -> capsule.");
  m.def("toolkit", [] { return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10); },
        "The CUDA version this module was built with.");
}
