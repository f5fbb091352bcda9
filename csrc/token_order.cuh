// CUDA kernels of the token-order ops and their launches. No torch in here: tests compile this file for the host as well and
// walk the kernels thread by thread (tests/cuda_on_host.h), which is why launches go through HIERA_LAUNCH.
//
// Blocks are numbered on grid.x alone, which holds 2^31 - 1 of them; whatever may pass 2^31 is int64.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "token_order.h"

namespace hiera_kernels {
namespace cuda {

constexpr int kThreads = 256;

inline unsigned blocks_on_x(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("hiera_kernels: the input needs more than 2^31 - 1 thread blocks");
  return static_cast<unsigned>(blocks);
}

// ---- unroll and reroll: rows of bytes ----

constexpr int kMaxRowsPerBlock = 256;
constexpr int64_t kBytesPerBlock = 32 << 10;

struct alignas(16) Bytes16 { uint32_t part[4]; };
struct alignas(8) Bytes8 { uint32_t part[2]; };

// Output rows [blockIdx.x * rows_per_block, ...), each `vectors` long, from `map`, whose strides are vectors. Every row's
// coordinates are computed once, by one thread, and shared; a thread then steps through the block's vectors by additions.
template <typename Vector, typename Index>
__global__ void __launch_bounds__(kThreads) move_rows(Vector* __restrict__ dst, const Vector* __restrict__ src,
                                                      const RowMap<Index> map, int64_t rows, Index rows_per_image,
                                                      int rows_per_block, Index vectors) {
  __shared__ int64_t source[kMaxRowsPerBlock];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int count = static_cast<int>(rows - first < rows_per_block ? rows - first : rows_per_block);
  for (int r = threadIdx.x; r < count; r += kThreads) {
    const int64_t row = first + r;
    const int64_t image = row >> 32 ? row / rows_per_image : static_cast<uint32_t>(row) / rows_per_image;
    const Index within = static_cast<Index>(row - image * rows_per_image);
    source[r] = image * static_cast<int64_t>(rows_per_image) * vectors + map(within);
  }
  __syncthreads();
  dst += first * vectors;
  const Index total = count * vectors;
  const Index step_rows = kThreads / vectors, step_rest = kThreads - step_rows * vectors;
  Index i = threadIdx.x, r = i / vectors, v = i - r * vectors;
  const auto next = [&] {
    r += step_rows;
    v += step_rest;
    if (v >= vectors) {
      v -= vectors;
      ++r;
    }
  };
  // Four loads in flight, and no bounds to look at; the block's last vectors come one by one.
  for (; i + 3 * kThreads < total; i += 4 * kThreads) {
    Vector held[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      held[j] = src[source[r] + v];
      next();
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) dst[i + j * kThreads] = held[j];
  }
  for (; i < total; i += kThreads) {
    dst[i] = src[source[r] + v];
    next();
  }
}

template <typename Vector, typename Index, typename Stream>
void launch_move_as(void* dst, const void* src, const RowMap<int64_t>& byte_map, int64_t batch, int64_t rows_per_image,
                    int64_t row_bytes, Stream stream) {
  RowMap<Index> map = narrow_map<Index>(byte_map);
  for (int k = 0; k < map.axes; ++k) map.stride[k] = static_cast<Index>(byte_map.stride[k] / sizeof(Vector));
  const int64_t rows = batch * rows_per_image, vectors = row_bytes / sizeof(Vector);
  const int rows_per_block =
      static_cast<int>(std::min<int64_t>(kMaxRowsPerBlock, std::max<int64_t>(1, kBytesPerBlock / row_bytes)));
  const unsigned blocks = blocks_on_x((rows + rows_per_block - 1) / rows_per_block);
  HIERA_LAUNCH((move_rows<Vector, Index>), blocks, kThreads, stream, static_cast<Vector*>(dst),
               static_cast<const Vector*>(src), map, rows, static_cast<Index>(rows_per_image), rows_per_block,
               static_cast<Index>(vectors));
}

// dst row b * N + n = src row b * N + map(n); both contiguous. The widest vectors that rows and pointers allow.
template <typename Stream>
void launch_move(void* dst, const void* src, const RowMap<int64_t>& row_map, int64_t batch, int64_t tokens, int64_t row_bytes,
                 Stream stream) {
  if (batch == 0 || row_bytes == 0) return;
  RowMap<int64_t> map = row_map;
  for (int k = 0; k < map.axes; ++k) map.stride[k] *= row_bytes;
  int64_t rows = tokens;
  // Rows that follow each other in both orders are one longer row, as long as a block holds it.
  const int64_t merged = map.axes > 1 && map.stride[map.axes - 1] == row_bytes ? map.extent[map.axes - 1] : 1;
  if (merged > 1 && merged * row_bytes <= kBytesPerBlock) {
    --map.axes;
    row_bytes *= merged;
    rows /= merged;
  }
  const uint64_t odd = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | static_cast<uint64_t>(row_bytes);
  const bool small = rows * row_bytes <= INT32_MAX;  // one image; then its offsets and rows fit 32 bits
  const auto go = [&](auto vector) {
    using Vector = decltype(vector);
    if (small) launch_move_as<Vector, uint32_t>(dst, src, map, batch, rows, row_bytes, stream);
    else launch_move_as<Vector, int64_t>(dst, src, map, batch, rows, row_bytes, stream);
  };
  if (odd % 16 == 0) go(Bytes16{});
  else if (odd % 8 == 0) go(Bytes8{});
  else if (odd % 4 == 0) go(uint32_t{});
  else if (odd % 2 == 0) go(uint16_t{});
  else go(uint8_t{});
}

}  // namespace cuda
}  // namespace hiera_kernels
