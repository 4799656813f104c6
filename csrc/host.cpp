// tranche._host: what Python asks the build about. The ops work without this module.
#include <pybind11/pybind11.h>

#include "core/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "What this build of tranche is.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = TRANCHE_VERSION;
        info["compiler"] = __VERSION__;
        info["cuda"] = TRANCHE_CUDA_BUILD;
        info["isa"] = tranche::isa_name(tranche::isa());
        return info;
      },
      "version, C++ compiler, CUDA compiler and architectures ('' without CUDA), and the instruction set "
      "that "
      "CPU kernels use on this machine.");
}
