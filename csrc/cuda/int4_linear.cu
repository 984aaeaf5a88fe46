#include "packed_linear_op.h"

namespace compressops {
namespace {

// W4A16. x is read where it is if the kernel can fetch its rows 16 bytes at a time.
template <class T, class Input>
void multiply_as_is(const PackedLinearCall& call) {
  const Global<const T> x = static_cast<const T*>(call.rows.const_data_ptr());
  constexpr bool kSame = std::is_same_v<T, Input>;
  if constexpr (kSame) {
    if (call.K % 8 == 0 && call.row_stride % 8 == 0 && misalignment(x, 16) == 0) {
      multiply_packed<4, Input>(call, x, call.row_stride, call.K, 1, nullptr);
      return;
    }
  }
  const int64_t parts = kSame ? 1 : 3, columns = ceil_div<int64_t>(call.K, 8) * 8;
  const Tensor packed =
      torch::stable::new_empty(call.rows, {parts, call.M, columns}, ScalarType::Half);  // 16 bits
  check_cuda(launch_pack_rows<T, Input>(
                 x, call.row_stride, call.M, call.K, columns, data_of<Input>(packed),
                 multiprocessor_count(call.rows, call.op), current_stream(call.rows, call.op)),
             call.op);
  multiply_packed<4, Input>(call, data_of<Input>(packed), columns, columns, parts, nullptr);
}

Tensor int4_linear(const Tensor& x, const Tensor& weight, const Tensor& scales,
                   const OptionalTensor& zeros, int64_t out_features,
                   std::optional<int64_t> group_size, const OptionalTensor& bias,
                   const std::string& activation, bool quantize_x) {
  return run_packed_linear<4>("int4_linear", x, weight, scales, zeros, out_features, group_size,
                              bias, activation, [&](const PackedLinearCall& call) {
                                if (quantize_x) return multiply_quantized<4>(call);
                                switch (x.scalar_type()) {
                                  case ScalarType::Half:
                                    return multiply_as_is<__half, __half>(call);
                                  case ScalarType::BFloat16:
                                    return multiply_as_is<__nv_bfloat16, __nv_bfloat16>(call);
                                  default:
                                    return multiply_as_is<float, __nv_bfloat16>(call);
                                }
                              });
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("int4_linear", TORCH_BOX(&compressops::int4_linear));
}
