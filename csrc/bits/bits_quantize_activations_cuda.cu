#include "bits/bits_quantize_activations.cuh"

namespace tranche::cuda {

void bits_quantize_activations(const BitsQuantizeActivationsParams& p, void* stream) {
  launch("bits_quantize_activations", bits_quantize_activations_kernel,
         {dim3(unsigned(p.padded_rows)), dim3(kQuantizeThreads)}, stream, p);
}

}  // namespace tranche::cuda
