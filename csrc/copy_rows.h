// Rows gathered into one contiguous destination on the CPU: the work of `unroll` and `reroll`, for elements of any size.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "token_order.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace hiera_kernels {

// Walks the output rows from `row` on: one division per axis at the start, additions after that.
class RowWalk {
 public:
  RowWalk(const RowMap<int64_t>& map, int64_t row) : map_(map) {
    for (int k = map.axes - 1; k >= 0; --k) {
      index_[k] = row % map.extent[k];
      row /= map.extent[k];
      offset_ += index_[k] * map.stride[k];
    }
  }

  int64_t offset() const { return offset_; }
  // Rows that still lie one stride apart on the fastest axis, this one included.
  int64_t run() const { return map_.axes > 0 ? map_.extent[map_.axes - 1] - index_[map_.axes - 1] : 1; }
  int64_t run_stride() const { return map_.axes > 0 ? map_.stride[map_.axes - 1] : 0; }

  // Goes `rows` on, at most to the end of the run; past the last row it starts again at the first.
  void advance(int64_t rows) {
    int k = map_.axes - 1;
    if (k < 0) return;
    index_[k] += rows;
    offset_ += rows * map_.stride[k];
    for (; index_[k] == map_.extent[k]; --k) {
      offset_ -= index_[k] * map_.stride[k];
      index_[k] = 0;
      if (k == 0) return;
      ++index_[k - 1];
      offset_ += map_.stride[k - 1];
    }
  }

 private:
  const RowMap<int64_t>& map_;
  int64_t index_[kMaxAxes];
  int64_t offset_ = 0;
};

// Past this size the output is written around the caches: it would only push out what the next operation reads.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

#if defined(__SSE2__)
// 16-byte stores: consecutive ones fill whole lines in the write-combining buffers, wider vectors measured no faster.
inline void stream_row(char* dst, const char* src, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 16));
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 32));
    const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 48));
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), a);
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 16), b);
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 32), c);
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 48), d);
  }
  for (; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
}
#endif

// Rows of a fixed, small size: the copy is one or two moves, so the loop must hold nothing else.
template <int64_t Bytes>
void copy_small_rows(char* dst, const char* src, RowWalk walk, int64_t rows) {
  while (rows > 0) {
    const int64_t run = std::min(rows, walk.run()), stride = walk.run_stride();
    const char* from = src + walk.offset();
    for (int64_t i = 0; i < run; ++i) std::memcpy(dst + i * Bytes, from + i * stride, Bytes);
    dst += run * Bytes;
    rows -= run;
    walk.advance(run);
  }
}

inline void copy_any_rows(char* dst, const char* src, RowWalk walk, int64_t rows, int64_t row_bytes) {
  while (rows > 0) {
    const int64_t run = std::min(rows, walk.run()), stride = walk.run_stride();
    const char* from = src + walk.offset();
    for (int64_t i = 0; i < run; ++i) std::memcpy(dst + i * row_bytes, from + i * stride, row_bytes);
    dst += run * row_bytes;
    rows -= run;
    walk.advance(run);
  }
}

#if defined(__SSE2__)
inline void stream_rows(char* dst, const char* src, RowWalk walk, int64_t rows, int64_t row_bytes) {
  while (rows > 0) {
    const int64_t run = std::min(rows, walk.run()), stride = walk.run_stride();
    const char* from = src + walk.offset();
    for (int64_t i = 0; i < run; ++i) stream_row(dst + i * row_bytes, from + i * stride, row_bytes);
    dst += run * row_bytes;
    rows -= run;
    walk.advance(run);
  }
  _mm_sfence();
}
#endif

// dst row b * N + n = src row b * N + map(n), both contiguous, for `batch` images of N = prod(map.extent) rows.
inline void gather_rows(char* dst, const char* src, const RowMap<int64_t>& row_map, int64_t batch, int64_t tokens,
                        int64_t row_bytes) {
  if (batch == 0 || row_bytes == 0) return;
  // In bytes, with the batch as the slowest axis; rows that follow each other in both orders are one long row.
  RowMap<int64_t> map;
  detail::append_axis(map, batch, tokens * row_bytes);
  for (int k = 0; k < row_map.axes; ++k) detail::append_axis(map, row_map.extent[k], row_map.stride[k] * row_bytes);
  int64_t rows = batch * tokens;
  if (map.stride[map.axes - 1] == row_bytes) {
    row_bytes *= map.extent[map.axes - 1];
    rows /= map.extent[map.axes - 1];
    --map.axes;
  }
  if (rows == 1) {  // nothing is reordered: split the one row so that all threads have a part
    torch::stable::parallel_for(0, row_bytes, 1 << 16, [&](int64_t begin, int64_t end) {
      std::memcpy(dst + begin, src + begin, end - begin);
    });
    return;
  }
  const bool stream = rows * row_bytes >= kStreamBytes && row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(dst) % 16 == 0;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / row_bytes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const RowWalk walk(map, begin);
    char* out = dst + begin * row_bytes;
    const int64_t count = end - begin;
#if defined(__SSE2__)
    if (stream) return stream_rows(out, src, walk, count, row_bytes);
#endif
    switch (row_bytes) {
      case 1: return copy_small_rows<1>(out, src, walk, count);
      case 2: return copy_small_rows<2>(out, src, walk, count);
      case 4: return copy_small_rows<4>(out, src, walk, count);
      case 8: return copy_small_rows<8>(out, src, walk, count);
      case 16: return copy_small_rows<16>(out, src, walk, count);
      case 32: return copy_small_rows<32>(out, src, walk, count);
      default: return copy_any_rows(out, src, walk, count, row_bytes);
    }
  });
}

}  // namespace hiera_kernels
