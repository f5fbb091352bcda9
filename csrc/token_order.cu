// CUDA registration of the token-order ops: current stream, device guard, launch check. Compiled by plain nvcc against
// PyTorch's stable headers, beside a CPU-only torch too.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#define HIERA_LAUNCH(kernel, blocks, threads, stream, ...)                                        \
  do {                                                                                            \
    kernel<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__);                                    \
    hiera_kernels::check_launch(cudaGetLastError());                                              \
  } while (false)
#define HIERA_TRAP() __trap()

namespace hiera_kernels {
inline void check_launch(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("hiera_kernels: CUDA launch failed: ") + cudaGetErrorString(error));
}
}  // namespace hiera_kernels

#include "embed_tokens.cuh"
#include "token_order.cuh"
#include "token_order_ops.h"

// In libtorch_cuda. Weak, so that a library that was built with CUDA loads beside a torch without it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace hiera_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

// The weak symbol is bound when the library loads; a libtorch_cuda that the loader did not search is asked by name.
cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    if (aoti_torch_get_current_cuda_stream != nullptr) return static_cast<Getter>(&aoti_torch_get_current_cuda_stream);
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library == nullptr ? nullptr : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "hiera_kernels: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "hiera_kernels: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

Tensor unroll_cuda(Tensor x, std::vector<int64_t> size, std::vector<int64_t> strides) {
  const TokenOrder order = checked_order(x, size, strides);
  const DeviceGuard guard(x.get_device_index());
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  cuda::launch_move(out.mutable_data_ptr(), x.const_data_ptr(), order.to_spatial, x.size(0), order.tokens,
                    x.size(2) * x.element_size(), current_stream(x.get_device_index()));
  return out;
}

Tensor reroll_cuda(Tensor x, std::vector<int64_t> size, std::vector<int64_t> strides) {
  const TokenOrder order = checked_order(x, size, strides);
  const DeviceGuard guard(x.get_device_index());
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, spatial_shape(x.size(0), size, x.size(2)));
  cuda::launch_move(out.mutable_data_ptr(), x.const_data_ptr(), order.to_unrolled, x.size(0), order.tokens,
                    x.size(2) * x.element_size(), current_stream(x.get_device_index()));
  return out;
}

// `keep` as lists on the device; empty tensors where there is none.
struct Links {
  Tensor first, next;
  const int32_t* first_data = nullptr;
  const int32_t* next_data = nullptr;

  Links(const Tensor& keep, const cuda::EmbedShape& shape, cudaStream_t stream)
      : first(torch::stable::new_empty(keep, {shape.batch, shape.windows}, ScalarType::Int)),
        next(torch::stable::new_empty(keep, {shape.batch, shape.kept}, ScalarType::Int)) {
    auto* first_out = static_cast<int32_t*>(first.mutable_data_ptr());
    auto* next_out = static_cast<int32_t*>(next.mutable_data_ptr());
    cuda::launch_link_kept(static_cast<const int64_t*>(keep.const_data_ptr()), shape, first_out, next_out, stream);
    first_data = first_out;
    next_data = next_out;
  }
};

Tensor embed_tokens_cuda(Tensor patches, Tensor position, std::vector<int64_t> size, std::vector<int64_t> strides,
                         std::optional<Tensor> keep) {
  const TokenOrder order = checked_embed(patches, position, size, strides, keep);
  const int32_t device = patches.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const bool channels_last = is_channels_last(patches);
  if (!channels_last) patches = torch::stable::contiguous(patches);
  position = torch::stable::contiguous(position);
  if (keep.has_value()) keep = torch::stable::contiguous(*keep);
  const cuda::EmbedShape shape = cuda::embed_shape(order, patches.size(0), patches.size(1),
                                                   keep.has_value() ? keep->size(1) : -1, channels_last);
  Tensor out = torch::stable::new_empty(position, {shape.batch, shape.rows(), shape.channels});
  if (out.numel() == 0) return out;
  std::optional<Links> links;
  if (keep.has_value() && !channels_last) links.emplace(*keep, shape, stream);
  dispatch_embed(patches.scalar_type(), position.scalar_type(), [&](auto p, auto e) {
    using P = decltype(p);
    using E = decltype(e);
    using O = Sum<P, E>;
    cuda::launch_embed<P, E, O>(static_cast<O*>(out.mutable_data_ptr()), static_cast<const P*>(patches.const_data_ptr()),
                                static_cast<const E*>(position.const_data_ptr()),
                                keep.has_value() ? static_cast<const int64_t*>(keep->const_data_ptr()) : nullptr,
                                links.has_value() ? links->first_data : nullptr,
                                links.has_value() ? links->next_data : nullptr, order, shape, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> embed_tokens_backward_cuda(Tensor grad, std::vector<int64_t> size, std::vector<int64_t> strides,
                                                      std::optional<Tensor> keep, ScalarType patches_dtype,
                                                      ScalarType position_dtype, bool channels_last, bool need_patches,
                                                      bool need_position) {
  const TokenOrder order = checked_embed_backward(grad, size, strides, keep, position_dtype);
  const int32_t device = grad.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  grad = torch::stable::contiguous(grad);
  if (keep.has_value()) keep = torch::stable::contiguous(*keep);
  const cuda::EmbedShape shape = cuda::embed_shape(order, grad.size(0), grad.size(2), keep.has_value() ? keep->size(1) : -1,
                                                   channels_last);
  std::optional<Links> links;
  if (keep.has_value()) links.emplace(*keep, shape, stream);
  int multiprocessors = 1;
  check_launch(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const cuda::BatchChunks cut = cuda::cut_batch(shape, need_position, multiprocessors);
  Tensor grad_patches = empty_patches(grad, shape.batch, shape.channels, size, patches_dtype, channels_last, need_patches);
  Tensor grad_position = empty_position(grad, order.tokens, shape.channels, position_dtype, need_position);
  dispatch_embed(patches_dtype, position_dtype, [&](auto p, auto e) {
    using P = decltype(p);
    using E = decltype(e);
    using G = Sum<P, E>;
    using A = cuda::Accumulator<G>;
    const ScalarType sums = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    Tensor partial = torch::stable::new_empty(grad, {need_position ? cut.chunks : 0, shape.tokens, shape.channels}, sums);
    cuda::launch_embed_backward<G, P, E>(need_patches ? static_cast<P*>(grad_patches.mutable_data_ptr()) : nullptr,
                                         need_position ? static_cast<E*>(grad_position.mutable_data_ptr()) : nullptr,
                                         static_cast<A*>(partial.mutable_data_ptr()),
                                         static_cast<const G*>(grad.const_data_ptr()),
                                         links.has_value() ? links->first_data : nullptr,
                                         links.has_value() ? links->next_data : nullptr, order, shape, cut, stream);
  });
  return {grad_patches, grad_position};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hiera_kernels, CUDA, m) {
  m.impl("unroll", TORCH_BOX(&unroll_cuda));
  m.impl("reroll", TORCH_BOX(&reroll_cuda));
  m.impl("embed_tokens", TORCH_BOX(&embed_tokens_cuda));
  m.impl("embed_tokens_backward", TORCH_BOX(&embed_tokens_backward_cuda));
}

}  // namespace hiera_kernels
