#include "bsr_grad_values.cuh"
#include "bsr_op.h"

namespace compressops {
namespace {

constexpr const char* kOp = "bsr_linear_grad_values";

Tensor bsr_linear_grad_values(const Tensor& grad, const Tensor& x, const Tensor& crow_indices,
                              const Tensor& col_indices, std::vector<int64_t> block_size) {
  COMPRESSOPS_CHECK(grad.is_cuda() && grad.dim() >= 1 && is_float_dtype(grad), kOp, "grad",
                    "a CUDA float32, float16 or bfloat16 tensor [..., N]", grad);
  bool fits = same_device(x, grad) && x.scalar_type() == grad.scalar_type();
  fits = fits && x.dim() == grad.dim();
  for (int64_t i = 0; fits && i + 1 < x.dim(); ++i) fits = x.size(i) == grad.size(i);
  COMPRESSOPS_CHECK(fits, kOp, "x", "on grad's device, of its dtype [..., K], with as many rows",
                    x);
  COMPRESSOPS_CHECK(block_size.size() == 2, kOp, "block_size", "two multiples of 16",
                    std::to_string(block_size.size()) + " integers");
  for (int64_t side : block_size) {
    COMPRESSOPS_CHECK(side >= kBsrCell && side <= 1 << 30 && side % kBsrCell == 0, kOp,
                      "block_size", "two multiples of 16 up to 2^30", side);
  }
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  const int64_t N = grad.size(grad.dim() - 1), K = x.size(x.dim() - 1);
  const int64_t nnz = col_indices.dim() == 1 ? col_indices.size(0) : 0;
  const int64_t rows = ceil_div(N, block_size[0]);
  const Tensor crow = checked_index(kOp, crow_indices, "crow_indices", rows + 1, grad);
  const Tensor col = checked_index(kOp, col_indices, "col_indices", nnz, grad);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const Tensor result =
      torch::stable::new_empty(grad, {nnz, block_size[0], block_size[1]}, ScalarType::Float);
  with_element_type(grad, [&](auto element) {
    using T = decltype(element);
    const BsrRows left = bsr_rows<T>(kOp, grad, M, N), right = bsr_rows<T>(kOp, x, M, K);
    BsrGradValuesArgs<T> args{};
    args.M = M, args.N = N, args.K = K;
    args.grad = data_of<T>(left.memory), args.x = data_of<T>(right.memory);
    args.grad_stride = left.stride, args.x_stride = right.stride;
    args.grad_columns = left.columns, args.x_columns = right.columns;
    args.nnz = nnz, args.r = block_size[0], args.c = block_size[1];
    args.rows = rows;
    args.crow = data_of<int>(crow), args.columns = data_of<int>(col);
    args.result = data_of<float>(result);
    check_cuda(launch_bsr_grad_values(args, current_stream(grad, kOp)), kOp);
  });
  return result;
}

}  // namespace
}  // namespace compressops

STABLE_TORCH_LIBRARY_IMPL(compressops_native, CUDA, m) {
  m.impl("bsr_linear_grad_values", TORCH_BOX(&compressops::bsr_linear_grad_values));
}
