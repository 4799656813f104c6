// tranche::partial_conv2d, partial_conv2d_, conv2d_slice and conv2d_pack: schemas, checks, allocation.
#include "pconv/image_glue.h"
#include "pconv/partial_conv2d_glue.h"

namespace tranche {
namespace {

using IntList = std::vector<int64_t>;

// The arguments of one call by their public names.
struct Arguments {
  const Tensor &x, &weight;
  const std::optional<Tensor>& bias;
  const IntList &stride, &padding, &dilation;
  int64_t groups, start;
};

void check_pair(const TensorChecks& check, Phrase name, const IntList& values, int64_t low) {
  const char* remedy = "Give one for the height and one for the width.";
  check.that(values.size() == 2, concat(name, " of two integers"), concat(values.size(), " of them"), remedy);
  for (int64_t value : values) {
    check.that(value >= low && value <= INT32_MAX, concat(name, " of two integers >= ", low), value, remedy);
  }
}

// What is to be known of the weight alone; `like`, called `name`, has its dtype and device.
void check_weight(const TensorChecks& check, const Arguments& a, Phrase name, const Tensor& like) {
  check_floats(check, name, like);
  check.dim("weight", a.weight, 4, "[c_out, c / groups, kh, kw]");
  check.dtype("weight", a.weight, {like.scalar_type()});
  check.same_device("weight", a.weight, name, like);
  for (int i = 0; i < 4; ++i) {
    check.that(a.weight.size(i) <= INT32_MAX, "sizes of weight below 2^31", shape_text(a.weight),
               "Cut the weight in pieces.");
  }
  check.that(a.weight.numel() > 0, "a weight with elements", shape_text(a.weight),
             "Give at least one channel.");
  check_pair(check, "stride", a.stride, 1);
  check_pair(check, "padding", a.padding, 0);
  check_pair(check, "dilation", a.dilation, 1);
  check.that(a.groups > 0 && a.weight.size(0) % a.groups == 0,
             concat("groups >= 1 that divides weight.size(0) (", a.weight.size(0), ")"), a.groups,
             "Every group has as many output channels.");
  if (a.bias) {
    check.exactly("bias", *a.bias, like.scalar_type(), {a.weight.size(0)}, "[c_out]", name, like);
  }
}

void check_arguments(const TensorChecks& check, const Arguments& a) {
  check_image_shape(check, a.x);
  check_weight(check, a, "x", a.x);
  const int64_t width = a.weight.size(1) * a.groups;
  check.that(a.start >= 0 && a.start + width <= a.x.size(1),
             concat("start in [0, x.size(1) - c] = [0, ", a.x.size(1) - width, "]"), a.start,
             concat("The slice of c = groups * weight.size(1) = ", width, " channels must lie within x."));
}

int64_t output_size(const TensorChecks& check, const Arguments& a, int i) {
  const int64_t reach = (a.weight.size(2 + i) - 1) * a.dilation[size_t(i)] + 1;
  const int64_t room = a.x.size(2 + i) + 2 * a.padding[size_t(i)] - reach;
  check.that(room >= 0 && room <= INT32_MAX,
             concat("x.size(", 2 + i, ") + padding that holds the kernel's reach ", reach), a.x.size(2 + i),
             "Pad more, or use a smaller kernel or dilation.");
  return room / a.stride[size_t(i)] + 1;
}

// The shape stays, channels included: what partial_conv2d needs beyond the above.
void check_same_shape(const TensorChecks& check, const Arguments& a) {
  check.equal("weight.size(0)", a.weight.size(0), "groups * weight.size(1)", a.groups * a.weight.size(1),
              "A partial convolution keeps its channels; use conv2d_slice.");
  for (int i = 0; i < 2; ++i) {
    if (a.x.size(2 + i) == 0) continue;
    check.equal(concat(i ? "width" : "height", " of the output"), output_size(check, a, i),
                concat("x.size(", 2 + i, ")"), a.x.size(2 + i),
                "Use stride 1 and padding (kernel - 1) * dilation / 2, or conv2d_slice.");
  }
}

// What the kernels know of the weight.
PartialConv2dParams weight_params(const Arguments& a, const Tensor& weight) {
  PartialConv2dParams p{};
  p.weight = weight.const_data_ptr();
  p.bias = a.bias ? a.bias->const_data_ptr() : nullptr;
  p.c_in = int32_t(a.weight.size(1) * a.groups);
  p.c_out = int32_t(a.weight.size(0));
  p.groups = int32_t(a.groups);
  for (int i = 0; i < 2; ++i) {
    p.kernel[i] = int32_t(a.weight.size(2 + i));
    p.stride[i] = int32_t(a.stride[size_t(i)]);
    p.padding[i] = int32_t(a.padding[size_t(i)]);
    p.dilation[i] = int32_t(a.dilation[size_t(i)]);
  }
  p.type = dtype_of_tensor(weight);
  return p;
}

PartialConv2dParams make_params(const Arguments& a, const Tensor& weight, const Tensor& y) {
  PartialConv2dParams p = weight_params(a, weight);
  p.x = a.x.const_data_ptr();
  for (int i = 0; i < 4; ++i) {
    p.x_stride[i] = a.x.stride(i);
    p.y_stride[i] = y.stride(i);
  }
  p.batch = int32_t(a.x.size(0));
  p.channels = int32_t(a.x.size(1));
  p.height = a.x.size(2);
  p.width = a.x.size(3);
  p.out_height = y.size(2);
  p.out_width = y.size(3);
  p.start = int32_t(a.start);
  return p;
}

Tensor partial_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      IntList stride, IntList padding, IntList dilation, int64_t groups, int64_t start,
                      const std::optional<Tensor>& packed) {
  const TensorChecks check("partial_conv2d");
  const Arguments a{x, weight, bias, stride, padding, dilation, groups, start};
  check_arguments(check, a);
  check_same_shape(check, a);
  Tensor y = torch::stable::empty_like(x);
  const Tensor dense = torch::stable::contiguous(weight);
  PartialConv2dParams params = make_params(a, dense, y);
  params.packed = checked_packed(check, "packed", packed, dense, params);
  if (y.numel() == 0) return y;
  params.y = y.mutable_data_ptr();
  params.y_start = int32_t(start);
  params.copies = true;
  run_conv2d(params, x, dense, bias, y);
  return y;
}

// No two elements of x may share memory: strides in ascending order, each beyond what those before can reach.
void check_no_overlap(const TensorChecks& check, const Tensor& x) {
  int order[4] = {0, 1, 2, 3};
  for (int i = 1; i < 4; ++i) {
    for (int j = i; j > 0 && x.stride(order[j]) < x.stride(order[j - 1]); --j) {
      const int swapped = order[j];
      order[j] = order[j - 1];
      order[j - 1] = swapped;
    }
  }
  int64_t reach = 0;  // of the dimensions so far
  for (int i : order) {
    if (x.size(i) <= 1) continue;
    check.that(x.stride(i) > reach, "an x whose elements do not share memory",
               concat("stride ", x.stride(i), " in dimension ", i), "Writing in place needs x.contiguous().");
    reach += (x.size(i) - 1) * x.stride(i);
  }
}

void check_apart(const TensorChecks& check, Phrase name, const Tensor& tensor, const Tensor& x) {
  const auto reach = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    return (last + 1) * int64_t(t.element_size());
  };
  const char* low = static_cast<const char*>(tensor.const_data_ptr());
  const char* x_low = static_cast<const char*>(x.const_data_ptr());
  check.that(low + reach(tensor) <= x_low || x_low + reach(x) <= low,
             concat(name, " outside the memory of x"), "memory that x covers",
             concat("x is overwritten; pass ", name, ".clone()."));
}

void partial_conv2d_(Tensor x, const Tensor& weight, const std::optional<Tensor>& bias, IntList stride,
                     IntList padding, IntList dilation, int64_t groups, int64_t start,
                     const std::optional<Tensor>& packed) {
  const TensorChecks check("partial_conv2d_");
  const Arguments a{x, weight, bias, stride, padding, dilation, groups, start};
  check_arguments(check, a);
  check_same_shape(check, a);
  const Tensor dense = torch::stable::contiguous(weight);
  PartialConv2dParams params = make_params(a, dense, x);
  params.packed = checked_packed(check, "packed", packed, dense, params);
  if (x.numel() == 0) return;
  check_no_overlap(check, x);
  check_apart(check, "weight", weight, x);
  if (bias) check_apart(check, "bias", *bias, x);
  if (packed) check_apart(check, "packed", *packed, x);
  params.y = x.mutable_data_ptr();
  params.y_start = int32_t(start);
  params.in_place = true;
  run_conv2d(params, x, dense, bias, x);
}

Tensor conv2d_slice(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntList stride,
                    IntList padding, IntList dilation, int64_t groups, int64_t start,
                    const std::optional<Tensor>& packed) {
  const TensorChecks check("conv2d_slice");
  const Arguments a{x, weight, bias, stride, padding, dilation, groups, start};
  check_arguments(check, a);
  const int64_t height = output_size(check, a, 0), width = output_size(check, a, 1);
  const bool channels_last = !x.is_contiguous() && x.stride(1) == 1;
  Tensor y = channels_last
                 ? torch::stable::transpose(
                       torch::stable::transpose(
                           empty_on(x, {x.size(0), height, width, weight.size(0)}, x.scalar_type()), 2, 3),
                       1, 2)
                 : empty_on(x, {x.size(0), weight.size(0), height, width}, x.scalar_type());
  const Tensor dense = torch::stable::contiguous(weight);
  PartialConv2dParams params = make_params(a, dense, y);
  params.packed = checked_packed(check, "packed", packed, dense, params);
  if (y.numel() == 0) return y;
  params.y = y.mutable_data_ptr();
  run_conv2d(params, x, dense, bias, y);
  return y;
}

Tensor conv2d_pack(const Tensor& weight, const std::optional<Tensor>& bias, IntList stride, IntList dilation,
                   int64_t groups) {
  const TensorChecks check("conv2d_pack");
  const IntList padding{0, 0};
  const Arguments a{weight, weight, bias, stride, padding, dilation, groups, 0};
  check_weight(check, a, "weight", weight);
#if defined(TRANCHE_BACKEND_CPU)
  const Tensor dense = torch::stable::contiguous(weight);
  PartialConv2dParams p = packing_params(weight_params(a, dense));
  const Tensor packed = packing_of(check, dense, p).make(packed_bytes(p));
  const Tensor workspace = empty_on(weight, {int64_t(KERNEL(partial_conv2d_workspace)(p))}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  p.packed = Packing::weights(packed);
  KERNEL(partial_conv2d_pack)(p);
  return packed;
#else
  return empty_on(weight, {0}, ScalarType::Byte);
#endif
}

#define TRANCHE_CONV_ARGUMENTS                                                            \
  "Tensor weight, Tensor? bias=None, SymInt[2] stride=[1, 1], SymInt[2] padding=[0, 0], " \
  "SymInt[2] dilation=[1, 1], SymInt groups=1, SymInt start=0, Tensor? packed=None"

REGISTER_OP(partial_conv2d, "(Tensor x, " TRANCHE_CONV_ARGUMENTS ") -> Tensor")
REGISTER_OP(partial_conv2d_, "(Tensor(a!) x, " TRANCHE_CONV_ARGUMENTS ") -> ()")
REGISTER_OP(conv2d_slice, "(Tensor x, " TRANCHE_CONV_ARGUMENTS ") -> Tensor")
REGISTER_OP(conv2d_pack,
            "(Tensor weight, Tensor? bias=None, SymInt[2] stride=[1, 1], SymInt[2] dilation=[1, 1], "
            "SymInt groups=1) -> Tensor")

}  // namespace
}  // namespace tranche
