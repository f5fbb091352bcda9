// `embed_tokens` and its backward on the CPU: convolution output + position, unrolled, visible mask units only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "token_order.h"

namespace hiera_kernels {

constexpr int64_t kTileTokens = 16;  // one 64-byte line of fp32 along the tokens of a channel-first convolution output

// Where each mask unit of each image went. Lists, because nothing forbids to keep a unit twice.
struct KeptUnits {
  std::vector<int64_t> first, next;
  int64_t kept = 0, windows = 0;

  KeptUnits(const int64_t* keep, int64_t batch, int64_t kept, int64_t windows)
      : first(batch * windows, -1), next(batch * kept, -1), kept(kept), windows(windows) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t k = kept - 1; k >= 0; --k) {
        const int64_t unit = keep[b * kept + k];
        STD_TORCH_CHECK(unit >= 0 && unit < windows, "keep must hold mask units from 0 to ", windows - 1, ", got ",
                              unit, " in row ", b);
        next[b * kept + k] = first[b * windows + unit];
        first[b * windows + unit] = k;
      }
    }
  }
};

struct EmbedShape {
  const TokenOrder& order;
  int64_t batch, channels;
  bool channels_last;       // patches lie [B, N, C] in memory, otherwise [B, C, N]
  const KeptUnits* kept;    // null: all tokens
};

// Calls f(row) for every output row of image b that shows the token at unrolled position n.
template <typename F>
inline void for_rows_of(const EmbedShape& shape, int64_t b, int64_t n, const F& f) {
  if (shape.kept == nullptr) return f(b * shape.order.tokens + n);
  const int64_t windows = shape.order.windows, kept = shape.kept->kept;
  const int64_t inner = n / windows, window = n - inner * windows;
  for (int64_t k = shape.kept->first[b * windows + window]; k >= 0; k = shape.kept->next[b * kept + k])
    f((b * shape.order.unit + inner) * kept + k);
}

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// tile [tokens][C] <- patches of image b, tokens n0 .. n0 + count.
template <typename P, typename A>
inline void load_tile(const EmbedShape& shape, const P* patches, int64_t b, int64_t n0, int64_t count, A* tile) {
  const int64_t tokens = shape.order.tokens, channels = shape.channels;
  if (shape.channels_last) {
    const P* from = patches + (b * tokens + n0) * channels;
    for (int64_t i = 0; i < count * channels; ++i) tile[i] = static_cast<A>(from[i]);
    return;
  }
  const P* from = patches + b * channels * tokens + n0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < count; ++t) tile[t * channels + c] = static_cast<A>(from[c * tokens + t]);
}

template <typename P, typename A>
inline void store_tile(const EmbedShape& shape, P* patches, int64_t b, int64_t n0, int64_t count, const A* tile) {
  const int64_t tokens = shape.order.tokens, channels = shape.channels;
  if (shape.channels_last) {
    P* to = patches + (b * tokens + n0) * channels;
    for (int64_t i = 0; i < count * channels; ++i) to[i] = static_cast<P>(tile[i]);
    return;
  }
  P* to = patches + b * channels * tokens + n0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < count; ++t) to[c * tokens + t] = static_cast<P>(tile[t * channels + c]);
}

inline int64_t tiles_of(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

// out[b, rows of n] = patches[b, :, spatial(n)] + position[spatial(n)]
template <typename P, typename E, typename O>
void embed_rows(const EmbedShape& shape, const P* patches, const E* position, O* out) {
  using A = Accumulator<O>;
  const int64_t tokens = shape.order.tokens, channels = shape.channels, tiles = tiles_of(tokens);
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (kTileTokens * channels + 1));
  torch::stable::parallel_for(0, shape.batch * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> tile(kTileTokens * channels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, n0 = i % tiles * kTileTokens, count = std::min(kTileTokens, tokens - n0);
      load_tile(shape, patches, b, n0, count, tile.data());
      for (int64_t t = 0; t < count; ++t) {
        const A* row = tile.data() + t * channels;
        const E* place = position + (n0 + t) * channels;
        for_rows_of(shape, b, shape.order.to_unrolled(n0 + t), [&](int64_t r) {
          O* to = out + r * channels;
          for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<O>(row[c] + static_cast<A>(place[c]));
        });
      }
    }
  });
}

// The adjoint: grad_patches[b, :, s] = sum of grad over the rows that show token s (none: zero), grad_position[s] = the same
// summed over the batch. A tile of tokens belongs to one thread and walks the batch in order, so the sum is deterministic.
template <typename G, typename P, typename E>
void embed_rows_backward(const EmbedShape& shape, const G* grad, P* grad_patches, E* grad_position) {
  using A = Accumulator<G>;
  const int64_t tokens = shape.order.tokens, channels = shape.channels, tiles = tiles_of(tokens);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> tile(kTileTokens * channels), sum(kTileTokens * channels);
    int64_t place[kTileTokens];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i * kTileTokens, count = std::min(kTileTokens, tokens - n0);
      for (int64_t t = 0; t < count; ++t) place[t] = shape.order.to_unrolled(n0 + t);
      std::fill(sum.begin(), sum.end(), A{0});
      for (int64_t b = 0; b < shape.batch; ++b) {
        for (int64_t t = 0; t < count; ++t) {
          A* row = tile.data() + t * channels;
          std::fill(row, row + channels, A{0});
          for_rows_of(shape, b, place[t], [&](int64_t r) {
            const G* from = grad + r * channels;
            for (int64_t c = 0; c < channels; ++c) row[c] += static_cast<A>(from[c]);
          });
        }
        if (grad_patches != nullptr) store_tile(shape, grad_patches, b, n0, count, tile.data());
        if (grad_position != nullptr)
          for (int64_t j = 0; j < count * channels; ++j) sum[j] += tile[j];
      }
      if (grad_position != nullptr)
        for (int64_t j = 0; j < count * channels; ++j) grad_position[n0 * channels + j] = static_cast<E>(sum[j]);
    }
  });
}

}  // namespace hiera_kernels
