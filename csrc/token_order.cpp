// CPU kernels of the token-order ops and their registration. Schemas, argument checks and autograd are in Python
// (hiera_kernels/ops/token_order.py); what is checked here again is what would otherwise read out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "copy_rows.h"
#include "embed_rows.h"
#include "token_order.h"
#include "token_order_ops.h"

namespace hiera_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor unroll_cpu(Tensor x, std::vector<int64_t> size, std::vector<int64_t> strides) {
  const TokenOrder order = checked_order(x, size, strides);
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  move_rows(static_cast<char*>(out.mutable_data_ptr()), static_cast<const char*>(x.const_data_ptr()), order.to_spatial,
            order.to_unrolled, x.size(0), order.tokens, x.size(2) * x.element_size());
  return out;
}

Tensor reroll_cpu(Tensor x, std::vector<int64_t> size, std::vector<int64_t> strides) {
  const TokenOrder order = checked_order(x, size, strides);
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, spatial_shape(x.size(0), size, x.size(2)));
  move_rows(static_cast<char*>(out.mutable_data_ptr()), static_cast<const char*>(x.const_data_ptr()), order.to_unrolled,
            order.to_spatial, x.size(0), order.tokens, x.size(2) * x.element_size());
  return out;
}

Tensor embed_tokens_cpu(Tensor patches, Tensor position, std::vector<int64_t> size, std::vector<int64_t> strides,
                        std::optional<Tensor> keep) {
  const TokenOrder order = checked_embed(patches, position, size, strides, keep);
  const int64_t batch = patches.size(0), channels = patches.size(1);
  const bool channels_last = is_channels_last(patches);
  if (!channels_last) patches = torch::stable::contiguous(patches);
  position = torch::stable::contiguous(position);
  int64_t rows = order.tokens;
  std::optional<KeptUnits> kept;
  if (keep.has_value()) {
    const Tensor units = torch::stable::contiguous(*keep);
    kept.emplace(units.const_data_ptr<int64_t>(), batch, units.size(1), order.windows);
    rows = units.size(1) * order.unit;
  }
  const std::array<int64_t, 3> shape{batch, rows, channels};
  Tensor out = torch::stable::new_empty(position, {shape.data(), shape.size()});
  const EmbedShape embed{order, batch, channels, channels_last, kept.has_value() ? &*kept : nullptr};
  if (out.numel() == 0) return out;
  dispatch_embed(patches.scalar_type(), position.scalar_type(), [&](auto p, auto e) {
    using P = decltype(p);
    using E = decltype(e);
    using O = Sum<P, E>;
    embed_rows(embed, static_cast<const P*>(patches.const_data_ptr()), static_cast<const E*>(position.const_data_ptr()),
               static_cast<O*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor> embed_tokens_backward_cpu(Tensor grad, std::vector<int64_t> size, std::vector<int64_t> strides,
                                                     std::optional<Tensor> keep, ScalarType patches_dtype,
                                                     ScalarType position_dtype, bool channels_last, bool need_patches,
                                                     bool need_position) {
  const TokenOrder order = checked_embed_backward(grad, size, strides, keep, position_dtype);
  const int64_t batch = grad.size(0), channels = grad.size(2);
  grad = torch::stable::contiguous(grad);
  std::optional<KeptUnits> kept;
  if (keep.has_value()) {
    const Tensor units = torch::stable::contiguous(*keep);
    kept.emplace(units.const_data_ptr<int64_t>(), batch, units.size(1), order.windows);
  }
  Tensor grad_patches = empty_patches(grad, batch, channels, size, patches_dtype, channels_last, need_patches);
  Tensor grad_position = empty_position(grad, order.tokens, channels, position_dtype, need_position);
  const EmbedShape embed{order, batch, channels, channels_last, kept.has_value() ? &*kept : nullptr};
  dispatch_embed(patches_dtype, position_dtype, [&](auto p, auto e) {
    using P = decltype(p);
    using E = decltype(e);
    using G = Sum<P, E>;
    embed_rows_backward(embed, static_cast<const G*>(grad.const_data_ptr()),
                        need_patches ? static_cast<P*>(grad_patches.mutable_data_ptr()) : nullptr,
                        need_position ? static_cast<E*>(grad_position.mutable_data_ptr()) : nullptr);
  });
  return {grad_patches, grad_position};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hiera_kernels, CPU, m) {
  m.impl("unroll", TORCH_BOX(&unroll_cpu));
  m.impl("reroll", TORCH_BOX(&reroll_cpu));
  m.impl("embed_tokens", TORCH_BOX(&embed_tokens_cpu));
  m.impl("embed_tokens_backward", TORCH_BOX(&embed_tokens_backward_cpu));
}

}  // namespace hiera_kernels
