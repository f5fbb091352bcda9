// The CUDA kernels of csrc/*.cuh as plain C functions, for tests/test_token_order_cuda_source.py to call through ctypes.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cuda_on_host.h"
// (after the stand-ins for CUDA's keywords)
#include "embed_tokens.cuh"
#include "token_order.cuh"

using namespace hiera_kernels;

namespace {

TokenOrder order_of(const int64_t* size, int64_t dims, const int64_t* strides, int64_t length) {
  TokenOrder order = make_token_order(size, dims, strides, length);
  if (order.error != nullptr) throw std::runtime_error(order.error);
  return order;
}

template <typename F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

void set_backwards(int on) { host_cuda::backwards = on != 0; }

// The map itself, both directions: row[0] = unrolled -> spatial, row[1] = spatial -> unrolled.
int map_rows(const int64_t* size, int64_t dims, const int64_t* strides, int64_t length, int64_t n, int64_t* row) {
  const TokenOrder order = make_token_order(size, dims, strides, length);
  if (order.error != nullptr) return 1;
  row[0] = order.to_spatial(n);
  row[1] = order.to_unrolled(n);
  return 0;
}

int move(void* dst, const void* src, const int64_t* size, int64_t dims, const int64_t* strides, int64_t length, int64_t batch,
         int64_t row_bytes, int reroll) {
  return guarded([&] {
    const TokenOrder order = order_of(size, dims, strides, length);
    cuda::launch_move(dst, src, reroll ? order.to_unrolled : order.to_spatial, batch, order.tokens, row_bytes, 0);
  });
}

// 64-bit indices, which only images of 2 GiB and more would take.
int move_wide(void* dst, const void* src, const int64_t* size, int64_t dims, const int64_t* strides, int64_t length,
              int64_t batch, int64_t row_bytes) {
  return guarded([&] {
    const TokenOrder order = order_of(size, dims, strides, length);
    RowMap<int64_t> map = order.to_spatial;
    for (int k = 0; k < map.axes; ++k) map.stride[k] *= row_bytes;
    cuda::launch_move_as<uint8_t, int64_t>(dst, src, map, batch, order.tokens, row_bytes, 0);
  });
}

#define EMBED(name, P, E)                                                                                                    \
  int embed_##name(E* out, const P* patches, const E* position, const int64_t* keep, int64_t kept, const int64_t* size,      \
                   int64_t dims, const int64_t* strides, int64_t length, int64_t batch, int64_t channels,                    \
                   int channels_last) {                                                                                      \
    return guarded([&] {                                                                                                     \
      const TokenOrder order = order_of(size, dims, strides, length);                                                        \
      const cuda::EmbedShape shape = cuda::embed_shape(order, batch, channels, keep ? kept : -1, channels_last);             \
      std::vector<int32_t> first(batch * order.windows, -7), next(keep ? batch * kept : 0, -7);                              \
      if (keep && !channels_last) cuda::launch_link_kept(keep, shape, first.data(), next.data(), 0);                         \
      cuda::launch_embed<P, E, E>(out, patches, position, keep, first.data(), next.data(), order, shape, 0);                 \
    });                                                                                                                      \
  }                                                                                                                          \
  int embed_backward_##name(P* grad_patches, E* grad_position, const E* grad, const int64_t* keep, int64_t kept,             \
                            const int64_t* size, int64_t dims, const int64_t* strides, int64_t length, int64_t batch,        \
                            int64_t channels, int channels_last, int64_t multiprocessors) {                                  \
    return guarded([&] {                                                                                                     \
      const TokenOrder order = order_of(size, dims, strides, length);                                                        \
      const cuda::EmbedShape shape = cuda::embed_shape(order, batch, channels, keep ? kept : -1, channels_last);             \
      std::vector<int32_t> first(batch * order.windows, -7), next(keep ? batch * kept : 0, -7);                              \
      if (keep) cuda::launch_link_kept(keep, shape, first.data(), next.data(), 0);                                           \
      const cuda::BatchChunks cut = cuda::cut_batch(shape, grad_position != nullptr, multiprocessors);                       \
      std::vector<cuda::Accumulator<E>> partial(cut.chunks * order.tokens * channels);                                       \
      cuda::launch_embed_backward<E, P, E>(grad_patches, grad_position, partial.data(), grad, first.data(), next.data(),     \
                                           order, shape, cut, 0);                                                            \
    });                                                                                                                      \
  }

EMBED(f32, float, float)
EMBED(f64, double, double)
EMBED(f16_f32, torch::headeronly::Half, float)
EMBED(bf16_bf16, torch::headeronly::BFloat16, torch::headeronly::BFloat16)

}  // extern "C"
