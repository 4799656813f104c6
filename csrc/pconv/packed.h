// Weights that were put in order once: an opaque uint8 tensor, its first bytes what it was made for.
//
// The order is that of the CPU's products, so it depends on the instruction set. On CUDA and in the simulator
// weights are read as they lie: packing gives a tensor without elements, and such a one is taken everywhere.
#pragma once

#include "core/isa.h"
#include "core/torch_glue.h"

namespace tranche {

struct PackedHeader {
  static constexpr int32_t kLayout = 4;  // raise it when any product wants its weights in another order

  char mark[8] = {'t', 'r', 'a', 'n', 'c', 'h', 'e', 0};
  int64_t bytes = 0;  // that follow
  int32_t layout = kLayout;
  int32_t isa = 0, type = 0;
  int32_t sizes[9] = {};  // of the weights; ops give different numbers of them, none of which is 0
};
static_assert(sizeof(PackedHeader) == 64, "what follows is aligned like the kernels' own memory");

// Weights of one op on their way into a packed tensor or out of it.
class Packing {
 public:
  Packing(const TensorChecks& check, const char* maker, const Tensor& weight,
          std::initializer_list<int64_t> sizes)
      : check_(check), maker_(maker), weight_(weight) {
#if defined(TRANCHE_BACKEND_CPU)
    header_.isa = int32_t(isa());
#endif
    header_.type = int32_t(dtype_of_tensor(weight));
    int i = 0;
    for (int64_t size : sizes) header_.sizes[i++] = int32_t(size);
  }

  // A new tensor for `bytes` of weights, the header filled in.
  Tensor make(int64_t bytes) {
    const Tensor packed = empty_on(weight_, {int64_t(sizeof header_) + bytes}, ScalarType::Byte);
    std::memset(packed.mutable_data_ptr(), 0, size_t(packed.numel()));  // gaps too have bytes of their own
    header_.bytes = bytes;
    std::memcpy(packed.mutable_data_ptr(), &header_, sizeof header_);
    return packed;
  }
  static void* weights(const Tensor& packed) {
    return const_cast<char*>(data<char>(packed)) + sizeof(PackedHeader);
  }

  // The weights in `packed`, an argument called `name`, or null where there are none. They are `bytes()`
  // long.
  template <class F>
  void* checked(Phrase name, const std::optional<Tensor>& packed, [[maybe_unused]] const F& bytes) const {
    if (!packed) return nullptr;
    check_.same_device(name, *packed, "the weights", weight_);
    if (packed->numel() == 0) return nullptr;
    check_.dtype(name, *packed, {ScalarType::Byte});
#if defined(TRANCHE_BACKEND_CPU)
    const auto remedy =
        concat("Make it anew with tranche.pconv.", maker_, " on this machine, or leave it out.");
    check_.contiguous(name, *packed);
    PackedHeader got;
    const int64_t there = packed->numel() - int64_t(sizeof got);
    if (there >= 0) std::memcpy(&got, packed->const_data_ptr(), sizeof got);
    check_.that(there == got.bytes && std::memcmp(got.mark, header_.mark, sizeof got.mark) == 0,
                concat(name, " made by ", maker_), "other bytes", remedy);
    check_.that(
        got.isa == header_.isa && got.layout == header_.layout,
        concat(name, " made for instruction set ", isa_name(Isa(header_.isa)), ", layout ", header_.layout),
        concat(isa_name(Isa(got.isa)), ", layout ", got.layout), remedy);
    check_.that(got.type == header_.type && std::memcmp(got.sizes, header_.sizes, sizeof got.sizes) == 0,
                concat(name, " made of these weights"),
                "that of others, by dtype, sizes, stride, dilation or groups", remedy);
    const int64_t wanted = bytes();
    check_.that(there == wanted, concat(name, " with ", wanted, " bytes of weights"), there, remedy);
    return weights(*packed);
#else
    check_.that(false, concat(name, " without elements"), shape_text(*packed),
                concat("Weights are packed on the CPU only; leave ", name, " out."));
    return nullptr;
#endif
  }

 private:
  const TensorChecks check_;
  const char* const maker_;
  const Tensor& weight_;
  PackedHeader header_;
};

}  // namespace tranche
