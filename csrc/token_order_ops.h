// What the CPU and the CUDA registrations share: shape checks and the allocation of results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <optional>
#include <vector>

#include "token_order.h"

namespace hiera_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline TokenOrder checked_grid(const std::vector<int64_t>& size, const std::vector<int64_t>& strides) {
  const TokenOrder order = make_token_order(size.data(), static_cast<int64_t>(size.size()), strides.data(),
                                            static_cast<int64_t>(strides.size()));
  STD_TORCH_CHECK(order.error == nullptr, "hiera_kernels: ", order.error != nullptr ? order.error : "");
  return order;
}

inline TokenOrder checked_order(const Tensor& x, const std::vector<int64_t>& size, const std::vector<int64_t>& strides) {
  const TokenOrder order = checked_grid(size, strides);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == order.tokens, "hiera_kernels: x must be [B, ", order.tokens, ", C]");
  return order;
}

inline std::vector<int64_t> spatial_shape(int64_t batch, const std::vector<int64_t>& size, int64_t channels) {
  std::vector<int64_t> shape{batch};
  shape.insert(shape.end(), size.begin(), size.end());
  shape.push_back(channels);
  return shape;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_keep(const std::optional<Tensor>& keep, const Tensor& beside) {
  if (!keep.has_value()) return;
  STD_TORCH_CHECK(keep->scalar_type() == ScalarType::Long && keep->dim() == 2 && keep->size(0) == beside.size(0) &&
                      same_device(*keep, beside),
                  "hiera_kernels: keep must be int64 [", beside.size(0), ", kept] on the device of the tokens");
}

inline TokenOrder checked_embed(const Tensor& patches, const Tensor& position, const std::vector<int64_t>& size,
                                const std::vector<int64_t>& strides, const std::optional<Tensor>& keep) {
  const TokenOrder order = checked_grid(size, strides);
  bool fits = patches.dim() == static_cast<int64_t>(size.size()) + 2;
  for (size_t d = 0; fits && d < size.size(); ++d) fits = patches.size(static_cast<int64_t>(d) + 2) == size[d];
  STD_TORCH_CHECK(fits, "hiera_kernels: patches must be [B, C, *size]");
  STD_TORCH_CHECK(same_device(patches, position), "hiera_kernels: pos_embed must be on patches' device");
  STD_TORCH_CHECK(position.dim() == 3 && position.size(0) == 1 && position.size(1) == order.tokens &&
                      position.size(2) == patches.size(1),
                  "hiera_kernels: pos_embed must be [1, ", order.tokens, ", ", patches.size(1), "]");
  check_keep(keep, patches);
  return order;
}

inline TokenOrder checked_embed_backward(const Tensor& grad, const std::vector<int64_t>& size,
                                         const std::vector<int64_t>& strides, const std::optional<Tensor>& keep,
                                         ScalarType position_dtype) {
  const TokenOrder order = checked_grid(size, strides);
  STD_TORCH_CHECK(grad.dim() == 3, "hiera_kernels: grad must be [B, rows, C]");
  // Of the pairs that are compiled, the sum has the position's dtype (see Sum).
  STD_TORCH_CHECK(grad.scalar_type() == position_dtype, "hiera_kernels: grad must have the dtype that embed_tokens returns");
  check_keep(keep, grad);
  const int64_t rows = keep.has_value() ? keep->size(1) * order.unit : order.tokens;
  STD_TORCH_CHECK(grad.size(1) == rows, "hiera_kernels: grad must have ", rows, " rows, got ", grad.size(1));
  return order;
}

// Whether a convolution output [B, C, *size] lies [B, *size, C] in memory. An ambiguous one counts as channel-first.
inline bool is_channels_last(const Tensor& patches) {
  if (patches.is_contiguous()) return false;
  int64_t expected = 1;
  const int64_t dims = patches.dim();
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
    if (patches.size(d) != 1 && patches.stride(d) != expected) return false;
    expected *= patches.size(d);
  }
  return true;
}

inline Tensor empty_patches(const Tensor& like, int64_t batch, int64_t channels, const std::vector<int64_t>& size,
                            ScalarType dtype, bool channels_last, bool needed) {
  std::vector<int64_t> shape{batch, channels};
  shape.insert(shape.end(), size.begin(), size.end());
  if (!needed) shape = {0};
  if (!needed || !channels_last) return torch::stable::new_empty(like, shape, dtype);
  // Memory [B, *size, C], seen with the channel axis moved to the front.
  std::vector<int64_t> strides(shape.size());
  int64_t step = channels;
  strides[1] = 1;
  for (size_t d = shape.size() - 1; d >= 2; --d) {
    strides[d] = step;
    step *= shape[d];
  }
  strides[0] = step;
  std::array<StableIValue, 7> stack{torch::stable::detail::from(like),
                                    torch::stable::detail::from(shape),
                                    torch::stable::detail::from(strides),
                                    torch::stable::detail::from(std::optional<ScalarType>(dtype)),
                                    torch::stable::detail::from(std::nullopt),
                                    torch::stable::detail::from(std::nullopt),
                                    torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor empty_position(const Tensor& like, int64_t tokens, int64_t channels, ScalarType dtype, bool needed) {
  const std::vector<int64_t> shape = needed ? std::vector<int64_t>{1, tokens, channels} : std::vector<int64_t>{0};
  return torch::stable::new_empty(like, shape, dtype);
}

// f(P{}, E{}) with the C++ types of the two dtypes, if they are among those that are compiled; see embed_dtypes in ops.
template <typename F>
inline void dispatch_embed(ScalarType patches, ScalarType position, const F& f) {
  using BF16 = torch::headeronly::BFloat16;
  using Half = torch::headeronly::Half;
  if (patches == ScalarType::Float && position == ScalarType::Float) return f(float{}, float{});
  if (patches == ScalarType::Double && position == ScalarType::Double) return f(double{}, double{});
  if (patches == ScalarType::BFloat16 && position == ScalarType::Float) return f(BF16{}, float{});
  if (patches == ScalarType::Half && position == ScalarType::Float) return f(Half{}, float{});
  if (patches == ScalarType::BFloat16 && position == ScalarType::BFloat16) return f(BF16{}, BF16{});
  if (patches == ScalarType::Half && position == ScalarType::Half) return f(Half{}, Half{});
  STD_TORCH_CHECK(false, "embed_tokens has no compiled kernel for these dtypes; hiera_kernels.embed_tokens serves them");
}

// The dtype of the sum: of two floating dtypes that are compiled together, the second is never the narrower one.
template <typename P, typename E>
using Sum = E;

}  // namespace hiera_kernels
