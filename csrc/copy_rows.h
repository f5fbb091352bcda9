// Rows moved from one order to the other on the CPU: the work of `unroll` and `reroll`, for elements of any size.
//
// One side is walked in order, the other jumps. Measured (one core of an EPYC 9004, rows of 100 to 600 bytes):
// - Reads that jump run at half the speed of a copy, prefetched or not; stores that jump run at full speed if they go
//   around the caches and fill whole lines. So large outputs are written by streaming stores in the source's order.
// - A row that ends inside a line leaves the rest of that line to its neighbour in the output. Where neighbours in the
//   output are near each other in the source (`unroll`), a strip of the source is fetched ahead and its rows are written
//   in runs; where they are far apart (`reroll`), the ends of rows are stored through the caches.
// - Small outputs stay in the caches: what comes next will read them.
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

// The offsets of rows `row`, `row + 1`, ... of a map: one division per axis at the start, additions after that.
class RowWalk {
 public:
  RowWalk(const RowMap<int64_t>& map, int64_t row) : map_(map), last_(map.axes - 1) {
    for (int k = last_; k >= 0; --k) {
      index_[k] = row % map.extent[k];
      row /= map.extent[k];
      offset_ += index_[k] * map.stride[k];
    }
  }

  int64_t offset() const { return offset_; }
  int64_t stride() const { return map_.stride[last_]; }
  int64_t run() const { return map_.extent[last_] - index_[last_]; }  // rows that are left on the fastest axis

  // Goes `rows` on, at most to the end of the run; past the last row it starts again at the first.
  void advance(int64_t rows) {
    int k = last_;
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
  const int last_;
  int64_t index_[kMaxAxes];
  int64_t offset_ = 0;
};

// Larger outputs are written around the caches; smaller ones are likely to be read again while a cache holds them.
constexpr int64_t kStreamBytes = int64_t{1} << 20;
// What is fetched ahead has to fit the first or second cache, together with what is being read.
constexpr int64_t kStripBytes = int64_t{64} << 10;
// Neighbours in the output that are at most so many source rows apart count as near.
constexpr int64_t kNearRows = 64;

struct CopyAny {
  int64_t bytes;
  void operator()(char* dst, const char* src) const { std::memcpy(dst, src, bytes); }
};

// One or two moves, known to the compiler.
template <int64_t Bytes>
struct CopySmall {
  void operator()(char* dst, const char* src) const { std::memcpy(dst, src, Bytes); }
};

#if defined(__SSE2__)
inline void stream_16(char* dst, const char* src) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(dst), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
}

inline void stream_bytes(char* dst, const char* src, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    stream_16(dst + i, src + i);
    stream_16(dst + i + 16, src + i + 16);
    stream_16(dst + i + 32, src + i + 32);
    stream_16(dst + i + 48, src + i + 48);
  }
  for (; i < bytes; i += 16) stream_16(dst + i, src + i);
}

// Streaming stores throughout: dst and `bytes` are multiples of 16.
struct StreamAll {
  int64_t bytes;
  void operator()(char* dst, const char* src) const { stream_bytes(dst, src, bytes); }
};

inline void store_bytes(char* dst, const char* src, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_store_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
}

// Streaming stores for whole lines, the ends through the caches. By16: dst and `bytes` are multiples of 16.
template <bool By16>
struct StreamLines {
  int64_t bytes;
  void operator()(char* dst, const char* src) const {
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(dst) & 63);
    const int64_t lines = (bytes - head) & ~int64_t{63}, tail = bytes - head - lines;
    By16 ? store_bytes(dst, src, head) : static_cast<void>(std::memcpy(dst, src, head));
    stream_bytes(dst + head, src + head, lines);
    dst += head + lines;
    src += head + lines;
    By16 ? store_bytes(dst, src, tail) : static_cast<void>(std::memcpy(dst, src, tail));
  }
};
#endif

// Scatter: reads rows begin .. end of the source in order, and `map` tells where they go; otherwise writes them in order,
// and `map` tells where they come from. The map's strides are bytes.
template <bool Scatter, typename Copy>
void move_range(char* dst, const char* src, const RowMap<int64_t>& map, int64_t row_bytes, int64_t begin, int64_t end,
                const Copy& copy) {
  RowWalk walk(map, begin);
  if (Scatter) src += begin * row_bytes;
  else dst += begin * row_bytes;
  for (int64_t left = end - begin; left > 0;) {
    const int64_t run = std::min(left, walk.run()), stride = walk.stride(), offset = walk.offset();
    for (int64_t i = 0; i < run; ++i) {
      if (Scatter) copy(dst + offset + i * stride, src + i * row_bytes);
      else copy(dst + i * row_bytes, src + offset + i * stride);
    }
    if (Scatter) src += run * row_bytes;
    else dst += run * row_bytes;
    left -= run;
    walk.advance(run);
  }
}

template <bool Scatter, typename Copy>
void move_all(char* dst, const char* src, const RowMap<int64_t>& map, int64_t row_bytes, int64_t rows, const Copy& copy) {
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / row_bytes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    move_range<Scatter>(dst, src, map, row_bytes, begin, end, copy);
#if defined(__SSE2__)
    _mm_sfence();  // streaming stores are weakly ordered: whoever reads the output next must see them
#endif
  });
}

#if defined(__SSE2__)
inline void fetch(const char* src, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(src + line, _MM_HINT_T0);
}

// `unroll` for rows that end inside lines: a strip of `step * extent` source rows becomes `step` runs of `extent` rows, which
// follow each other in the output and lie `step` rows apart in the source.
inline void unroll_strips(char* dst, const char* src, const RowMap<int64_t>& to, int64_t row_bytes, int64_t rows, int64_t step,
                          int64_t extent) {
  const int64_t strip_bytes = step * extent * row_bytes, strips = rows / (step * extent);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / strip_bytes);
  torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      RowWalk walk(to, strip * step * extent);
      const char* from = src + strip * strip_bytes;
      const char* ahead = strip + 1 < strips ? from + strip_bytes : from;
      for (int64_t j = 0; j < step; ++j, from += row_bytes) {
        char* out = dst + walk.offset();
        for (int64_t i = 0; i < extent; ++i, ahead += row_bytes, out += row_bytes) {
          fetch(ahead, row_bytes);
          stream_bytes(out, from + i * step * row_bytes, row_bytes);
        }
        walk.advance(1);
      }
    }
    _mm_sfence();
  });
}
#endif

// In bytes, and with the batch as the slowest axis.
inline RowMap<int64_t> batched_bytes(const RowMap<int64_t>& rows, int64_t batch, int64_t tokens, int64_t row_bytes) {
  RowMap<int64_t> map;
  detail::append_axis(map, batch, tokens * row_bytes);
  for (int k = 0; k < rows.axes; ++k) detail::append_axis(map, rows.extent[k], rows.stride[k] * row_bytes);
  return map;
}

// `source_of` maps destination rows to source rows and `destination_of` is its inverse; both tensors are contiguous and hold
// `batch` images of `tokens` rows.
inline void move_rows(char* dst, const char* src, const RowMap<int64_t>& source_of, const RowMap<int64_t>& destination_of,
                      int64_t batch, int64_t tokens, int64_t row_bytes) {
  if (batch == 0 || row_bytes == 0) return;
  RowMap<int64_t> from = batched_bytes(source_of, batch, tokens, row_bytes);
  RowMap<int64_t> to = batched_bytes(destination_of, batch, tokens, row_bytes);
  int64_t rows = batch * tokens;
  if (from.stride[from.axes - 1] == row_bytes) {  // rows that follow each other in both orders are one long row
    const int64_t merged = from.extent[from.axes - 1];
    row_bytes *= merged;
    rows /= merged;
    --from.axes;
    --to.axes;
  }
  if (rows == 1) {  // nothing is reordered: cut the one row so that all threads have a part
    torch::stable::parallel_for(0, row_bytes, 1 << 16, [&](int64_t begin, int64_t end) {
      std::memcpy(dst + begin, src + begin, end - begin);
    });
    return;
  }
  const int64_t gap = from.stride[from.axes - 1] / row_bytes;  // source rows between neighbours in the output
#if defined(__SSE2__)
  if (rows * row_bytes >= kStreamBytes && row_bytes >= 64) {
    const auto odd = (reinterpret_cast<uintptr_t>(dst) | static_cast<uintptr_t>(row_bytes));
    if (odd % 64 == 0) return move_all<true>(dst, src, to, row_bytes, rows, StreamAll{row_bytes});
    const int64_t extent = from.extent[from.axes - 1];
    if (odd % 16 == 0 && gap * extent * row_bytes <= kStripBytes)
      return unroll_strips(dst, src, to, row_bytes, rows, gap, extent);
    if (gap > kNearRows && odd % 16 == 0) return move_all<true>(dst, src, to, row_bytes, rows, StreamLines<true>{row_bytes});
    if (gap > kNearRows) return move_all<true>(dst, src, to, row_bytes, rows, StreamLines<false>{row_bytes});
  }
#endif
  switch (row_bytes) {
    case 1: return move_all<false>(dst, src, from, row_bytes, rows, CopySmall<1>{});
    case 2: return move_all<false>(dst, src, from, row_bytes, rows, CopySmall<2>{});
    case 4: return move_all<false>(dst, src, from, row_bytes, rows, CopySmall<4>{});
    case 8: return move_all<false>(dst, src, from, row_bytes, rows, CopySmall<8>{});
    case 16: return move_all<false>(dst, src, from, row_bytes, rows, CopySmall<16>{});
    case 32: return move_all<false>(dst, src, from, row_bytes, rows, CopySmall<32>{});
    default: break;
  }
  if (gap <= kNearRows) return move_all<true>(dst, src, to, row_bytes, rows, CopyAny{row_bytes});
  return move_all<false>(dst, src, from, row_bytes, rows, CopyAny{row_bytes});
}

}  // namespace hiera_kernels
