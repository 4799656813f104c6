# Target tranche_torch: the headers of the libtorch stable ABI, and the library behind them.
#
# torch's own CMake package is not used: it insists on the CUDA toolkit that torch was built with, and all that
# is needed here is an include path and one library.
set(TRANCHE_TORCH_ROOT "" CACHE PATH "the installed Python package torch")
if(NOT EXISTS "${TRANCHE_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "tranche: no torch >= 2.10 at TRANCHE_TORCH_ROOT='${TRANCHE_TORCH_ROOT}'; "
                      "build with `pip install .`, which fills it in.")
endif()

add_library(tranche_torch INTERFACE)
target_include_directories(tranche_torch SYSTEM INTERFACE "${TRANCHE_TORCH_ROOT}/include")
target_compile_definitions(tranche_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(tranche_torch INTERFACE
  "${TRANCHE_TORCH_ROOT}/lib/libtorch.so" "${TRANCHE_TORCH_ROOT}/lib/libtorch_cpu.so")
