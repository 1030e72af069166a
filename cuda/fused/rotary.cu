// Rotary embedding: channels i and i + K/2 of a head turn together by the angle of their position,
//
//   y1 = x1 cos - x2 sin            y2 = x2 cos + x1 sin
//
// and the backward pass turns back: the same kernel with -sin. One kernel for q and k of any strides; the tables have a
// stride of 0 where heads or sequences share them, and come out of the caches. They are in float32 or the type of x.
#include "fused/segments.cuh"

namespace fused {
namespace rotary {
namespace {

constexpr int chunks = 2;  // of each half

template <class T>
struct Problem {
  Sizes sizes;
  Segments segments;  // of half a row
  Rows<const T> x;
  Rows<T> y;
  Rows<const char> cos, sin;  // in bytes
  bool wide;                  // tables in float32
  float sign;
};

// Bytes: x read, y written; both halves of a row by the same thread.
template <class T, int n>
__global__ void __launch_bounds__(segment_threads) rotate(const __grid_constant__ Problem<T> p) {
  int row;
  int64_t first;
  Span<T, n> span;
  if (!p.segments.take(row, first, span)) return;
  const Place at = p.sizes.place(row);
  const int64_t half = p.segments.width, first_byte = first * (p.wide ? 4 : int64_t(sizeof(T)));
  const T* const from = p.x.at(at) + first;
  T* const to = p.y.at(at) + first;

  Bits<T, n> low[chunks], high[chunks];
  span.load(from, low);
  span.load(from + half, high);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    if (!span.inside(c)) continue;
    float x1[n], x2[n], cos[n], sin[n], y1[n], y2[n];
    unpack<T, n>(low[c], x1);
    unpack<T, n>(high[c], x2);
    span.load({p.cos.at(at) + first_byte, p.wide}, c, cos);
    span.load({p.sin.at(at) + first_byte, p.wide}, c, sin);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      y1[j] = x1[j] * cos[j] - p.sign * x2[j] * sin[j];
      y2[j] = x2[j] * cos[j] + p.sign * x1[j] * sin[j];
    }
    span.store(to, c, y1);
    span.store(to + half, c, y2);
  }
}

// A table (.., K/2) at the places of x, in bytes.
Rows<const char> table_of(const View& t, const View& x, int64_t half) {
  t.expect_type({x.type, DataType::f32});
  const Rows<const char> rows = rows_of<const char>(t, x, half);
  const int64_t size = simt::size_of(t.type);
  return {rows.data, rows.outer * size, rows.middle * size, rows.inner * size};
}

// sign 1: forward, -1: backward.
void run(const native::Arguments& given) {
  const View &x = given.array("x"), &y = given.array("y"), &cos = given.array("cos"), &sin = given.array("sin");
  const Sizes sizes = sizes_of(x);
  const int64_t width = width_of(x), half = width / 2;
  if (width % 2) x.refuse("shape " + x.shape() + ": expected an even number of channels");
  if (sin.type != cos.type) sin.refuse("expected the type of cos");
  const bool whole = aligned(half, {&x, &y, &cos, &sin});
  with_chunk(x.type, whole, [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int n = size;
    const Problem<T> p = {sizes, segments_of<n>(x, sizes.rows, half, chunks), rows_of<const T>(&x, x, width),
                          rows_of<T>(&y, x, width), table_of(cos, x, half), table_of(sin, x, half),
                          cos.type == DataType::f32, float(given.number("sign"))};
    if (p.segments.all > 0) simt::launch(rotate<T, n>, launch_of(p.segments, given.stream), p);
  });
}

const native::Operation operation("rotary", run);

}  // namespace
}  // namespace rotary
}  // namespace fused
