// CUDA kernels of `embed_tokens` and its backward. As token_order.cuh, this file compiles for the host in the tests.
#pragma once

#include "token_order.cuh"

namespace hiera_kernels {
namespace cuda {

constexpr int kTileTokens = 64;   // along the convolution output's tokens: 128 bytes of bf16
constexpr int kTileChannels = 32; // along the channels: one per lane
constexpr int kPerThread = kTileTokens * kTileChannels / kThreads;
constexpr int kWarps = kThreads / 32;

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int Size>
struct alignas(Size * sizeof(T) < 16 ? Size * sizeof(T) : 16) Pack { T at[Size]; };

// Per image 32 bits are enough (checked before the launch); what counts over the batch is int64.
struct EmbedShape {
  int64_t batch;
  int32_t tokens, channels, windows, unit;
  int32_t kept;           // mask units to keep; -1: all tokens
  bool channels_last;     // patches lie [B, N, C] in memory, otherwise [B, C, N]
  HIERA_HOST_DEVICE int64_t rows() const { return kept < 0 ? tokens : static_cast<int64_t>(unit) * kept; }
};

inline int32_t tiles_of(int32_t extent, int32_t tile) { return static_cast<int32_t>((int64_t{extent} + tile - 1) / tile); }

// The widths of one image as the kernels count them.
inline EmbedShape embed_shape(const TokenOrder& order, int64_t batch, int64_t channels, int64_t kept, bool channels_last) {
  if (order.tokens > INT32_MAX - kTileTokens || channels > INT32_MAX - kTileChannels || kept > INT32_MAX ||
      order.unit * std::max<int64_t>(kept, 0) > INT32_MAX)
    throw std::runtime_error("hiera_kernels: embed_tokens serves up to 2^31 tokens per image on CUDA");
  return {batch,
          static_cast<int32_t>(order.tokens),
          static_cast<int32_t>(channels),
          static_cast<int32_t>(order.windows),
          static_cast<int32_t>(order.unit),
          static_cast<int32_t>(kept),
          channels_last};
}

// Where each mask unit went: first[b, w] is the smallest k with keep[b, k] = w, next[b, k] the next one; -1 ends the list.
// One thread per (b, w) scans its image's row, so the lists are the same at every run.
__global__ void __launch_bounds__(kThreads) link_kept(const int64_t* __restrict__ keep, int64_t batch, int32_t kept,
                                                      int32_t windows, int32_t* __restrict__ first,
                                                      int32_t* __restrict__ next) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= batch * windows) return;
  const int64_t b = i / windows, w = i - b * windows;
  const int64_t* row = keep + b * kept;
  int32_t last = -1;
  for (int32_t k = kept - 1; k >= 0; --k) {
    if (row[k] < 0 || row[k] >= windows) HIERA_TRAP();
    if (row[k] != w) continue;
    next[b * kept + k] = last;
    last = k;
  }
  first[i] = last;
}

template <typename Stream>
void launch_link_kept(const int64_t* keep, const EmbedShape& shape, int32_t* first, int32_t* next, Stream stream) {
  const int64_t threads = shape.batch * shape.windows;
  if (threads == 0) return;
  HIERA_LAUNCH(link_kept, blocks_on_x((threads + kThreads - 1) / kThreads), kThreads, stream, keep, shape.batch, shape.kept,
               shape.windows, first, next);
}

// ---- forward, patches channels-last: output rows gathered, position added ----

template <typename P, typename E, typename O, int Size>
__global__ void __launch_bounds__(kThreads) embed_gather(O* __restrict__ out, const P* __restrict__ patches,
                                                         const E* __restrict__ position, const int64_t* __restrict__ keep,
                                                         const RowMap<uint32_t> to_spatial, const EmbedShape shape,
                                                         int64_t rows, int rows_per_block) {
  using A = Accumulator<O>;
  __shared__ int64_t from[kMaxRowsPerBlock], place[kMaxRowsPerBlock];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block, rows_per_image = shape.rows();
  const int count = static_cast<int>(rows - first < rows_per_block ? rows - first : rows_per_block);
  for (int r = threadIdx.x; r < count; r += kThreads) {
    const int64_t row = first + r;
    const int64_t b = row >> 32 ? row / rows_per_image : static_cast<uint32_t>(row) / static_cast<uint32_t>(rows_per_image);
    int32_t n = static_cast<int32_t>(row - b * rows_per_image);
    if (shape.kept >= 0) {
      const int32_t inner = n / shape.kept;
      const int64_t window = keep[b * shape.kept + n - inner * shape.kept];
      if (window < 0 || window >= shape.windows) HIERA_TRAP();
      n = inner * shape.windows + static_cast<int32_t>(window);
    }
    const int64_t token = to_spatial(n);
    place[r] = token * shape.channels;
    from[r] = (b * shape.tokens + token) * shape.channels;
  }
  __syncthreads();
  const uint32_t vectors = shape.channels / Size;
  const int64_t total = static_cast<int64_t>(count) * vectors;
  // A thread keeps its place by additions: kThreads vectors on are `step_rows` rows and `step_rest` vectors on.
  const uint32_t step_rows = kThreads / vectors, step_rest = kThreads - step_rows * vectors;
  uint32_t r = threadIdx.x / vectors, v = threadIdx.x - r * vectors;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < total; i += kThreads) {
    const int64_t c = static_cast<int64_t>(v) * Size;
    const Pack<P, Size> a = *reinterpret_cast<const Pack<P, Size>*>(patches + from[r] + c);
    const Pack<E, Size> b = *reinterpret_cast<const Pack<E, Size>*>(position + place[r] + c);
    Pack<O, Size> sum;
#pragma unroll
    for (int j = 0; j < Size; ++j) sum.at[j] = static_cast<O>(static_cast<A>(a.at[j]) + static_cast<A>(b.at[j]));
    *reinterpret_cast<Pack<O, Size>*>(out + (first + r) * shape.channels + c) = sum;
    r += step_rows;
    v += step_rest;
    if (v >= vectors) {
      v -= vectors;
      ++r;
    }
  }
}

// ---- forward, patches channel-first: a tile is read along the tokens and written along the channels ----

template <typename P, typename E, typename O, int Size>
__global__ void __launch_bounds__(kThreads) embed_transpose(O* __restrict__ out, const P* __restrict__ patches,
                                                            const E* __restrict__ position, const int32_t* __restrict__ first,
                                                            const int32_t* __restrict__ next,
                                                            const RowMap<uint32_t> to_unrolled, const EmbedShape shape,
                                                            int32_t token_tiles, int32_t channel_tiles) {
  using A = Accumulator<O>;
  __shared__ A tile[kTileChannels][kTileTokens + 1];
  __shared__ int64_t row[kTileTokens];    // the output row; with `keep` that of the first copy
  __shared__ int32_t copy[kTileTokens];   // with `keep`: which k that is, -1 if the token is not visible
  const int32_t block = blockIdx.x, tiles = token_tiles * channel_tiles, image = block / tiles, rest = block - image * tiles;
  const int32_t n0 = rest / channel_tiles * kTileTokens, c0 = rest % channel_tiles * kTileChannels;
  const int64_t b = image;
  for (int t = threadIdx.x; t < kTileTokens; t += kThreads) {
    copy[t] = -1;
    if (n0 + t >= shape.tokens) continue;
    const int32_t n = static_cast<int32_t>(to_unrolled(n0 + t));
    if (shape.kept < 0) {
      row[t] = b * shape.tokens + n;
      copy[t] = 0;
    } else {
      const int32_t inner = n / shape.windows;
      copy[t] = first[b * shape.windows + n - inner * shape.windows];
      row[t] = (b * shape.unit + inner) * shape.kept + copy[t];
    }
  }
  __syncthreads();
  constexpr int kPacks = kTileTokens / Size;
  for (int i = threadIdx.x; i < kPacks * kTileChannels; i += kThreads) {
    const int c = i / kPacks, t = i % kPacks * Size;
    if (c0 + c >= shape.channels || n0 + t >= shape.tokens) continue;
    bool visible = false;
#pragma unroll
    for (int j = 0; j < Size; ++j) visible |= copy[t + j] >= 0;
    if (!visible) continue;
    const P* at = patches + (b * shape.channels + c0 + c) * shape.tokens + n0 + t;
    const Pack<P, Size> pack = *reinterpret_cast<const Pack<P, Size>*>(at);
#pragma unroll
    for (int j = 0; j < Size; ++j) tile[c][t + j] = static_cast<A>(pack.at[j]);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int32_t c = c0 + lane;
  if (c >= shape.channels) return;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int t = threadIdx.x / 32 + j * kWarps;
    if (copy[t] < 0) continue;
    const O sum = static_cast<O>(tile[lane][t] + static_cast<A>(position[static_cast<int64_t>(n0 + t) * shape.channels + c]));
    int64_t r = row[t];
    out[r * shape.channels + c] = sum;
    if (shape.kept < 0) continue;
    for (int32_t k = copy[t], other; (other = next[b * shape.kept + k]) >= 0; k = other) {
      r += other - k;
      out[r * shape.channels + c] = sum;
    }
  }
}

template <typename P, typename E, typename O, typename Stream>
void launch_embed(O* out, const P* patches, const E* position, const int64_t* keep, const int32_t* first, const int32_t* next,
                  const TokenOrder& order, const EmbedShape& shape, Stream stream) {
  const int64_t rows = shape.batch * shape.rows();
  if (rows * shape.channels == 0) return;
  const RowMap<uint32_t> to_spatial = narrow_map<uint32_t>(order.to_spatial);
  const RowMap<uint32_t> to_unrolled = narrow_map<uint32_t>(order.to_unrolled);
  constexpr int kSize = 16 / sizeof(P);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (shape.channels_last) {
    const int rows_per_block = static_cast<int>(std::min<int64_t>(
        kMaxRowsPerBlock, std::max<int64_t>(1, kBytesPerBlock / static_cast<int64_t>(sizeof(O) * shape.channels))));
    const unsigned blocks = blocks_on_x((rows + rows_per_block - 1) / rows_per_block);
    if (shape.channels % kSize == 0 && aligned(out) && aligned(patches) && aligned(position))
      HIERA_LAUNCH((embed_gather<P, E, O, kSize>), blocks, kThreads, stream, out, patches, position, keep, to_spatial,
                   shape, rows, rows_per_block);
    else
      HIERA_LAUNCH((embed_gather<P, E, O, 1>), blocks, kThreads, stream, out, patches, position, keep, to_spatial,
                   shape, rows, rows_per_block);
    return;
  }
  const int32_t token_tiles = tiles_of(shape.tokens, kTileTokens), channel_tiles = tiles_of(shape.channels, kTileChannels);
  const unsigned blocks = blocks_on_x(shape.batch * token_tiles * channel_tiles);
  if (shape.tokens % kSize == 0 && aligned(patches))
    HIERA_LAUNCH((embed_transpose<P, E, O, kSize>), blocks, kThreads, stream, out, patches, position, first, next,
                 to_unrolled, shape, token_tiles, channel_tiles);
  else
    HIERA_LAUNCH((embed_transpose<P, E, O, 1>), blocks, kThreads, stream, out, patches, position, first, next,
                 to_unrolled, shape, token_tiles, channel_tiles);
}

// ---- backward: a tile of tokens and channels walks through `images` images ----

// partial[chunk, n, c]: the sum of this chunk's images, in their order; no atomics, so every run gives the same bits.
template <typename G, typename P>
__global__ void __launch_bounds__(kThreads) embed_backward(P* __restrict__ grad_patches, Accumulator<G>* __restrict__ partial,
                                                           const G* __restrict__ grad, const int32_t* __restrict__ first,
                                                           const int32_t* __restrict__ next,
                                                           const RowMap<uint32_t> to_unrolled, const EmbedShape shape,
                                                           int32_t token_tiles, int32_t channel_tiles, int64_t images) {
  using A = Accumulator<G>;
  __shared__ A tile[kTileChannels][kTileTokens + 1];
  __shared__ int32_t unrolled[kTileTokens];
  const int32_t block = blockIdx.x, tiles = token_tiles * channel_tiles, rest = block % tiles;
  const int32_t n0 = rest / channel_tiles * kTileTokens, c0 = rest % channel_tiles * kTileChannels;
  const int64_t chunk = block / tiles;
  for (int t = threadIdx.x; t < kTileTokens; t += kThreads) unrolled[t] = n0 + t < shape.tokens ? static_cast<int32_t>(to_unrolled(n0 + t)) : 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t c = c0 + lane;
  const int64_t last = (chunk + 1) * images < shape.batch ? (chunk + 1) * images : shape.batch;
  A sum[kPerThread];
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) sum[j] = 0;
  for (int64_t b = chunk * images; b < last; ++b) {
    A value[kPerThread];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int t = warp + j * kWarps;
      value[j] = 0;
      if (n0 + t >= shape.tokens || c >= shape.channels) continue;
      if (shape.kept < 0) {
        value[j] = static_cast<A>(grad[(b * shape.tokens + unrolled[t]) * shape.channels + c]);
      } else {
        const int32_t inner = unrolled[t] / shape.windows, window = unrolled[t] - inner * shape.windows;
        for (int32_t k = first[b * shape.windows + window]; k >= 0; k = next[b * shape.kept + k])
          value[j] += static_cast<A>(grad[((b * shape.unit + inner) * shape.kept + k) * shape.channels + c]);
      }
    }
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) sum[j] += value[j];
    if (grad_patches == nullptr) continue;
    if (shape.channels_last) {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int t = warp + j * kWarps;
        if (n0 + t < shape.tokens && c < shape.channels)
          grad_patches[(b * shape.tokens + n0 + t) * shape.channels + c] = static_cast<P>(value[j]);
      }
      continue;
    }
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) tile[lane][warp + j * kWarps] = value[j];
    __syncthreads();
    for (int i = threadIdx.x; i < kTileTokens * kTileChannels; i += kThreads) {
      const int row = i / kTileTokens, t = i % kTileTokens;
      if (n0 + t < shape.tokens && c0 + row < shape.channels)
        grad_patches[(b * shape.channels + c0 + row) * shape.tokens + n0 + t] = static_cast<P>(tile[row][t]);
    }
    __syncthreads();
  }
  if (partial == nullptr) return;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int t = warp + j * kWarps;
    if (n0 + t < shape.tokens && c < shape.channels)
      partial[(chunk * shape.tokens + n0 + t) * shape.channels + c] = sum[j];
  }
}

template <typename A, typename E>
__global__ void __launch_bounds__(kThreads) sum_chunks(E* __restrict__ out, const A* __restrict__ partial, int64_t count,
                                                       int64_t chunks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  A sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * count + i];
  out[i] = static_cast<E>(sum);
}

// How the batch is cut for the backward: enough blocks to fill the machine, as few partial sums as that allows.
struct BatchChunks {
  int64_t images, chunks;
};

inline BatchChunks cut_batch(const EmbedShape& shape, bool need_position, int64_t multiprocessors) {
  const int64_t tiles = static_cast<int64_t>(tiles_of(shape.tokens, kTileTokens)) * tiles_of(shape.channels, kTileChannels);
  if (shape.batch == 0 || tiles == 0) return {1, 0};
  const int64_t wanted = need_position ? std::max<int64_t>(1, 8 * multiprocessors / tiles) : shape.batch;
  const int64_t images = (shape.batch + wanted - 1) / wanted;
  return {images, (shape.batch + images - 1) / images};
}

// `partial` has room for chunks * N * C sums; grad_patches or grad_position may be null.
template <typename G, typename P, typename E, typename Stream>
void launch_embed_backward(P* grad_patches, E* grad_position, Accumulator<G>* partial, const G* grad, const int32_t* first,
                           const int32_t* next, const TokenOrder& order, const EmbedShape& shape, const BatchChunks& cut,
                           Stream stream) {
  const int64_t count = shape.tokens * shape.channels;
  if (count == 0) return;
  if (cut.chunks > 0) {
    const int32_t token_tiles = tiles_of(shape.tokens, kTileTokens), channel_tiles = tiles_of(shape.channels, kTileChannels);
    HIERA_LAUNCH((embed_backward<G, P>), blocks_on_x(cut.chunks * token_tiles * channel_tiles), kThreads, stream, grad_patches,
                 grad_position == nullptr ? nullptr : partial, grad, first, next, narrow_map<uint32_t>(order.to_unrolled),
                 shape, token_tiles, channel_tiles, cut.images);
  }
  if (grad_position != nullptr)
    HIERA_LAUNCH((sum_chunks<Accumulator<G>, E>), blocks_on_x((count + kThreads - 1) / kThreads), kThreads, stream,
                 grad_position, partial, count, cut.chunks);
}

}  // namespace cuda
}  // namespace hiera_kernels
