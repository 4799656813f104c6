# TRANCHE_HAS_CUDA, TRANCHE_CUDA_DESCRIPTION, and target tranche_cuda_options.
#
# CUDA is built wherever nvcc is found, whether or not this machine has a GPU or its torch knows CUDA.
include(CheckLanguage)

set(TRANCHE_HAS_CUDA FALSE)
set(TRANCHE_CUDA_DESCRIPTION "")
if(TRANCHE_CUDA STREQUAL "0")
  return()
endif()
find_program(TRANCHE_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
if(NOT TRANCHE_NVCC)
  if(TRANCHE_CUDA STREQUAL "1")
    message(FATAL_ERROR "tranche: TRANCHE_CUDA=1, but nvcc was not found; install the CUDA toolkit or set CUDA_HOME.")
  endif()
  return()
endif()
set(CMAKE_CUDA_COMPILER "${TRANCHE_NVCC}")

# "8.0;9.0a+PTX" -> "80-real;90a". Default: machine code for Ampere and Hopper, and PTX for what comes later.
set(CMAKE_CUDA_ARCHITECTURES "")
string(REPLACE " " ";" arch_list "${TRANCHE_CUDA_ARCH_LIST}")
foreach(arch IN LISTS arch_list)
  string(REPLACE "." "" code "${arch}")
  if(code MATCHES "^([0-9]+[af]?)\\+PTX$")
    list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}")
  elseif(code MATCHES "^[0-9]+[af]?$")
    list(APPEND CMAKE_CUDA_ARCHITECTURES "${code}-real")
  else()
    message(FATAL_ERROR "tranche: TORCH_CUDA_ARCH_LIST holds '${arch}'; expected entries like 8.0, 9.0a or 9.0+PTX.")
  endif()
endforeach()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
endif()

set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)

set(TRANCHE_HAS_CUDA TRUE)
string(REPLACE ";" " " arch_names "${CMAKE_CUDA_ARCHITECTURES}")
set(TRANCHE_CUDA_DESCRIPTION "${CMAKE_CUDA_COMPILER_VERSION}, architectures ${arch_names}")

# A kernel that spills registers is a kernel to mend: the assembler's warning fails the build.
add_library(tranche_cuda_options INTERFACE)
target_compile_options(tranche_cuda_options INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills,-Werror;-Xcompiler=-Wall;--diag-suppress=20012>")
