// tranche::conv2d_slice_weight_grad: schema, checks, allocation.
#include "pconv/conv2d_slice_weight_grad.h"

#include "pconv/image_glue.h"

namespace tranche {
namespace {

using IntList = std::vector<int64_t>;

void check_list(const TensorChecks& check, Phrase name, const IntList& values, size_t count, int64_t low,
                Phrase remedy) {
  check.that(values.size() == count, concat(name, " of ", count, " integers"),
             concat(values.size(), " of them"), remedy);
  for (int64_t value : values) {
    check.that(value >= low && value <= INT32_MAX, concat(name, " of ", count, " integers >= ", low), value,
               remedy);
  }
}

// What a convolution of x with such a weight has in dimension 2 + i.
void check_output_size(const TensorChecks& check, const Tensor& grad_y, const Tensor& x, int64_t kernel,
                       int64_t stride, int64_t padding, int64_t dilation, int i) {
  if (x.size(2 + i) == 0 && grad_y.size(2 + i) == 0) return;  // as partial_conv2d has it
  const int64_t reach = (kernel - 1) * dilation + 1, room = x.size(2 + i) + 2 * padding - reach;
  check.that(room >= 0, concat("x.size(", 2 + i, ") + padding that holds the kernel's reach ", reach),
             x.size(2 + i), "Pad more, or use a smaller kernel or dilation.");
  check.equal(concat("grad_y.size(", 2 + i, ")"), grad_y.size(2 + i), "the size of the convolution's output",
              room / stride + 1, "Give the gradient of conv2d_slice's result.");
}

Tensor conv2d_slice_weight_grad(const Tensor& grad_y, const Tensor& x, IntList weight_size, IntList stride,
                                IntList padding, IntList dilation, int64_t groups, int64_t start) {
  const TensorChecks check("conv2d_slice_weight_grad");
  check_images(check, x);
  check.dim("grad_y", grad_y, 4, "[B, c_out, H', W']");
  check.dtype("grad_y", grad_y, {x.scalar_type()});
  check.same_device("grad_y", grad_y, "x", x);
  for (int i = 0; i < 4; ++i) {
    check.that(grad_y.size(i) <= INT32_MAX, "sizes of grad_y below 2^31", shape_text(grad_y),
               "Cut the input in pieces.");
  }
  check_list(check, "weight_size", weight_size, 4, 1, "It is [c_out, c / groups, kh, kw].");
  const char* remedy = "Give one for the height and one for the width.";
  check_list(check, "stride", stride, 2, 1, remedy);
  check_list(check, "padding", padding, 2, 0, remedy);
  check_list(check, "dilation", dilation, 2, 1, remedy);
  check.that(groups > 0 && weight_size[0] % groups == 0,
             concat("groups >= 1 that divides weight_size[0] (", weight_size[0], ")"), groups,
             "Every group has as many output channels.");
  check.equal("grad_y.size(0)", grad_y.size(0), "x.size(0)", x.size(0), "They are of the same images.");
  check.equal("grad_y.size(1)", grad_y.size(1), "weight_size[0]", weight_size[0],
              "Give the gradient of the convolved slice alone.");
  check.that(groups <= INT32_MAX / weight_size[1], "groups * weight_size[1] below 2^31",
             concat(groups, " * ", weight_size[1]), "No x has as many channels.");
  const int64_t width = weight_size[1] * groups;
  check.that(start >= 0 && start + width <= x.size(1),
             concat("start in [0, x.size(1) - c] = [0, ", x.size(1) - width, "]"), start,
             concat("The slice of c = groups * weight_size[1] = ", width, " channels must lie within x."));
  for (int i = 0; i < 2; ++i) {
    const size_t at = size_t(i);
    check_output_size(check, grad_y, x, weight_size[2 + at], stride[at], padding[at], dilation[at], i);
  }
  if (grad_y.numel() == 0) {
    return zeros_on(x, {weight_size[0], weight_size[1], weight_size[2], weight_size[3]}, x.scalar_type());
  }
  const Tensor grad_weight =
      empty_on(x, {weight_size[0], weight_size[1], weight_size[2], weight_size[3]}, x.scalar_type());
  Conv2dSliceWeightGradParams p{};
  p.x = x.const_data_ptr();
  p.grad_y = grad_y.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) {
    p.x_stride[i] = x.stride(i);
    p.y_stride[i] = grad_y.stride(i);
  }
  p.batch = int32_t(x.size(0));
  p.height = x.size(2);
  p.width = x.size(3);
  p.out_height = grad_y.size(2);
  p.out_width = grad_y.size(3);
  p.start = int32_t(start);
  p.c_in = int32_t(width);
  p.c_out = int32_t(weight_size[0]);
  p.groups = int32_t(groups);
  for (int i = 0; i < 2; ++i) {
    const size_t at = size_t(i);
    p.kernel[i] = int32_t(weight_size[2 + at]);
    p.stride[i] = int32_t(stride[at]);
    p.padding[i] = int32_t(padding[at]);
    p.dilation[i] = int32_t(dilation[at]);
  }
  p.type = dtype_of_tensor(x);
  const Tensor workspace =
      empty_on(x, {int64_t(KERNEL(conv2d_slice_weight_grad_workspace)(p))}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(conv2d_slice_weight_grad, p, x, grad_y, grad_weight, workspace);
  return grad_weight;
}

REGISTER_OP(
    conv2d_slice_weight_grad,
    "(Tensor grad_y, Tensor x, SymInt[4] weight_size, SymInt[2] stride=[1, 1], SymInt[2] padding=[0, 0], "
    "SymInt[2] dilation=[1, 1], SymInt groups=1, SymInt start=0) -> Tensor")

}  // namespace
}  // namespace tranche
