// Everything the op files need of torch, by way of the libtorch stable ABI and nothing else.
//
// An op file is compiled once per backend, which one macro names:
//   TRANCHE_BACKEND_CPU   defines the op's schema in `tranche` and its CPU kernel
//   TRANCHE_BACKEND_CUDA  adds its CUDA kernel
//   TRANCHE_BACKEND_SIM   defines the same schema in `tranche_sim`; CPU tensors, simulated CUDA kernel
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "core/checks.h"
#include "core/numeric.h"

#if defined(TRANCHE_BACKEND_CUDA)
#include <torch/csrc/stable/accelerator.h>
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#elif defined(TRANCHE_BACKEND_SIM)
#include "sim/runtime.h"
#elif !defined(TRANCHE_BACKEND_CPU)
#error "an op file needs one of TRANCHE_BACKEND_CPU, TRANCHE_BACKEND_CUDA, TRANCHE_BACKEND_SIM"
#endif

namespace tranche {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- reading tensors

// A tensor's sizes as Python prints them, read when a message is written.
struct ShapeText {
  const Tensor& tensor;

  friend std::ostream& operator<<(std::ostream& out, const ShapeText& shape) {
    out << "[";
    for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i ? ", " : "") << shape.tensor.size(i);
    return out << "]";
  }
};

inline ShapeText shape_text(const Tensor& tensor) { return {tensor}; }

// A dtype as one writes it in Python.
inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    default:
      return torch::headeronly::toString(type);
  }
}

inline DType dtype_of_tensor(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Float8_e4m3fn:
      return DType::e4m3;
    default:
      throw std::logic_error(concat("tranche: dtype ", dtype_text(tensor.scalar_type()), " was not checked"));
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// ---- checking tensors

class TensorChecks : public Checks {
 public:
  using Checks::Checks;

  void dtype(Phrase name, const Tensor& tensor, std::initializer_list<ScalarType> allowed) const {
    for (ScalarType type : allowed) {
      if (tensor.scalar_type() == type) return;
    }
    std::string names;
    for (ScalarType type : allowed) names += std::string(names.empty() ? "" : " or ") + dtype_text(type);
    that(false, concat(name, " of dtype ", names), dtype_text(tensor.scalar_type()),
         concat("Convert it with ", name, ".to(", dtype_text(*allowed.begin()), ")."));
  }

  void dim(Phrase name, const Tensor& tensor, int64_t dims, const char* shape) const {
    that(tensor.dim() == dims, concat(name, " of shape ", shape), shape_text(tensor),
         concat("Reshape ", name, " to ", dims, " dimensions."));
  }

  void same_device(Phrase name, const Tensor& tensor, Phrase other_name, const Tensor& other) const {
    const bool same = tensor.is_cuda() == other.is_cuda() && tensor.is_cpu() == other.is_cpu() &&
                      tensor.get_device_index() == other.get_device_index();
    that(same, concat(name, " on the device of ", other_name), "another device",
         concat("Move it with ", name, ".to(", other_name, ".device)."));
  }

  // The first `dims` sizes of two tensors.
  void same_sizes(Phrase name, const Tensor& tensor, Phrase other_name, const Tensor& other, int64_t dims,
                  Phrase remedy) const {
    for (int64_t d = 0; d < dims; ++d) {
      equal(concat(name, ".size(", d, ")"), tensor.size(d), concat(other_name, ".size(", d, ")"),
            other.size(d), remedy);
    }
  }

  void last_contiguous(Phrase name, const Tensor& tensor) const {
    const int64_t last = tensor.dim() - 1;
    that(tensor.size(last) <= 1 || tensor.stride(last) == 1, concat(name, ".stride(-1) == 1"),
         tensor.stride(last), concat("Call ", name, ".contiguous()."));
  }

  void contiguous(Phrase name, const Tensor& tensor) const {
    that(tensor.is_contiguous(), concat("a contiguous ", name), "a strided view",
         concat("Call ", name, ".contiguous()."));
  }

  // A small index or table tensor: its dtype, its exact shape, its device, no gaps.
  void exactly(Phrase name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> shape,
               const char* shape_name, Phrase other_name, const Tensor& other) const {
    dtype(name, tensor, {type});
    if (!has_shape(tensor, shape)) {
      std::ostringstream sizes;
      for (const int64_t& size : shape) sizes << (&size == shape.begin() ? "" : ", ") << size;
      that(false, concat(name, " of shape ", shape_name, " = [", sizes.str(), "]"), shape_text(tensor),
           concat("The sizes follow from ", other_name, "."));
    }
    same_device(name, tensor, other_name, other);
    contiguous(name, tensor);
  }

 private:
  static bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
    if (tensor.dim() != int64_t(shape.size())) return false;
    int64_t i = 0;
    for (int64_t size : shape) {
      if (tensor.size(i++) != size) return false;
    }
    return true;
  }
};

// Whether values that only the device sees are read and checked: always on the CPU, and elsewhere when
// TRANCHE_CHECK=1 asks for it at the price of a synchronisation.
inline bool checks_values() {
#if defined(TRANCHE_BACKEND_CPU)
  return true;
#else
  const char* setting = std::getenv("TRANCHE_CHECK");
  return setting != nullptr && std::strcmp(setting, "1") == 0;
#endif
}

// The values of a device tensor on the host, row-major.
template <class T>
class HostValues {
 public:
  explicit HostValues(const Tensor& tensor)
      : host_(torch::stable::contiguous(
            tensor.is_cpu()
                ? tensor
                : torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU)))),
        values_(data<T>(host_)) {}
  T operator[](int64_t i) const { return values_[i]; }

 private:
  Tensor host_;
  const T* values_;
};

// ---- allocating

// Not by way of new_empty: that is an op, which the dispatcher looks up by name.
inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  constexpr size_t kMostDims = 8;
  int64_t strides[kMostDims], step = 1;
  if (shape.size() > kMostDims) throw std::logic_error("tranche: empty_on: at most 8 dimensions");
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    step *= shape.begin()[i] > 1 ? shape.begin()[i] : 1;
  }
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.begin(), strides, int32_t(type), device, like.get_device_index(), &made));
  return Tensor(made);
}

// As above, filled with zeros on the current stream (on CUDA a launch of its own: for counters, not for
// data).
inline Tensor zeros_on(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_zeros(like, {shape.begin(), shape.size()}, type);
}

// ---- calling a kernel and registering an op

// KERNEL(name): the backend's host function. RUN_KERNEL(name, params, tensors...): its kernel, on the device
// of the first tensor and torch's current stream there. The tensors are all that the kernel may touch: the
// simulator holds it to that.
#if defined(TRANCHE_BACKEND_CPU)

#define KERNEL(name) ::tranche::cpu::name
#define RUN_KERNEL(name, params, ...) KERNEL(name)(params)

#elif defined(TRANCHE_BACKEND_CUDA)

inline void* current_stream(int32_t device_index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

#define KERNEL(name) ::tranche::cuda::name
#define RUN_KERNEL(name, params, first, ...)                                         \
  do {                                                                               \
    const torch::stable::accelerator::DeviceGuard guard((first).get_device_index()); \
    KERNEL(name)(params, ::tranche::current_stream((first).get_device_index()));     \
  } while (false)

#else

// The memory of some tensors, from the first to the last element that each can reach.
class SimulatedMemory {
 public:
  template <class... Tensors>
  explicit SimulatedMemory(const Tensors&... tensors) {
    (add(tensors), ...);
  }

 private:
  void add(const std::optional<Tensor>& tensor) {
    if (tensor) add(*tensor);
  }
  void add(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) add(tensor);
  }
  void add(const Tensor& tensor) {
    if (tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    buffers_.push_back(
        std::make_unique<sim::Buffer>(tensor.const_data_ptr(), size_t(last + 1) * tensor.element_size()));
  }

  std::vector<std::unique_ptr<sim::Buffer> > buffers_;
};

#define KERNEL(name) ::tranche::cuda::name
#define RUN_KERNEL(name, params, ...)                     \
  do {                                                    \
    const ::tranche::SimulatedMemory memory(__VA_ARGS__); \
    KERNEL(name)(params, nullptr);                        \
  } while (false)

#endif

}  // namespace tranche

// REGISTER_OP(name, "(Tensor x) -> Tensor") after the function `name` is defined.
#if defined(TRANCHE_BACKEND_CPU)
#define REGISTER_OP(name, signature)                                    \
  STABLE_TORCH_LIBRARY_FRAGMENT(tranche, m) { m.def(#name signature); } \
  STABLE_TORCH_LIBRARY_IMPL(tranche, CPU, m) { m.impl(#name, TORCH_BOX(&name)); }
#elif defined(TRANCHE_BACKEND_CUDA)
#define REGISTER_OP(name, signature) \
  STABLE_TORCH_LIBRARY_IMPL(tranche, CUDA, m) { m.impl(#name, TORCH_BOX(&name)); }
#else
#define REGISTER_OP(name, signature)                                        \
  STABLE_TORCH_LIBRARY_FRAGMENT(tranche_sim, m) { m.def(#name signature); } \
  STABLE_TORCH_LIBRARY_IMPL(tranche_sim, CPU, m) { m.impl(#name, TORCH_BOX(&name)); }
#endif
