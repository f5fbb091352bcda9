// The order of tokens: where a token of the spatial grid stands after `unroll`, and back. CPU and CUDA kernels share this file.
//
// A schedule of L steps over D dimensions splits every coordinate into digits, the first step's digit varying fastest:
//     x_d = r_1 + s_1 * (r_2 + s_2 * (... + s_L * w))
// The unrolled order lists all digits of step 1 first (slowest), then step 2, ..., and the window coordinates w last (fastest).
// Both orders are therefore one row-major walk over the same digits ("axes"), and either direction of the map is a table of
// (extent, stride) pairs: extents in the order of the index that goes in, strides of the index that comes out.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HIERA_HOST_DEVICE __host__ __device__
#else
#define HIERA_HOST_DEVICE
#endif

namespace hiera_kernels {

// An axis of extent 1 is dropped, so 40 axes are enough for 2^40 tokens.
constexpr int kMaxAxes = 40;

// Rows in one order -> rows (or bytes, if `stride` holds bytes) in the other. Axes run from the slowest to the fastest.
template <typename Index>
struct RowMap {
  int axes = 0;
  Index extent[kMaxAxes];
  Index stride[kMaxAxes];

  HIERA_HOST_DEVICE Index operator()(Index row) const {
    Index out = 0;
    for (int k = axes - 1; k > 0; --k) {
      const Index outer = row / extent[k];
      out += (row - outer * extent[k]) * stride[k];
      row = outer;
    }
    return axes > 0 ? out + row * stride[0] : out;
  }
};

struct TokenOrder {
  int64_t tokens = 1;              // N, the tokens of one image
  int64_t windows = 1;             // W, the mask units of one image
  int64_t unit = 1;                // tokens per mask unit, N / W
  RowMap<int64_t> to_spatial;      // unrolled row -> spatial row
  RowMap<int64_t> to_unrolled;     // spatial row -> unrolled row
  const char* error = nullptr;     // why `size` and `strides` do not make an order; null if they do
};

namespace detail {

struct Axis {
  int64_t extent, spatial, unrolled;
};

// Neighbours that the output walks through as if they were one axis become one.
inline void append_axis(RowMap<int64_t>& map, int64_t extent, int64_t stride) {
  if (map.axes > 0 && map.stride[map.axes - 1] == extent * stride) {
    map.extent[map.axes - 1] *= extent;
    map.stride[map.axes - 1] = stride;
    return;
  }
  map.extent[map.axes] = extent;
  map.stride[map.axes] = stride;
  ++map.axes;
}

}  // namespace detail

// `strides` is flat: `dims` numbers per step. On an illegal schedule only `error` is to be read.
inline TokenOrder make_token_order(const int64_t* size, int64_t dims, const int64_t* strides, int64_t strides_length) {
  TokenOrder order;
  if (dims < 1 || dims > 3) {
    order.error = "size must have 1 to 3 entries";
    return order;
  }
  if (strides_length % dims != 0) {
    order.error = "strides must have one entry per dimension and step";
    return order;
  }
  const int64_t steps = strides_length / dims;
  int64_t row_stride[3], left[3], taken[3] = {1, 1, 1};
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (size[d] < 1) {
      order.error = "size must be positive";
      return order;
    }
    row_stride[d] = order.tokens;
    left[d] = size[d];
    order.tokens *= size[d];
  }
  detail::Axis axis[kMaxAxes];
  int count = 0;
  int64_t unrolled = order.tokens;
  for (int64_t step = 0; step <= steps; ++step) {
    for (int64_t d = 0; d < dims; ++d) {
      const int64_t extent = step < steps ? strides[step * dims + d] : left[d];
      if (extent < 1 || left[d] % extent != 0) {
        order.error = "the product of the strides must divide size";
        return order;
      }
      if (extent > 1) {
        if (count == kMaxAxes) {
          order.error = "the schedule has too many steps";
          return order;
        }
        unrolled /= extent;
        axis[count++] = {extent, taken[d] * row_stride[d], unrolled};
      }
      taken[d] *= extent;
      left[d] /= extent;
      if (step < steps) order.unit *= extent;
    }
  }
  order.windows = order.tokens / order.unit;
  for (int i = 0; i < count; ++i) detail::append_axis(order.to_spatial, axis[i].extent, axis[i].spatial);
  for (int i = 1; i < count; ++i) {  // insertion sort: the largest spatial stride is the slowest spatial axis
    const detail::Axis moved = axis[i];
    int j = i;
    for (; j > 0 && axis[j - 1].spatial < moved.spatial; --j) axis[j] = axis[j - 1];
    axis[j] = moved;
  }
  for (int i = 0; i < count; ++i) detail::append_axis(order.to_unrolled, axis[i].extent, axis[i].unrolled);
  return order;
}

// The same map in a narrower index type, for device code.
template <typename Index>
RowMap<Index> narrow_map(const RowMap<int64_t>& map) {
  RowMap<Index> out;
  out.axes = map.axes;
  for (int k = 0; k < map.axes; ++k) {
    out.extent[k] = static_cast<Index>(map.extent[k]);
    out.stride[k] = static_cast<Index>(map.stride[k]);
  }
  return out;
}

}  // namespace hiera_kernels
